"""A socket that is used for one attempt after the other: the figures are those of each attempt alone."""

from __future__ import annotations

import pytest

from tests.record import Script, Test, recorded
from tests.tools.connect.attempts import (
    CONNECT,
    NOWHERE,
    OTHER,
    PORT,
    REFUSED,
    REUSED,
    SILENT,
    Attempt,
    listening,
    rows,
    silence,
    syn_retransmissions,
)


@pytest.mark.parametrize("bound", [False, True])
@recorded(CONNECT)
def test_after_a_failure(script: Script, bound: bool) -> Test:
    """Refused, then aborted after a second, then established."""
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    refused = Attempt(client, address, REFUSED, local=(script.client.ipv4, 31002) if bound else None)
    mine = refused.socket
    before = syn_retransmissions(script.client)
    with script.server.held():
        aborted = Attempt(client, address, PORT, "started", socket=mine)
        lports = [mine.name()]
        script.client.until_sockets(1, ">=", "retransmits", rport=PORT)
        end = mine.disconnect()
    repeated = syn_retransmissions(script.client)
    mine.blocking(True)
    last = Attempt(client, address, PORT, socket=mine)
    # What was kept back may meet this one, which then sends its SYN again. A disconnect sets the count to zero.
    again = mine.info()
    lports.append(mine.name())
    mine.close()
    seen = yield
    assert (refused.errno, aborted.errno, last.errno) == ("ECONNREFUSED", "EINPROGRESS", "none")
    first, second, third = rows(
        seen,
        script,
        {"saw": refused, "rport": REFUSED, "outcome": "REFUSED"},
        {
            "by": client,
            "rport": PORT,
            "outcome": "GAVE_UP",
            "errno": "none",
            "lport": lports[0].ret,
            "syn_retrans": repeated.ret - before.ret,
        },
        {
            "saw": last,
            "rport": PORT,
            "outcome": "ESTABLISHED",
            "lport": lports[1].ret,
            "syn_retrans": again.info["retrans"],
        },
    )
    assert second["syn_retrans"] >= 1
    assert end.begin_us - aborted.first.end_us - 1 <= second["latency_us"] <= end.end_us - aborted.first.begin_us + 1
    assert second["latency_us"] >= 900_000
    assert third["latency_us"] is not None
    ports = {row["lport"] for row in (first, second, third)}
    assert ports == {31002} if bound else None not in ports


@recorded(CONNECT)
def test_the_error_of_an_earlier_attempt_is_not_its_own(script: Script) -> Test:
    """A disconnect leaves ECONNRESET in the socket, and the next attempt fails before that is erased."""
    listening(script)
    silence(script)
    client, address = script.client.process("client"), script.server.ipv4
    local = script.client.ipv4, 31005
    first = Attempt(client, address, PORT, local=local, options=REUSED)
    aborted = Attempt(client, SILENT["4"], OTHER, "started", local=local, options=REUSED)
    aborted.socket.disconnect()
    last = Attempt(client, address, PORT, socket=aborted.socket)
    seen = yield
    assert (first.errno, aborted.errno, last.errno) == ("none", "EINPROGRESS", "EADDRNOTAVAIL")
    rows(
        seen,
        script,
        {"saw": first, "rport": PORT, "outcome": "ESTABLISHED"},
        {"by": client, "rport": OTHER, "outcome": "GAVE_UP", "errno": "none"},
        {"saw": last, "rport": PORT, "outcome": "FAILED", "syn_sent": False},
    )


@recorded(CONNECT)
def test_after_a_connection(script: Script) -> Test:
    listening(script, PORT, OTHER)
    client, address = script.client.process("client"), script.server.ipv4
    one = Attempt(client, address, PORT)
    lports = [one.socket.name()]
    one.socket.disconnect()
    two = Attempt(client, address, OTHER, socket=one.socket)
    lports.append(one.socket.name())
    one.socket.disconnect()
    nowhere = Attempt(client, NOWHERE["4"], REFUSED, socket=one.socket)
    one.socket.close()
    seen = yield
    assert [saw.errno for saw in (one, two, nowhere)] == ["none", "none", "ENETUNREACH"]
    rows(
        seen,
        script,
        {"saw": one, "rport": PORT, "outcome": "ESTABLISHED", "lport": lports[0].ret},
        {"saw": two, "rport": OTHER, "outcome": "ESTABLISHED", "lport": lports[1].ret},
        {"saw": nowhere, "rport": REFUSED, "outcome": "UNREACHABLE", "lport": None, "laddr": "0.0.0.0"},
    )
