"""Clients that come to an address at which a port does not listen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules.wrong_address import rule
from tcpscope.listeners import Listener
from tests.diagnose.rules.connecting import NETNS, OTHER, THERE, check, found, groups, of, times
from tests.diagnose.rules.test_connects_fail import fail
from tests.record import Script, Test, recorded
from tests.test_sampling import at
from tests.tools.queue.refusals import DIAGNOSE

PORT, SCANNED = 9301, 9310


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


def severities(*counts: int, listens: str = "127.0.0.1", laddr: str = THERE, raddr: str = OTHER, **how: Any) -> Any:
    refused = of(netns=NETNS, laddr=laddr, lport=80, raddr=raddr, direction="SENT", cause="NO_LISTENER")
    queues = SimpleNamespace(histories={1: listening(listens, **how)})
    return [each.severity for each in check(rule, resets=groups({refused: times(*counts)}), queues=queues)]


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


@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0"])
def test_ipv6_loopback_before_ipv4_is_for_information(listens: str) -> None:
    assert severities(20, listens=listens, laddr="::1", raddr="::1") == ["info"]
    assert severities(20, listens=listens, laddr="2001:db8::2", raddr="2001:db8::1") == ["critical"]
