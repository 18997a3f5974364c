"""What programs do with connect() that is not the usual, against what they saw."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.record import Script, Test, recorded
from tests.record.script import SOL_SOCKET
from tests.tools.connect.site import (
    CONNECT,
    IPPROTO_MPTCP,
    NOWHERE,
    OTHER,
    PATIENT,
    PORT,
    REFUSED,
    SILENT,
    TCP_FASTOPEN_CONNECT,
    Attempt,
    Started,
    listening,
    made,
    rows,
    sees_every_call,
    silence,
    syn_retransmissions,
)

SO_SNDTIMEO = 21


def sockaddr(address: str, port: int, size: int = 16, family: int = socket.AF_INET) -> tuple[str, int]:
    """struct sockaddr_in in hex, and how much of it is said to be there."""
    return (struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)).hex(), size


@recorded(CONNECT)
def test_calls_that_say_nothing_new(script: Script) -> Test:
    """EINPROGRESS, EALREADY, EISCONN: one attempt, one row."""
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    with script.server.held():
        saw = Started(client, address, PORT)
        early = [saw.socket.connect(address, PORT, may_fail=True) for _ in range(2)]
    saw.finish()
    # The first call after it says that it is.
    late = [saw.socket.connect(address, PORT, may_fail=True) for _ in range(2)]
    saw.socket.close()
    seen = yield
    assert [saw.first.errno, *(call.errno for call in (*early, *late))] == [
        "EINPROGRESS", "EALREADY", "EALREADY", "none", "EISCONN",
    ]  # fmt: skip
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
        client("interrupt", 50)
    with script.server.held():
        call = mine.connect(address, PORT, may_fail=True)
        client("interrupt", 0)
        after = client.now()
    ready = mine.until_ready(4)
    error = mine("get", 1, 4, 4)
    mine.close()
    seen = yield
    assert call.errno == ("EINTR" if how == "signal" else "EINPROGRESS")
    assert error.ret == 0
    (row,) = rows(seen, script, {"by": client, "rport": PORT, "outcome": "ESTABLISHED", "errno": "none"})
    assert after.begin_us - call.begin_us - 1 <= row["latency_us"] <= ready.end_us - call.begin_us + 1
    if how == "timeout":
        assert row["latency_us"] >= 50_000 - 10_000  # the time is counted in jiffies


@pytest.mark.parametrize("bound", [False, True])
@recorded(CONNECT)
def test_a_socket_is_used_again_after_a_failure(script: Script, bound: bool) -> Test:
    """Refused, then aborted after a second, then established: the figures are those of each attempt alone."""
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    refused = Attempt(client, address, REFUSED, local=(script.client.ipv4, 31002) if bound else None)
    mine = refused.socket
    before = syn_retransmissions(script.client)
    with script.server.held():
        aborted = Started(client, address, PORT, socket=mine)
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
    assert (refused.errno, aborted.first.errno, last.errno) == ("ECONNREFUSED", "EINPROGRESS", "none")
    first, second, third = rows(
        seen, script,
        {"saw": refused, "rport": REFUSED, "outcome": "REFUSED"},
        {"by": client, "rport": PORT, "outcome": "ABORTED", "lport": lports[0].ret,
         "syn_retrans": repeated.ret - before.ret},
        {"saw": last, "rport": PORT, "outcome": "ESTABLISHED", "lport": lports[1].ret,
         "syn_retrans": again.info["retrans"]},
    )  # fmt: skip
    assert second["syn_retrans"] >= 1
    assert end.begin_us - aborted.first.end_us - 1 <= second["latency_us"] <= end.end_us - aborted.first.begin_us + 1
    assert second["latency_us"] >= 900_000
    ports = {row["lport"] for row in (first, second, third)}
    assert ports == {31002} if bound else None not in ports


@recorded(CONNECT)
def test_the_error_of_an_earlier_attempt_is_not_its_own(script: Script) -> Test:
    """A disconnect leaves ECONNRESET in the socket, and the next attempt fails before that is erased."""
    listening(script)
    silence(script)
    client, address = script.client.process("client"), script.server.ipv4
    local, reuse = (script.client.ipv4, 31005), ((1, 2, 1),)
    first = Attempt(client, address, PORT, local=local, options=reuse)
    aborted = Started(client, SILENT["4"], OTHER, local=local, options=reuse)
    aborted.socket.disconnect()
    last = Attempt(client, address, PORT, socket=aborted.socket)
    seen = yield
    assert (first.errno, aborted.first.errno, last.errno) == ("none", "EINPROGRESS", "EADDRNOTAVAIL")
    rows(seen, script,
         {"saw": first, "rport": PORT, "outcome": "ESTABLISHED"},
         {"by": client, "rport": OTHER, "outcome": "ABORTED"},
         {"saw": last, "rport": PORT, "outcome": "FAILED", "syn_sent": False})  # fmt: skip


@recorded(CONNECT)
def test_a_socket_is_used_again_after_a_connection(script: Script) -> Test:
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
    rows(seen, script,
         {"saw": one, "rport": PORT, "outcome": "ESTABLISHED", "lport": lports[0].ret},
         {"saw": two, "rport": OTHER, "outcome": "ESTABLISHED", "lport": lports[1].ret},
         {"saw": nowhere, "rport": REFUSED, "outcome": "UNREACHABLE", "lport": None, "laddr": "0.0.0.0"})  # fmt: skip


@recorded(CONNECT)
def test_an_address_at_the_end_of_memory(script: Script) -> Test:
    """An IPv4 address is shorter than one of IPv6: nothing behind it is read."""
    client = script.client.process("client")
    call = client.socket()("connect_at_edge", NOWHERE["4"], PORT, may_fail=True)
    seen = yield
    assert call.errno == "ENETUNREACH"
    rows(seen, script, {"by": client, "rport": PORT, "outcome": "UNREACHABLE", "errno": "ENETUNREACH",
                        "raddr": NOWHERE["4"]})  # fmt: skip


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
    assert call.errno in ("none", "EBUSY")
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "ESTABLISHED"})


@recorded(CONNECT)
def test_addresses_that_are_none(script: Script) -> Test:
    """Too short, or of another family: what was not given is not made up."""
    client = script.client.process("client")
    mine = client.socket()
    calls = [mine("connect_raw", *sockaddr("203.0.113.9", PORT, size, family), may_fail=True)
             for size, family in ((8, socket.AF_INET), (16, socket.AF_UNIX))]  # fmt: skip
    mine.close()
    seen = yield
    assert [call.errno for call in calls] == ["EINVAL", "EAFNOSUPPORT"]
    rows(seen, script, *(
        {"by": client, "rport": None, "outcome": "FAILED", "syn_sent": False, "raddr": None, "lport": None,
         "errno": call.errno}
        for call in calls
    ))  # fmt: skip


@recorded(CONNECT)
def test_fast_open(script: Script) -> Test:
    """sendto() connects: with the cookie of the first connection the second one's SYN carries data."""
    script.server.sysctl("tcp_fastopen", 3)
    script.client.sysctl("tcp_fastopen", 1)
    listening(script, PORT, fastopen=16)
    client, address = script.client.process("client"), script.server.ipv4

    sent, lports = [], []
    for _ in range(2):
        mine = client.socket()
        sent.append(mine.send_to("x", address, PORT))
        lports.append(mine.name())
        mine.close()
    active = script.client.counter("TcpExtTCPFastOpenActive")
    opens = script.client.counter("TcpActiveOpens")
    # TCP_FASTOPEN_CONNECT: connect() does nothing, and the SYN leaves with the first write.
    deferred = ((6, TCP_FASTOPEN_CONNECT, 1),)
    begun = Attempt(client, address, PORT, options=deferred)
    opened = script.client.counter("TcpActiveOpens")
    begun.socket.send("x")
    end = begun.socket.until_ready(4)
    lports.append(begun.socket.name())
    begun.socket.close()
    # Given up before anything was written. connect() has returned 0: no call failed.
    given_up = Attempt(client, address, PORT, options=deferred)
    given_up.socket.close()
    refused, nowhere = client.socket(), client.socket()
    refusal = refused.send_to("x", address, REFUSED, may_fail=True)
    no_route = nowhere.send_to("x", NOWHERE["4"], OTHER, may_fail=True)
    seen = yield
    assert (active.ret, opened.ret) == (1, opens.ret)
    assert [call.errno for call in (begun, given_up, refusal, no_route)] == [
        "none", "none", "ECONNREFUSED", "ENETUNREACH",
    ]  # fmt: skip
    last = {"by": client, "rport": OTHER, "outcome": "UNREACHABLE", "errno": "ENETUNREACH", "syn_sent": False,
            "latency_us": None}  # fmt: skip
    found = rows(
        seen, script,
        *({"by": client, "rport": PORT, "outcome": "ESTABLISHED", "errno": "none", "syn_sent": True, "lport": local.ret}
          for local in lports),
        {"by": client, "rport": PORT, "outcome": "ABORTED", "errno": "none", "syn_sent": False},
        {"by": client, "rport": REFUSED, "outcome": "REFUSED", "errno": "ECONNREFUSED"},
        *([last] if sees_every_call(seen) else []),
    )  # fmt: skip
    for row, begin, until in ((found[0], sent[0], sent[0]), (found[2], begun.first, end), (found[4], refusal, refusal)):
        assert row["latency_us"] is None or row["latency_us"] <= until.end_us - begin.begin_us + 1
    assert found[2]["latency_us"] is not None


@recorded(CONNECT)
def test_mptcp(script: Script) -> Test:
    """To a server of plain TCP: one subflow, which is the connection."""
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    script.client.agent("sysctl", "mptcp/enabled", 1, may_fail=True)
    there = client.socket()("close", may_fail=True)
    tried = []
    for target, port, call in ((address, PORT, "blocking"), (address, PORT, "nonblocking"),
                               (address, REFUSED, "blocking"), (NOWHERE["4"], OTHER, "blocking")):  # fmt: skip
        mine = client.socket()
        mine("close")
        mine.made = client("socket", mine.slot, 2, 1, IPPROTO_MPTCP, may_fail=True)
        saw = Attempt(client, target, port, call, socket=mine) if call == "blocking" else Perhaps(mine, target, port)
        tried.append((saw, port, mine, mine.name(may_fail=True)))
        mine("close", may_fail=True)
    seen = yield
    assert there.errno == "none"
    if tried[0][2].made.errno != "none":
        assert not seen.machine.has_type("mptcp_sock")
        pytest.skip("this kernel has no MPTCP")
    assert [saw.errno for saw, *_ in tried] == ["none", "none", "ECONNREFUSED", "ENETUNREACH"]
    outcomes = ("ESTABLISHED", "ESTABLISHED", "REFUSED", "UNREACHABLE")
    found = rows(seen, script, *({"saw": saw, "rport": port, "outcome": outcome}
                                 for (saw, port, *_), outcome in zip(tried, outcomes, strict=True)))  # fmt: skip
    assert [row["lport"] for row in found[:2]] == [local.ret for *_, local in tried[:2]]


class Perhaps(Attempt):
    """A non-blocking one on a socket that may not be there."""

    def __init__(self, mine: object, address: str, port: int) -> None:
        self.socket = mine  # type: ignore[assignment]
        self.process = self.socket.process
        self.socket("blocking", 0, may_fail=True)
        self.first = self.socket("connect", address, port, may_fail=True)
        self.last = self.socket("poll", 4, 5000, may_fail=True)
        self._error = self.socket("get", 1, 4, 4, may_fail=True)


@recorded(CONNECT)
def test_io_uring(script: Script) -> Test:
    listening(script)
    ring, address = script.client.process("ring"), script.server.ipv4
    calls = []
    for target, port in ((address, PORT), (address, REFUSED), (NOWHERE["4"], OTHER)):
        mine = ring.socket()
        calls.append(mine("uring_connect", target, port, may_fail=True))
        mine.close()
    seen = yield
    if calls[0].errno in ("ENOSYS", "EPERM"):
        assert not seen.machine.has_type("io_kiocb") or seen.machine.config["io_uring_disabled"] != "0"
        pytest.skip(f"this kernel has no io_uring for us: io_uring_setup() says {calls[0].errno}")
    assert [call.errno for call in calls] == ["none", "ECONNREFUSED", "ENETUNREACH"]
    wanted = [("ESTABLISHED", PORT), ("REFUSED", REFUSED), ("UNREACHABLE", OTHER)][: 2 + sees_every_call(seen)]
    found = rows(seen, script, *(
        {"by": ring, "rport": port, "outcome": outcome, "errno": call.errno}
        for (outcome, port), call in zip(wanted, calls, strict=False)
    ))  # fmt: skip
    for row, call in zip(found, calls, strict=False):
        assert row["latency_us"] is None or row["latency_us"] <= call.took_us + 1
    assert found[0]["latency_us"] is not None


@recorded(CONNECT)
def test_older_than_the_tool(script: Script) -> Test:
    """The owner is known, the beginning is not."""
    with script.older():
        silence(script)
        older = script.client.process("older")
        saw = Started(older, SILENT["4"], PORT, options=PATIENT)
        local = saw.socket.name()
    saw.socket.close()
    seen = yield
    assert saw.first.errno == "EINPROGRESS"
    rows(seen, script, {"by": older, "rport": PORT, "latency_us": None, "laddr": local.data, "lport": local.ret,
                        "syn_sent": True, "raddr": SILENT["4"], "outcome": "ABORTED", "errno": "none"})  # fmt: skip


@pytest.mark.parametrize("ending", ["established", "reset", "closed"])
@recorded(CONNECT)
def test_both_ends_begin(script: Script, ending: str) -> Test:
    """SYNs that cross on their way: each end opens actively, and there is no listener."""
    client, server = script.client, script.server
    lport = 32000
    with client.held():
        with server.held():
            saw = Started(client.process("client"), server.ipv4, PORT, local=(client.ipv4, lport))
            theirs = Started(server.process("server"), client.ipv4, lport, local=(server.ipv4, PORT))
        client.until_sockets(state="SYN_RECV", rport=PORT)
        if ending == "reset":
            theirs.socket.close()
        elif ending == "closed":
            saw.socket.close()
    if ending != "closed":
        saw.finish()
        saw.socket.close()
    opens = client.counter("TcpActiveOpens")
    seen = yield
    assert (saw.first.errno, theirs.first.errno, opens.ret) == ("EINPROGRESS", "EINPROGRESS", 1)
    wanted = {"saw": saw, "rport": PORT, "lport": lport, "syn_sent": True}
    if ending == "closed":
        rows(seen, script, {"by": saw.process, "outcome": "ABORTED", "errno": "none", "rport": PORT, "lport": lport,
                            "syn_sent": True})  # fmt: skip
    elif ending == "established":
        assert saw.errno == "none"
        rows(seen, script, {**wanted, "outcome": "ESTABLISHED"})
    else:
        assert saw.errno == "ECONNRESET"
        rows(seen, script, {**wanted, "outcome": "RESET"})
