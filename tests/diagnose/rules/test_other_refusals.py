"""Handshakes that are refused though no queue is full: here, since the server has no route to its client."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules.other_refusals import CRITICAL, rule
from tests.diagnose.rules.connecting import check
from tests.record import Script, Test, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import DIAGNOSE, Run, findings, is_exact


@recorded(DIAGNOSE)
def test_no_route_to_the_client(script: Script) -> Test:
    with script.older():
        run = Run(script)
        script.server.exec("ip", "route", "replace", "unreachable", f"{script.client.ipv4}/32")
    before = script.server.counter("TcpExtListenDrops")
    clients = run.start(CRITICAL)
    script.server.until_counter("TcpExtListenDrops", before + CRITICAL)
    run.client.pause(3_000_000)  # the time after which a finding is told
    for made in clients:
        run.give_up(made)
    run.end()
    script.stay()
    seen = yield
    (finding,) = (each for each in findings(seen, run) if each["facts"]["netns"] == script.server.inode)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("other_refusals", "warning")  # of one client
    assert facts["count"] == run.change("ListenDrops")
    assert (facts["pids"], facts["accepts"]) == ([run.owner.pid], 0)
    assert finding["title"].startswith(f"handshakes refused on {script.server.ipv4}")
    (remedy,) = finding["remedies"]
    if is_exact(seen):
        assert remedy["command"].endswith(f"ip route get {script.client.ipv4}")


@pytest.mark.parametrize(
    ("refused", "accepts", "clients", "longest", "severity"),
    [
        (CRITICAL, 0, 2, 0, "critical"),
        (CRITICAL - 1, 0, 2, 0, "warning"),
        (CRITICAL, 1, 2, 0, "warning"),
        (CRITICAL, None, 2, 0, "warning"),
        (CRITICAL, 0, 1, 0, "warning"),  # it sends its SYN again
        (CRITICAL, 0, 2, 1, "warning"),  # somebody got through, and waits for accept()
    ],
)
def test_it_is_critical_if_nobody_gets_through(
    refused: int, accepts: int | None, clients: int, longest: int, severity: str
) -> None:
    history = History(replace(LISTENER, accepts=0), replace(LISTENER, accepts=accepts), longest_accept_queue=longest)
    history.sampled["SYN", "OTHER"] = refused
    history.peers.update(("OTHER", f"192.0.2.{host}") for host in range(clients))
    (finding,) = check(rule, queues=Seen(history))
    assert (finding.severity, finding.facts["count"]) == (severity, refused)


class Seen:
    exact = True

    def __init__(self, history: History) -> None:
        self.troubled = [history]

    def counters(self, listener: object) -> dict[str, int]:
        return {}
