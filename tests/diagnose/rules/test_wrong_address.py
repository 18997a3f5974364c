"""Clients that come to an address at which a port does not listen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules import connects_fail
from tcpscope.diagnose.rules.wrong_address import rule
from tcpscope.diagnose.tallies import Tally
from tcpscope.listeners import Listener
from tests.diagnose.rules.connecting import NETNS, OTHER, THERE, attempt, check, found, groups, of, sockets, times
from tests.diagnose.rules.test_connects_fail import fail
from tests.record import Script, Test, recorded
from tests.test_sampling import at
from tests.tools.queue.refusals import DIAGNOSE

PORT, SCANNED, NAMED = 9301, 9310, 9302


@recorded(DIAGNOSE)
def test_a_server_that_listens_at_loopback_only(script: Script) -> Test:
    with script.older():
        server = script.server.process("api")
        server.listener(PORT, "127.0.0.1")
    before = script.server.counters()
    client = script.client.process("web")
    fail(client, script.server.ipv4, PORT, 12)
    after = script.server.counters()
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)  # and not what the client sees of it
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["netns"]) == ("wrong_address", "critical", script.server.inode)
    assert facts["count"] == after.counters["TcpOutRsts"] - before.counters["TcpOutRsts"] == 12
    assert (facts["laddr"], facts["lport"], facts["listens"]) == (script.server.ipv4, PORT, ["127.0.0.1"])
    assert (facts["comm"], facts["pids"]) == ("api", [server.pid])
    assert facts["clients"] == {script.client.ipv4: 12}
    assert f"api (PID {server.pid}" in finding["who"]
    (listen,) = finding["remedies"]
    assert (listen["present"], listen["proposed"]) == ("127.0.0.1", "0.0.0.0")


@pytest.mark.parametrize("fallback", [False, True])
@recorded(DIAGNOSE)
def test_a_client_of_the_same_host_and_the_other_loopback_address(script: Script, fallback: bool) -> Test:
    """Configured for 127.0.0.1 none of its connects succeeds. Configured for localhost each does, at `::1`."""
    with script.older():
        server = script.server.process("api")
        listener = server.listener(NAMED, "::1", backlog=64)
    client = script.server.process("web")
    for _ in range(12):
        fail(client, "127.0.0.1", NAMED, 1)
        if fallback:
            client.socket("6").connect("::1", NAMED)
            listener.accept()
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)  # and not what the client sees of it
    facts = finding["facts"]
    assert (finding["rule"], facts["count"], facts["laddr"]) == ("wrong_address", 12, "127.0.0.1")
    assert facts["listens"] == ["::1"]
    assert finding["severity"] == ("info" if fallback else "critical")
    assert ("localhost" in finding["why"]) == fallback
    (listen,) = finding["remedies"]
    assert (listen["present"], listen["proposed"], listen["risk"]) == ("::1", "127.0.0.1", None)


@recorded(DIAGNOSE)
def test_a_port_scan_is_no_fault(script: Script) -> Test:
    with script.older():
        server = script.server.process("api")
        server.listener(SCANNED, "127.0.0.1")
    client = script.client.process("scanner")
    for port in range(SCANNED - 6, SCANNED + 6):
        fail(client, script.server.ipv4, port, 1)
    script.stay()
    seen = yield
    (finding,) = found(seen, script.client, script.server)
    assert (finding["rule"], finding["severity"], finding["facts"]["count"]) == ("connects_fail", "info", 12)
    assert "refused at 12 ports" in finding["title"]


def listening(laddr: str, since_ns: int = 0, began: float = 0.0) -> History:
    listener: Listener = at(0, 0, 0, 0, laddr=laddr, lport=80, netns=NETNS, since_ns=since_ns)
    return History(listener, listener, began=began)


def refused_by(laddr: str, raddr: str) -> Any:
    return of(netns=NETNS, laddr=laddr, lport=80, raddr=raddr, direction="SENT", cause="NO_LISTENER")


def findings(
    *counts: int,
    listens: str = "127.0.0.1",
    laddr: str = THERE,
    raddr: str = OTHER,
    connects: Any = None,
    **how: Any,
) -> list[Finding]:
    given = {"resets": groups({refused_by(laddr, raddr): times(*counts)})} | (
        {"attempts": groups(connects)} if connects else {}
    )
    return check(rule, queues=SimpleNamespace(histories={1: listening(listens, **how)}), **given)


def severities(*counts: int, **how: Any) -> list[str]:
    return [each.severity for each in findings(*counts, **how)]


@pytest.mark.parametrize(
    ("counts", "peer", "expected"),
    [
        ((9,), OTHER, []),
        ((10,), OTHER, ["critical"]),
        ((2,), THERE, []),  # a client on the same host
        ((3,), THERE, ["critical"]),
        ((1,) * 12, OTHER, ["info"]),  # a health check
    ],
)
def test_ten_of_one_peer(counts: tuple[int, ...], peer: str, expected: list[str]) -> None:
    assert severities(*counts, raddr=peer) == expected


def test_a_listener_that_came_later_was_only_restarted() -> None:
    assert severities(20, since_ns=1, began=105.0) == []
    assert severities(20, 0, 0, 0, 0, 0, 0, 0, 20, since_ns=1, began=105.0) == ["critical"]
    assert severities(20, listens=THERE) == []


def connects(
    refused_at: str, number: int, at: str, connected: int = 20, comm: str = "other", **columns: Any
) -> dict[Any, Tally]:
    """Of one program, and 20 of another one that falls back."""
    return {
        attempt("REFUSED", "ECONNREFUSED", laddr=refused_at, raddr=refused_at): times(20),
        attempt("REFUSED", "ECONNREFUSED", laddr=refused_at, raddr=refused_at, comm=comm): times(number),
        attempt("ESTABLISHED", laddr=at, raddr=at): times(20),
        attempt("ESTABLISHED", **{"laddr": at, "raddr": at, "comm": comm} | columns): times(connected),
    }


@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "critical"),  # not known
        (connects("::1", 20, "127.0.0.1"), "info"),
        (connects("::1", 20, "127.0.0.1", 18), "info"),
        (connects("::1", 20, "127.0.0.1", 17), "critical"),
        (connects("::1", 20, "127.0.0.1", comm="client"), "info"),
        (connects("::1", 20, "127.0.0.1", netns=NETNS + 1), "critical"),
        (connects("::1", 20, "127.0.0.1", rport=81), "critical"),
        (connects("::1", 20, "127.0.0.1", raddr=OTHER), "critical"),
        (connects("::1", 20, "::1"), "critical"),
        (connects("127.0.0.1", 20, "::1"), "critical"),  # others are refused at ::1
    ],
)
def test_a_program_that_tries_both_ip_versions_is_for_information(listens: str, given: Any, expected: str) -> None:
    assert severities(40, listens=listens, laddr="::1", raddr="::1", connects=given) == [expected]
    assert severities(40, listens=listens, laddr="2001:db8::2", raddr="2001:db8::1", connects=given) == ["critical"]


@pytest.mark.parametrize(
    ("came", "columns", "expected"),
    [
        (THERE, {}, "warning"),
        (THERE, {"netns": NETNS + 1}, "warning"),
        ("127.0.0.1", {}, "warning"),
        ("127.0.0.1", {"netns": NETNS + 1}, "info"),
        (THERE, {"raddr": OTHER}, "info"),
        (THERE, {"rport": 81}, "info"),
    ],
)
def test_a_server_that_has_left_an_address_is_more_than_a_health_check(
    came: str, columns: dict[str, Any], expected: str
) -> None:
    """It was restarted, with another address in its configuration."""
    ends = {"raddr": came} | columns
    connects = {
        attempt("REFUSED", "ECONNREFUSED", **ends): times(0, *[1] * 12),
        attempt("ESTABLISHED", **ends): times(1),
    }
    given = {"resets": groups({refused_by(came, OTHER): times(*[1] * 12)}), "attempts": groups(connects)}
    queues = SimpleNamespace(histories={1: listening("127.0.0.53")})
    (client,) = check(connects_fail.rule, sockets=sockets(), **given)  # it is asked first
    (finding,) = check(rule, queues=queues, **given)
    assert (client.severity, finding.severity) == ("warning", expected)
    del given["attempts"]
    (finding,) = check(rule, queues=queues, **given)
    assert finding.severity == "info"


def test_another_loopback_address_of_the_same_ip_version() -> None:
    """A stub resolver is at 127.0.0.53, as systemd-resolved is."""
    given = connects("127.0.0.1", 20, "127.0.0.53")
    (finding,) = findings(40, listens="127.0.0.53", laddr="127.0.0.1", raddr="127.0.0.1", connects=given)
    assert finding.severity == "critical"


@pytest.mark.parametrize(
    ("laddr", "proposed"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), (THERE, "0.0.0.0"), ("2001:db8::2", "::")]
)
def test_a_service_is_not_exposed_for_loopback(laddr: str, proposed: str) -> None:
    (finding,) = findings(20, listens="127.0.0.53", laddr=laddr, raddr=laddr)
    (listen,) = finding.remedies
    assert listen.proposed == proposed
    assert (listen.risk is None) == ("at all addresses" not in listen.what) == (laddr == proposed)
