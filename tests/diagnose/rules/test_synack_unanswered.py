"""The rule about SYN-ACKs that nobody answers: lost answers of one peer, and floods of many."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tcpscope.diagnose import Finding
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules import synack_unanswered
from tcpscope.diagnose.tallies import Tally
from tests.record import Script, Test, recorded
from tests.test_sampling import at
from tests.tools.queue.refusals import BACKLOG, DIAGNOSE, Run, findings

SYNS = 64
HANDSHAKES = 6
HELD = BACKLOG + 1
"""The SYN queue holds one more than its limit, which is the backlog."""
SYN_ACKS = 2
"""Sent again: after 1 and 3 s. In a flood there are no more: the kernel gives up requests sooner while their queue is
full."""
GROUPS_US = 4_000_000
"""Until diagnose has read the counts, which may be late there, too."""


@recorded(DIAGNOSE)
def test_answers_of_one_peer_are_lost(script: Script) -> Test:
    with script.older():
        run = Run(script, backlog=64)
    before = script.server.counter("TcpRetransSegs")
    with script.server.losing():
        for number in range(HANDSHAKES):
            script.client.segment(script.client.ipv4, 10_000 + number, *run.target)
        script.server.until_counter("TcpRetransSegs", before + SYN_ACKS * HANDSHAKES)
        script.server.sysctl("tcp_synack_retries", 0)  # not once more
        run.client.pause(GROUPS_US)
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["kind"]) == ("synack_unanswered", "critical", "lost")
    assert (facts["count"], facts["peers"], facts["raddr"]) == (HANDSHAKES, 1, run.peer.ipv4)
    assert facts["synacks_again"] == run.after.counters["TcpRetransSegs"] - before.ret
    assert (facts["laddr"], facts["lport"], facts["pid"]) == (*run.target, run.owner.pid)
    assert str(run.owner.pid) in finding["who"]
    (remedy,) = finding["remedies"]
    assert remedy["command"].endswith(f"ip route get {run.peer.ipv4} from {run.host.ipv4}")
    assert remedy["command"].startswith(f"nsenter -t {run.owner.pid} -n ")


@pytest.mark.parametrize("syncookies", [0, 1])
@recorded(DIAGNOSE)
def test_a_flood_explains_the_full_queue(script: Script, syncookies: int) -> Test:
    with script.older():
        script.server.sysctl("tcp_syncookies", syncookies)
        script.server.sysctl("tcp_max_syn_backlog", 256)
        run = Run(script)
    before = script.server.counter("TcpRetransSegs")
    run.flood(SYNS)
    script.server.until_counter("TcpRetransSegs", before + SYN_ACKS * HELD)
    script.server.sysctl("tcp_synack_retries", 0)
    run.client.pause(GROUPS_US)
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    facts = finding["facts"]
    assert (finding["rule"], facts["kind"]) == ("synack_unanswered", "flood")
    assert finding["severity"] == ("warning" if syncookies else "critical")
    assert facts["count"] == facts["peers"] == HELD
    assert 0 < facts["syns_per_s"] <= SYNS
    assert finding["title"].endswith(f"never answer, {facts['syns_per_s']:.3g} SYNs a second")
    assert facts["dropped"] == run.change("TCPReqQFullDrop")
    assert facts["cookies"] == run.change("TCPReqQFullDoCookies")
    assert facts["dropped"] + facts["cookies"] == SYNS - HELD
    assert str(run.owner.pid) in finding["who"]
    assert [remedy["name"] for remedy in finding["remedies"]] == [None if syncookies else "net.ipv4.tcp_syncookies"]


class Group(NamedTuple):
    raddr: str
    rport: int
    netns: int = 1
    pid: int | None = None
    comm: str | None = None
    laddr: str = "192.0.2.2"
    lport: int = 80


def findings_of(
    tallies: dict[Group, Tally], *peers: str, accepts: int | None = None, served: dict[str, float] | None = None
) -> list[Finding]:
    """What is found; `peers` have a connection to the port, and `served` when they had one."""
    rows = [
        SimpleNamespace(last=SimpleNamespace(netns=1, lport=80, raddr=raddr, state="ESTABLISHED")) for raddr in peers
    ]
    first = at(0, 0, 0, 0, laddr="192.0.2.2", lport=80, netns=1, accepts=None if accepts is None else 1000)
    history = History(first, replace(first, accepts=None if accepts is None else 1000 + accepts))
    seen: Any = SimpleNamespace(
        retrans=SimpleNamespace(where=lambda **values: tallies.items()),
        sockets=SimpleNamespace(now=rows, served={(1, 80): served or {}}),
        queues=SimpleNamespace(histories={1: history}, exact=True),
    )
    return list(synack_unanswered.rule.check(seen))


def kinds(tallies: dict[Group, Tally], *peers: str) -> list[str]:
    return [finding.facts["kind"] for finding in findings_of(tallies, *peers)]


def again(*times_s: float) -> Tally:
    tally = Tally()
    for now_s in times_s:
        tally.add(now_s, 1, between_ns=(int(now_s * 1e9),) * 2)
    return tally


@pytest.mark.parametrize(("handshakes", "found"), [(4, []), (5, ["lost"])])
def test_from_five_handshakes_of_a_peer_on(handshakes: int, found: list[str]) -> None:
    tallies = {Group("192.0.2.1", port): again(1, 3) for port in range(handshakes)}
    assert kinds(tallies) == found
    assert kinds(tallies, "192.0.2.1") == []


@pytest.mark.parametrize(("times_s", "found"), [((1,), []), ((1, 2), []), ((1, 3), ["lost"]), ((1, 1, 3), ["lost"])])
def test_two_timeouts_are_needed(times_s: tuple[float, ...], found: list[str]) -> None:
    """A client whose SYN-ACK is late sends its SYN again, and so has it sent again, too."""
    assert kinds({Group("192.0.2.1", port): again(*times_s) for port in range(9)}) == found


def test_the_rate_of_a_flood_is_that_of_its_first_syn_acks() -> None:
    tallies = {Group(f"192.0.2.{n}", 7): again(10 + n // 10, 12 + n // 10, 16 + n // 10) for n in range(60)}
    (finding,) = findings_of(tallies)
    assert finding.facts["syns_per_s"] == 12.0  # sixty in five seconds
    assert finding.title.endswith("60 addresses never answer, 12 SYNs a second")


@pytest.mark.parametrize(("peers", "found"), [(49, []), (50, ["flood"])])
def test_without_an_overflow_a_flood_is_fifty_peers(peers: int, found: list[str]) -> None:
    assert kinds({Group(f"198.51.100.{host}", 9): again(1, 3) for host in range(peers)}) == found


@pytest.mark.parametrize(("accepts", "severity"), [(None, "critical"), (0, "critical"), (1, "warning"), (9, "warning")])
def test_while_others_are_accepted_it_may_be_one_host_of_many(accepts: int | None, severity: str) -> None:
    """One broken phone behind the address of an office, whose other requests are short or idle: no look shows them."""
    tallies = {Group("192.0.2.1", port): again(1, 3) for port in range(5)}
    (finding,) = findings_of(tallies, accepts=accepts)
    assert (finding.severity, finding.facts["accepts"]) == (severity, accepts)
    some = "some handshakes from 192.0.2.1 to 192.0.2.2:80 are not completed"
    assert finding.title == (some if accepts else "handshakes from 192.0.2.1 to 192.0.2.2:80 are never completed")
    assert (f"the application accepted {accepts} connections meanwhile" in finding.observed) == bool(accepts)
    assert ("several hosts share this address" in finding.why) == bool(accepts)


@pytest.mark.parametrize(("made_s", "found"), [(0.5, 1), (1.0, 0), (9.0, 0)])
def test_a_peer_that_had_a_connection_meanwhile(made_s: float, found: int) -> None:
    tallies = {Group("192.0.2.1", port): again(1, 3) for port in range(5)}
    assert len(findings_of(tallies, accepts=7, served={"192.0.2.1": made_s, "192.0.2.9": 9.0})) == found
