"""Discarded packets that are worth telling: damaged ones, and how many it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope import drop_reasons
from tcpscope.diagnose import Finding
from tcpscope.diagnose.rules import drops
from tcpscope.diagnose.rules.drops import AT_LEAST, MEANINGS, rule
from tcpscope.diagnose.tallies import Tally
from tests.diagnose.rules.connections import findings
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE
from tests.tools.test_drop import has_reasons

PORT = 8320
COUNTER = "TcpInCsumErrors"


def damaged(script: Script, number: int) -> Any:
    """So many segments with a wrong checksum have come."""
    before = script.server.counter(COUNTER)
    for n in range(number):
        script.client.segment(script.client.ipv4, 42_000 + n, script.server.ipv4, PORT, wrong=1)
    script.server.until_counter(COUNTER, before + number)
    script.server.agent.pause(1_500_000)  # counts come each second
    after = script.server.counter(COUNTER)
    script.stay()
    return before, after


@recorded(DIAGNOSE)
def test_damaged_segments_are_counted(script: Script) -> Test:
    before, after = damaged(script, AT_LEAST + 5)
    seen = yield
    if not has_reasons(seen):
        assert findings(seen, script) == []
        assert any(note.startswith("drops: this kernel gives no reasons") for note in notes(seen))
        return
    (finding,) = findings(seen, script)
    assert (finding["rule"], finding["facts"]["netns"]) == ("drops", script.server.inode)
    assert finding["facts"]["count"] == after.ret - before.ret == AT_LEAST + 5
    assert finding["facts"]["peers"] == {script.client.ipv4: AT_LEAST + 5}
    assert f"counts them in {COUNTER}" in "".join(finding["observed"])
    assert "errors that the network card counts" in finding["remedies"][0]["what"]


@recorded(DIAGNOSE)
def test_a_few_are_no_finding(script: Script) -> Test:
    damaged(script, AT_LEAST - 1)
    seen = yield
    assert findings(seen, script) == []


def notes(seen: Any) -> list[str]:
    return list(seen.run(DIAGNOSE).summary["notes"])


GROUP = {
    "netns": 1, "pid": None, "comm": None, "laddr": "192.0.2.1", "lport": 80, "raddr": "192.0.2.2", "rport": 40000,
    "direction": "RECEIVED", "kind": "LOST", "reason": "TCP_CSUM", "flags": "ACK", "counter": None, "location": "f+0x1",
}  # fmt: skip


def check(*groups: tuple[dict[str, Any], int], came: int | None = None) -> list[Finding]:
    """What is found of these groups, with so many packets each; `came`: segments, as the kernel counts them."""
    tallies = []
    for values, count in groups:
        tally = Tally()
        tally.add(10.0, count)
        tallies.append((SimpleNamespace(**GROUP | values), tally))

    def where(**wanted: Any) -> list[tuple[Any, Tally]]:
        return [(g, t) for g, t in tallies if all(getattr(g, name) == value for name, value in wanted.items())]

    counters = SimpleNamespace(grown=lambda netns, name: {(1, "TcpInSegs"): came}.get((netns, name)))
    evidence: Any = SimpleNamespace(drops=SimpleNamespace(where=where), counters=counters)
    return list(rule.check(evidence))


def test_packets_of_one_reason_count_together() -> None:
    half = AT_LEAST // 2
    assert check(({"rport": 1}, half), ({"rport": 2}, AT_LEAST - half - 1)) == []
    (finding,) = check(({"rport": 1}, half), ({"rport": 2}, AT_LEAST - half))
    assert finding.facts["count"] == AT_LEAST
    assert check(({}, half), ({"reason": "IP_CSUM"}, AT_LEAST - half)) == []
    assert check(({}, half), ({"netns": 2}, AT_LEAST - half)) == []


@pytest.mark.parametrize(
    ("count", "came", "found"),
    [(10, 100_000, 1), (10, 100_001, 0), (999, 10_000_000, 0), (1000, 10_000_000, 1), (10, None, 1), (9, 10, 0)],
)
def test_one_in_ten_thousand(count: int, came: int | None, found: int) -> None:
    assert len(check(({}, count), came=came)) == found


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "HARMLESS"},
        {"kind": "REFUSED"},
        {"reason": "NETFILTER_DROP"},
        {"reason": "NO_SOCKET"},
        {"reason": "NOT_SPECIFIED"},
        {"reason": "QDISC_DROP"},
        {"netns": None},
    ],
)
def test_what_other_rules_tell_and_what_is_not_lost(other: dict[str, Any]) -> None:
    assert check((other, 1000)) == []


def test_without_a_reason_the_counter_tells() -> None:
    (finding,) = check(({"reason": None, "counter": "TcpExtPAWSEstab"}, AT_LEAST))
    assert finding.facts["reason"] == "TCP_RFC7323_PAWS"


def test_the_owner_is_named() -> None:
    (finding,) = check(({"pid": 0x7FFFFFFF, "comm": "bgpd", "reason": "TCP_MD5FAILURE"}, AT_LEAST))
    assert finding.who == f"bgpd (PID {0x7FFFFFFF})"


def test_counters_are_those_that_drop_knows() -> None:
    for reason, meaning in MEANINGS.items():
        if meaning.counter:
            assert drop_reasons.FACTS[reason].counter == meaning.counter, reason


def test_a_command_is_for_the_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drops.wording, "in_netns", lambda inode, command, pids: f"nsenter-{inode} {command}")
    found = check(*(({"reason": reason}, AT_LEAST) for reason in ("TCP_CSUM", "CPU_BACKLOG", "PROTO_MEM")))
    assert [finding.remedies[0].command for finding in found] == [
        "nsenter-1 ip -s -s link",
        # Only the first network namespace has these settings.
        "sysctl net.core.netdev_max_backlog; nsenter-1 cat /proc/net/softnet_stat",
        "nsenter-1 cat /proc/net/sockstat; sysctl net.ipv4.tcp_mem",
    ]


def test_a_looser_check_of_sources_has_a_risk() -> None:
    (finding,) = check(({"reason": "IP_RPFILTER"}, AT_LEAST))
    assert "forged" in (finding.remedies[0].risk or "")
