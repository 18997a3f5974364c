"""Connections that are opened by another way than connect() of a TCP socket."""

from __future__ import annotations

import pytest

from tests.record import Script, Test, recorded
from tests.record.script import IPPROTO_TCP
from tests.tools.connect.attempts import (
    CONNECT,
    NOWHERE,
    OTHER,
    PORT,
    REFUSED,
    Attempt,
    listening,
    rows,
    rule,
    sees_every_call,
)

TCP_FASTOPEN_CONNECT, IPPROTO_MPTCP = 30, 262
SOCKETCALL, CONNECT_I386, PIPE_I386 = 102, 362, 42  # numbers of i386; 42 is connect() on x86-64


@recorded(CONNECT)
def test_fast_open(script: Script) -> Test:
    """sendto() connects: with the cookie of the first connection the second one's SYN carries data."""
    script.server.sysctl("tcp_fastopen", 3)
    script.client.sysctl("tcp_fastopen", 1)
    listening(script, fastopen=16)
    client, address = script.client.process("client"), script.server.ipv4

    sent, lports = [], []
    for _ in range(2):
        mine = client.socket()
        sent.append(mine.send_to("x", address, PORT))
        lports.append(mine.name())
        mine.close()
    active = script.client.counter("TcpExtTCPFastOpenActive")
    # TCP_FASTOPEN_CONNECT: connect() does nothing, and the SYN leaves with the first write.
    deferred = ((IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1),)
    opens = script.client.counter("TcpActiveOpens")
    begun = Attempt(client, address, PORT, options=deferred)
    opened = script.client.counter("TcpActiveOpens")
    begun.socket.send("x")
    begun.finish()
    lports.append(begun.socket.name())
    begun.socket.close()
    # Given up before anything was written. connect() has returned 0: no call failed.
    given_up = Attempt(client, address, PORT, options=deferred)
    end = given_up.socket.close()
    refusal = client.socket().send_to("x", address, REFUSED, may_fail=True)
    no_route = client.socket().send_to("x", NOWHERE["4"], OTHER, may_fail=True)
    seen = yield
    assert (active.ret, opens.ret, opened.ret) == (1, 2, 2)
    assert [saw.errno for saw in (*sent, begun, given_up, refusal, no_route)] == [
        "none",
        "none",
        "none",
        "none",
        "ECONNREFUSED",
        "ENETUNREACH",
    ]
    last = {
        "by": client,
        "saw": no_route,
        "rport": OTHER,
        "outcome": "UNREACHABLE",
        "syn_sent": False,
        "latency_us": None,
    }
    found = rows(
        seen,
        script,
        *(
            {"by": client, "saw": saw, "rport": PORT, "outcome": "ESTABLISHED", "syn_sent": True, "lport": local.ret}
            for saw, local in zip((*sent, begun), lports, strict=True)
        ),
        {"by": client, "rport": PORT, "outcome": "GAVE_UP", "errno": "none", "syn_sent": False},
        {"by": client, "saw": refusal, "rport": REFUSED, "outcome": "REFUSED"},
        *([last] if sees_every_call(seen) else []),
    )
    assert found[2]["latency_us"] is not None
    span_us = end.begin_us - given_up.first.end_us - 1, end.end_us - given_up.first.begin_us + 1
    assert span_us[0] <= found[3]["latency_us"] <= span_us[1]


@recorded(CONNECT)
def test_fast_open_is_rejected(script: Script) -> Test:
    """sendto() has returned, where its return is hooked, and the application closes the socket."""
    script.client.sysctl("tcp_fastopen", 1)
    rule(script.client, "output", PORT, "reject")
    client = script.client.process("client")
    mine = client.socket()
    mine.blocking(False)
    call = mine.send_to("x", script.server.ipv4, PORT, may_fail=True)
    script.client.until_counter("IcmpInDestUnreachs", 1)
    mine.close()
    seen = yield
    assert call.errno == "EINPROGRESS"
    rows(seen, script, {"by": client, "rport": PORT, "outcome": "REJECTED", "errno": "ECONNREFUSED", "syn_sent": True})


@recorded(CONNECT)
def test_mptcp(script: Script) -> Test:
    """To a server of plain TCP: one subflow, which is the connection."""
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    script.client.agent("sysctl", "mptcp/enabled", 1, may_fail=True)
    tried, made, lports = [], [], []
    for target, port, how in (
        (address, PORT, "blocking"),
        (address, PORT, "nonblocking"),
        (address, REFUSED, "blocking"),
        (NOWHERE["4"], OTHER, "blocking"),
    ):
        mine = client.socket(protocol=IPPROTO_MPTCP, may_fail=True)
        made.append(mine.made)
        tried.append(Attempt(client, target, port, how, socket=mine, may_fail=True))
        lports.append(mine.name(may_fail=True))
        mine("close", may_fail=True)
    seen = yield
    if {call.errno for call in made} == {"EPROTONOSUPPORT"}:
        assert not seen.machine.kernel.has_type("mptcp_sock")
        pytest.skip("this kernel has no MPTCP")
    assert [saw.errno for saw in tried] == ["none", "none", "ECONNREFUSED", "ENETUNREACH"]
    found = rows(
        seen,
        script,
        {"saw": tried[0], "rport": PORT, "outcome": "ESTABLISHED", "lport": lports[0].ret},
        {"saw": tried[1], "rport": PORT, "outcome": "ESTABLISHED", "lport": lports[1].ret},
        {"saw": tried[2], "rport": REFUSED, "outcome": "REFUSED"},
        {"saw": tried[3], "rport": OTHER, "outcome": "UNREACHABLE"},
    )
    assert None not in [row["latency_us"] for row in found[:2]]


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
        assert not seen.machine.kernel.has_type("io_kiocb") or seen.machine.config["io_uring_disabled"] != "0"
        pytest.skip(f"this kernel has no io_uring for us: io_uring_setup() says {calls[0].errno}")
    assert [call.errno for call in calls] == ["none", "ECONNREFUSED", "ENETUNREACH"]
    wanted = [("ESTABLISHED", PORT), ("REFUSED", REFUSED), ("UNREACHABLE", OTHER)][: 2 + sees_every_call(seen)]
    found = rows(
        seen,
        script,
        *(
            {"by": ring, "saw": call, "rport": port, "outcome": outcome}
            for (outcome, port), call in zip(wanted, calls, strict=False)
        ),
    )
    assert found[0]["latency_us"] is not None


@pytest.mark.parametrize("number", [CONNECT_I386, SOCKETCALL])
@recorded(CONNECT)
def test_a_call_of_i386(script: Script, number: int) -> Test:
    client, calls = script.client.process("client"), []
    listening(script)
    for address, port in ((script.server.ipv4, PORT), (script.server.ipv4, REFUSED), (NOWHERE["4"], OTHER)):
        calls.append(client.socket()("i386_connect", number, address, port, may_fail=True))
    seen = yield
    if calls[0].errno == "ENOSYS":
        assert not seen.machine.kernel.has_type("compat_robust_list_head")
        pytest.skip("this kernel has no calls of i386")
    assert [call.errno for call in calls] == ["none", "ECONNREFUSED", "ENETUNREACH"]
    outcomes = (("ESTABLISHED", PORT), ("REFUSED", REFUSED), ("UNREACHABLE", OTHER))
    wanted = zip(calls, outcomes, strict=True)
    rows(seen, script, *({"by": client, "saw": call, "rport": p, "outcome": o} for call, (o, p) in wanted))


@recorded(CONNECT)
def test_another_call_of_i386_is_no_connect(script: Script) -> Test:
    """pipe() fails. The registers hold what connect() of x86-64 would find there: a socket and an address."""
    client = script.client.process("client")
    call = client.socket()("i386_connect", PIPE_I386, script.server.ipv4, PORT, may_fail=True)
    seen = yield
    if call.errno == "ENOSYS":
        assert not seen.machine.kernel.has_type("compat_robust_list_head")
        pytest.skip("this kernel has no calls of i386")
    assert call.errno == "EFAULT"
    rows(seen, script)
