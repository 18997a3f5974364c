"""How an attempt can end, against what the client programs saw: their errno, their clock, their addresses."""

from __future__ import annotations

import pytest

from tests.record import Script, Test, recorded
from tests.record.script import POLLOUT, STATES
from tests.tools.connect.attempts import (
    CONNECT,
    FAMILIES,
    NOWHERE,
    OTHER,
    PORT,
    REFUSED,
    REUSED,
    SILENT,
    SYNCNT_1,
    Attempt,
    listening,
    rows,
    rule,
    shown,
    silence,
    syn_retransmissions,
    version,
)

NOBODY = "192.0.2.9"  # on the link, but not there
BEHIND = "203.0.113.130"  # the server is asked to forward, and has no route


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_established(script: Script, family: str, call: str) -> Test:
    listening(script)
    address = script.server.address(family)
    saw = Attempt(script.client.process("client"), address, PORT, call)
    local, cookie, info = saw.socket.name(), saw.socket.cookie(), saw.socket.info()
    saw.socket.close()
    seen = yield
    assert saw.errno == "none"
    (row,) = rows(
        seen,
        script,
        {
            "saw": saw,
            "rport": PORT,
            "outcome": "ESTABLISHED",
            "syn_sent": True,
            "syn_dropped": False,
            "syn_retrans": info.info["retrans"],
            "raddr": shown(address),
            "lport": local.ret,
            "laddr": shown(local.data),
            "family": version(family),
        },
    )
    assert row["latency_us"] is not None
    assert row["cookie"] == cookie.ret if seen.machine.gives_cookies else row["cookie"] in (cookie.ret, None)


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_refused(script: Script, family: str, call: str) -> Test:
    client, address = script.client.process("client"), script.server.address(family)
    saw = Attempt(client, address, REFUSED, call)
    again = saw.socket.connect(address, REFUSED, may_fail=True)
    saw.socket.close()
    repeated = syn_retransmissions(script.client)
    seen = yield
    assert saw.errno == "ECONNREFUSED"
    # Whoever asks again after the error was fetched is not told why, and no new attempt was made.
    assert again.errno == ("ECONNABORTED" if call == "nonblocking" else "ECONNREFUSED")
    local = script.client.address("6" if family == "6" else "4")
    wanted = {
        "by": client,
        "rport": REFUSED,
        "outcome": "REFUSED",
        "errno": "ECONNREFUSED",
        "syn_sent": True,
        "raddr": shown(address),
        "laddr": local,
        "family": version(family),
    }
    further = [wanted | {"saw": again}] if call == "blocking" else []
    found = rows(seen, script, wanted | {"saw": saw}, *further)
    assert sum(row["syn_retrans"] for row in found) == repeated.ret
    assert found[0]["lport"] is not None
    assert found[0]["latency_us"] is not None


@recorded(CONNECT)
def test_the_second_call_fetches_the_error(script: Script) -> Test:
    client, address = script.client.process("client"), script.server.ipv4
    started = Attempt(client, address, REFUSED, "started")
    started.socket.until_ready(POLLOUT)
    fetched = started.socket.connect(address, REFUSED, may_fail=True)
    # From here on the socket is as good as new.
    again = started.socket.connect(NOWHERE["4"], OTHER, may_fail=True)
    started.socket.close()
    seen = yield
    assert [call.errno for call in (started, fetched, again)] == ["EINPROGRESS", "ECONNREFUSED", "ENETUNREACH"]
    rows(
        seen,
        script,
        {"by": client, "rport": REFUSED, "outcome": "REFUSED", "errno": "ECONNREFUSED"},
        {"by": client, "saw": again, "rport": OTHER, "outcome": "UNREACHABLE", "syn_sent": False},
    )


@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_latency_with_a_retransmission(script: Script, family: str) -> Test:
    """The answer waits until the SYN was sent again: the client's clock says how long, at least and at most."""
    listening(script)
    client = script.client.process("client")
    with script.server.held():
        saw = Attempt(client, script.server.address(family), PORT, "started")
        script.client.until_sockets(1, ">=", "retransmits", rport=PORT)
        waited = client.now()
    info = saw.finish().socket.info()
    saw.socket.close()
    seen = yield
    again = info.info["retrans"]
    (row,) = rows(
        seen, script, {"saw": saw, "rport": PORT, "outcome": "ESTABLISHED", "syn_retrans": again, "syn_sent": True}
    )
    assert (saw.first.errno, saw.errno) == ("EINPROGRESS", "none")
    assert again >= 1  # a third SYN may come a second after the second
    assert row["latency_us"] >= max(waited.begin_us - saw.first.end_us - 1, 900_000)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("4", "blocking"),
        ("6", "nonblocking"),
        ("mapped", "blocking"),
        ("4", "nonblocking"),
    ],
)
@recorded(CONNECT)
def test_timed_out(script: Script, family: str, how: str) -> Test:
    silence(script)
    saw = Attempt(script.client.process("patient"), SILENT[family], PORT, how, options=SYNCNT_1)
    saw.socket.close()
    repeated = syn_retransmissions(script.client)
    seen = yield
    assert saw.errno == "ETIMEDOUT"
    (row,) = rows(
        seen,
        script,
        {
            "saw": saw,
            "rport": PORT,
            "outcome": "TIMED_OUT",
            "syn_sent": True,
            "syn_dropped": False,
            "raddr": shown(SILENT[family]),
            "family": version(family),
        },
    )
    assert row["syn_retrans"] == repeated.ret >= 1
    # Two SYNs of 1 and 2 s; since 6.5 the first timers are of 1 s each, and there are more of them.
    assert row["latency_us"] >= max(2.9, row["syn_retrans"] + 0.9) * 1e6
    assert row["lport"] is not None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@recorded(CONNECT)
def test_no_route(script: Script, family: str, call: str) -> Test:
    saw = Attempt(script.client.process("client"), NOWHERE[family], PORT, call)
    saw.socket.close()
    seen = yield
    assert saw.errno == "ENETUNREACH"
    rows(
        seen,
        script,
        {
            "saw": saw,
            "rport": PORT,
            "outcome": "UNREACHABLE",
            "syn_sent": False,
            "syn_retrans": 0,
            "latency_us": None,
            "lport": None,
            "raddr": shown(NOWHERE[family]),
            "family": version(family),
            "laddr": "::" if family == "6" else "0.0.0.0",
        },
    )


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(CONNECT)
def test_no_route_from_a_port(script: Script, family: str) -> Test:
    """Bound before: that end is known though no SYN was sent."""
    local = script.client.address(family)
    saw = Attempt(script.client.process("client"), NOWHERE[family], PORT, local=(local, 31000))
    saw.socket.close()
    seen = yield
    assert saw.errno == "ENETUNREACH"
    rows(
        seen,
        script,
        {"saw": saw, "rport": PORT, "outcome": "UNREACHABLE", "laddr": local, "lport": 31000, "syn_sent": False},
    )


@recorded(CONNECT)
def test_routes_that_say_no(script: Script) -> Test:
    """Each kind of route has its errno, which connect() returns before a SYN."""
    client, tried = script.client.process("client"), []
    for number, kind in enumerate(("prohibit", "unreachable", "blackhole")):
        address = f"203.0.113.{200 + number}"
        script.client.exec("ip", "route", "add", kind, address)
        tried.append((address, Attempt(client, address, PORT + number)))
    seen = yield
    outcomes = {"EACCES": "FAILED", "EHOSTUNREACH": "UNREACHABLE", "EINVAL": "FAILED"}
    assert {saw.errno for _, saw in tried} == outcomes.keys()
    rows(
        seen,
        script,
        *(
            {
                "saw": saw,
                "rport": PORT + number,
                "syn_sent": False,
                "latency_us": None,
                "raddr": address,
                "outcome": outcomes[saw.errno],
            }
            for number, (address, saw) in enumerate(tried)
        ),
    )


@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_rejected_by_a_rule_of_the_server(script: Script, family: str) -> Test:
    """The errno is that of a RST, and an ICMP message came. Witness: the client's counters."""
    rule(script.server, "input", PORT, "reject")
    saw = Attempt(script.client.process("client"), script.server.address(family), PORT)
    saw.socket.close()
    messages = script.client.counter("Icmp6InDestUnreachs" if family == "6" else "IcmpInDestUnreachs")
    segments = script.client.counter("TcpInSegs")
    seen = yield
    assert saw.errno == "ECONNREFUSED"
    assert (messages.ret >= 1, segments.ret) == (True, 0)
    wanted = {"outcome": "REJECTED", "syn_sent": True, "syn_dropped": False, "family": version(family)}
    rows(seen, script, {"saw": saw, "rport": PORT} | wanted)


@recorded(CONNECT)
def test_refused_by_a_rule_of_the_server(script: Script) -> Test:
    listening(script)
    rule(script.server, "input", PORT, "reject with tcp reset")
    saw = Attempt(script.client.process("client"), script.server.ipv4, PORT)
    saw.socket.close()
    seen = yield
    (row,) = rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "REFUSED", "errno": "ECONNREFUSED"})
    assert row["syn_dropped"] is None or row["syn_retrans"]


@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_dropped_by_a_rule_of_the_client(script: Script, family: str) -> Test:
    """No SYN leaves, and the kernel goes on as if it did. Witness: what the server has received."""
    listening(script)
    rule(script.client, "output", PORT, "drop")
    client, address = script.client.process("client"), script.server.address(family)
    impatient = Attempt(client, address, PORT, "started")
    impatient.socket.close()
    patient = Attempt(client, address, PORT, options=SYNCNT_1)
    patient.socket.close()
    received = script.server.counter("TcpInSegs")
    seen = yield
    assert (patient.errno, received.ret) == ("ETIMEDOUT", 0)
    wanted = {"rport": PORT, "syn_sent": True, "syn_dropped": True}
    *_, second = rows(
        seen, script, {"by": client, "outcome": "GAVE_UP"} | wanted, {"saw": patient, "outcome": "TIMED_OUT"} | wanted
    )
    assert second["syn_retrans"] >= 1


@recorded(CONNECT)
def test_rejected_by_a_rule_of_the_client(script: Script) -> Test:
    """The SYN is dropped, and the ICMP message is its own."""
    rule(script.client, "output", PORT, "reject")
    saw = Attempt(script.client.process("client"), script.server.ipv4, PORT)
    saw.socket.close()
    seen = yield
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "REJECTED", "syn_sent": True, "syn_dropped": True})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("hook", "kind", "outcome", "errno"),
    [
        ("output", "port-unreachable", "REJECTED", "ECONNREFUSED"),
        ("input", "port-unreachable", "REJECTED", "ECONNREFUSED"),
        ("output", "host-unreachable", "UNREACHABLE", "EHOSTUNREACH"),
    ],
)
@recorded(CONNECT)
def test_rejected_before_connect_returns(
    script: Script, family: str, hook: str, kind: str, outcome: str, errno: str
) -> Test:
    """The ICMP message finds the socket in use, so the kernel goes on. The application closes the socket.

    Witness: IPv4 wakes the application, which fetches the error. With IPv6 the error stays in the socket.
    Where ksoftirqd delivers the message, it may find the socket free. Then the kernel ends the attempt and empties its
    write queue, as TCP_INFO shows, and what became of the SYN is unknown.
    """
    rule(script.client if hook == "output" else script.server, hook, PORT, f"reject with icmpx type {kind}")
    client, address = script.client.process("client"), script.server.address(family)
    saw = Attempt(client, address, PORT, "started")
    script.client.until_counter("Icmp6InDestUnreachs" if family == "6" else "IcmpInDestUnreachs", 1)
    state = saw.socket.info()
    if family != "6":
        saw.finish()
    saw.socket.close()
    seen = yield
    assert saw.errno == ("EINPROGRESS" if family == "6" else errno)
    dropped = hook == "output" if state.ret == STATES["SYN_SENT"] else None
    wanted = {"outcome": outcome, "errno": errno, "syn_sent": True, "syn_dropped": dropped}
    rows(seen, script, {"by": client, "rport": PORT, "raddr": shown(address), "family": version(family)} | wanted)


@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_rejected_and_then_established(script: Script, family: str) -> Test:
    """The rule takes the first SYN only. The next one decides, unless connect() had returned before the message."""
    listening(script)
    rule(script.client, "output", PORT, "limit rate 1/hour burst 1 packets reject")
    saw = Attempt(script.client.process("client"), script.server.address(family), PORT)
    messages = script.client.counter("Icmp6InDestUnreachs" if family == "6" else "IcmpInDestUnreachs")
    saw.socket.close()
    seen = yield
    assert messages.ret >= 1
    outcome = {"none": "ESTABLISHED", "ECONNREFUSED": "REJECTED"}[saw.errno]
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": outcome})


@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_rejected_in_an_earlier_attempt(script: Script, family: str) -> Test:
    """The message is still in the socket when the next attempt of the same socket gets no answer."""
    silence(script)
    rule(script.client, "output", PORT, "reject")
    client = script.client.process("client")
    saw = Attempt(client, script.server.address(family), PORT, "started")
    script.client.until_counter("Icmp6InDestUnreachs" if family == "6" else "IcmpInDestUnreachs", 1)
    saw.socket.disconnect()
    again = saw.socket.connect(SILENT[family], OTHER, may_fail=True)
    saw.socket.disconnect()
    # Nothing is left that a call would still return: this one has a row.
    no_route = saw.socket.connect(NOWHERE[family], OTHER, may_fail=True)
    saw.socket.close()
    seen = yield
    assert (again.errno, no_route.errno) == ("EINPROGRESS", "ENETUNREACH")
    rows(
        seen,
        script,
        {"by": client, "rport": PORT, "outcome": "REJECTED", "errno": "ECONNREFUSED"},
        {"by": client, "rport": OTHER, "outcome": "GAVE_UP", "errno": "none"},
        {"by": client, "saw": no_route, "rport": OTHER, "outcome": "UNREACHABLE"},
    )


@recorded(CONNECT)
def test_a_neighbour_that_is_not_there(script: Script) -> Test:
    """The kernel looks for its link address in vain, and tells itself so by ICMP."""
    script.client.sysctl("ipv4/neigh/veth0/app_solicit", 1)
    pause = script.client.sysctl("ipv4/neigh/veth0/retrans_time_ms")
    saw = Attempt(script.client.process("client"), NOBODY, PORT)
    saw.socket.close()
    seen = yield
    assert saw.errno == "EHOSTUNREACH"
    (row,) = rows(
        seen, script, {"saw": saw, "rport": PORT, "outcome": "UNREACHABLE", "syn_sent": True, "raddr": NOBODY}
    )
    assert row["latency_us"] >= pause.ret * 1000 - 10_000  # jiffies


@recorded(CONNECT)
def test_unreachable_behind_a_router(script: Script) -> Test:
    """The router answers with ICMP. What comes while connect() is still at it decides nothing: the next SYN does."""
    script.server.sysctl("ip_forward", 1)
    script.server.exec("ip", "route", "add", "unreachable", BEHIND)
    script.client.exec("ip", "route", "add", BEHIND, "via", script.server.ipv4)
    saw = Attempt(script.client.process("client"), BEHIND, PORT)
    saw.socket.close()
    seen = yield
    assert saw.errno == "EHOSTUNREACH"
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "UNREACHABLE", "syn_sent": True, "raddr": BEHIND})


@recorded(CONNECT)
def test_no_free_port(script: Script) -> Test:
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    script.client.sysctl("ip_local_port_range", "40000 40001")
    fits = [Attempt(client, address, PORT) for _ in range(2)]
    lports = [saw.socket.name() for saw in fits]
    late = [Attempt(client, address, PORT, how) for how in ("blocking", "nonblocking")]
    seen = yield
    assert [saw.errno for saw in (*fits, *late)] == ["none", "none", "EADDRNOTAVAIL", "EADDRNOTAVAIL"]
    assert {local.ret for local in lports} == {40000, 40001}
    found = rows(
        seen,
        script,
        *(
            {"saw": saw, "rport": PORT, "raddr": address, "outcome": "ESTABLISHED", "lport": local.ret}
            for saw, local in zip(fits, lports, strict=True)
        ),
        *(
            {
                "saw": saw,
                "rport": PORT,
                "raddr": address,
                "outcome": "FAILED",
                "syn_sent": False,
                "lport": None,
                "syn_retrans": 0,
            }
            for saw in late
        ),
    )
    assert None not in [row["latency_us"] for row in found]


@recorded(CONNECT)
def test_both_ends_are_taken(script: Script) -> Test:
    """Two sockets at the same local port cannot be connected to the same remote one."""
    listening(script)
    client, local = script.client.process("client"), (script.client.ipv4, 31001)
    both = [Attempt(client, script.server.ipv4, PORT, local=local, options=REUSED) for _ in range(2)]
    seen = yield
    assert [saw.errno for saw in both] == ["none", "EADDRNOTAVAIL"]
    ends = {"lport": 31001, "laddr": script.client.ipv4, "rport": PORT}
    rows(
        seen,
        script,
        {"saw": both[0], "outcome": "ESTABLISHED", **ends},
        {"saw": both[1], "outcome": "FAILED", "syn_sent": False, **ends},
    )
