"""What programs do with connect() that is not the usual, against what they saw."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.record import Script, Test, recorded
from tests.record.script import IPPROTO_TCP, POLLOUT, SO_ERROR, SOL_SOCKET, TCP_SYNCNT
from tests.tools.connect.attempts import (
    CONNECT,
    NOWHERE,
    OTHER,
    PORT,
    SILENT,
    Attempt,
    listening,
    made,
    rows,
    silence,
)

SO_SNDTIMEO = 21
PATIENT = ((IPPROTO_TCP, TCP_SYNCNT, 127),)  # hours


@recorded(CONNECT)
def test_calls_that_say_nothing_new(script: Script) -> Test:
    """EINPROGRESS, EALREADY, EISCONN: one attempt, one row."""
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    with script.server.held():
        saw = Attempt(client, address, PORT, "started")
        early = [saw.socket.connect(address, PORT, may_fail=True) for _ in range(2)]
    saw.finish()
    # The first call after it says that it is.
    late = [saw.socket.connect(address, PORT, may_fail=True) for _ in range(2)]
    saw.socket.close()
    seen = yield
    assert [saw.first.errno, *(call.errno for call in (*early, *late))] == [
        "EINPROGRESS",
        "EALREADY",
        "EALREADY",
        "none",
        "EISCONN",
    ]
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "ESTABLISHED"})


@recorded(CONNECT)
def test_on_a_listener(script: Script) -> Test:
    """connect() of a socket that listens is refused: not an attempt."""
    listener = script.client.process("client").listener(PORT)
    call = listener.connect(script.server.ipv4, OTHER, may_fail=True)
    listener.close()
    seen = yield
    assert call.errno == "EISCONN"
    rows(seen, script)


@pytest.mark.parametrize("how", ["signal", "timeout"])
@recorded(CONNECT)
def test_an_interrupted_call(script: Script, how: str) -> Test:
    """It returns early; the row comes with the outcome."""
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    mine = made(client, address)
    if how == "timeout":
        mine.option(SOL_SOCKET, SO_SNDTIMEO, struct.pack("=qq", 0, 50_000))
    else:
        client("interrupt", 50)  # again and again: the first one may come before the call
    with script.server.held():
        call = mine.connect(address, PORT, may_fail=True)
        client("interrupt", 0)
        client.pause(200_000)  # longer than the call
        after = client.now()
    ready = mine.until_ready(POLLOUT)
    error = mine("get", SOL_SOCKET, SO_ERROR, 4)
    mine.close()
    seen = yield
    assert call.errno == ("EINTR" if how == "signal" else "EINPROGRESS")
    assert error.ret == 0
    (row,) = rows(seen, script, {"by": client, "rport": PORT, "outcome": "ESTABLISHED", "errno": "none"})
    assert after.begin_us - call.end_us - 1 <= row["latency_us"] <= ready.end_us - call.begin_us + 1
    if how == "timeout":
        assert call.took_us >= 50_000 - 10_000  # the time is counted in jiffies


def sockaddr(address: str, port: int, size: int = 16, family: int = socket.AF_INET) -> tuple[str, int]:
    """struct sockaddr_in in hex, and how much of it is said to be there."""
    return (struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)).hex(), size


@recorded(CONNECT)
def test_addresses_that_are_none(script: Script) -> Test:
    """Too short, or of another family: what was not given is not made up."""
    client = script.client.process("client")
    mine = client.socket()
    calls = [
        mine("connect_raw", *sockaddr("203.0.113.9", PORT, size, family), may_fail=True)
        for size, family in ((8, socket.AF_INET), (16, socket.AF_UNIX))
    ]
    mine.close()
    seen = yield
    assert [call.errno for call in calls] == ["EINVAL", "EAFNOSUPPORT"]
    rows(
        seen,
        script,
        *(
            {
                "by": client,
                "saw": call,
                "rport": None,
                "outcome": "FAILED",
                "syn_sent": False,
                "raddr": None,
                "lport": None,
            }
            for call in calls
        ),
    )


@recorded(CONNECT)
def test_an_address_at_the_end_of_memory(script: Script) -> Test:
    """An IPv4 address is shorter than one of IPv6: nothing behind it is read."""
    client = script.client.process("client")
    call = client.socket()("connect_at_edge", NOWHERE["4"], PORT, may_fail=True)
    seen = yield
    assert call.errno == "ENETUNREACH"
    rows(seen, script, {"by": client, "saw": call, "rport": PORT, "outcome": "UNREACHABLE", "raddr": NOWHERE["4"]})


@recorded(CONNECT)
def test_what_is_in_use_may_not_be_disconnected(script: Script) -> Test:
    """connect() with AF_UNSPEC is no attempt, whatever comes of it."""
    listener = script.server.process("server").listener(PORT)
    client = script.client.process("client")
    saw = Attempt(client, script.server.ipv4, PORT)
    child = listener.accept()
    reading = client.thread().at(saw.socket).receive(1, wait=False)
    call = saw.socket.disconnect(may_fail=True)
    child.close()
    reading.join()
    saw.socket.close()
    seen = yield
    assert saw.errno == "none"
    assert call.errno in ("none", "EBUSY")
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "ESTABLISHED"})


@recorded(CONNECT)
def test_older_than_the_tool(script: Script) -> Test:
    """The owner is known, the beginning is not."""
    with script.older():
        silence(script)
        older = script.client.process("older")
        saw = Attempt(older, SILENT["4"], PORT, "started", options=PATIENT)
        local = saw.socket.name()
    saw.socket.close()
    seen = yield
    assert saw.errno == "EINPROGRESS"
    rows(
        seen,
        script,
        {
            "by": older,
            "rport": PORT,
            "latency_us": None,
            "laddr": local.data,
            "lport": local.ret,
            "syn_sent": True,
            "raddr": SILENT["4"],
            "outcome": "GAVE_UP",
            "errno": "none",
        },
    )


@pytest.mark.parametrize("ending", ["established", "reset", "closed"])
@recorded(CONNECT)
def test_both_ends_begin(script: Script, ending: str) -> Test:
    """SYNs that cross on their way: each end opens actively, and there is no listener."""
    client, server = script.client, script.server
    lport = 32000
    with client.held():
        with server.held():
            ours = Attempt(client.process("client"), server.ipv4, PORT, "started", local=(client.ipv4, lport))
            theirs = Attempt(server.process("server"), client.ipv4, lport, "started", local=(server.ipv4, PORT))
        client.until_sockets(state="SYN_RECV", rport=PORT)
        if ending == "reset":
            theirs.socket.close()
        elif ending == "closed":
            ours.socket.close()
    for attempt, closed in ((ours, "closed"), (theirs, "reset")):
        if ending != closed:
            attempt.finish()
            attempt.socket.close()
    opens = client.counter("TcpActiveOpens")
    seen = yield
    assert (ours.first.errno, theirs.first.errno, opens.ret) == ("EINPROGRESS", "EINPROGRESS", 1)
    assert (ours.errno, theirs.errno) == {
        "established": ("none", "none"),
        "reset": ("ECONNRESET", "EINPROGRESS"),
        "closed": ("EINPROGRESS", "none"),
    }[ending]
    wanted = {"rport": PORT, "lport": lport, "syn_sent": True}
    other = {"rport": lport, "lport": PORT, "syn_sent": True}
    aborted = {"outcome": "GAVE_UP", "errno": "none"}
    established = {"outcome": "ESTABLISHED", "errno": "none"}
    match ending:
        case "established":
            here, there = {"saw": ours, **established}, {"saw": theirs, **established}
        case "reset":
            here, there = {"saw": ours, "outcome": "RESET"}, {"by": theirs.process, **aborted}
        case _:
            here, there = {"by": ours.process, **aborted}, {"saw": theirs, **established}
    rows(seen, script, wanted | here, host=client)
    rows(seen, script, other | there, host=server)
