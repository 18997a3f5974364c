"""TCP's memory, over numbers that were never read: it is one for all of the machine, and no test may take it away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tcpscope.diagnose import Finding, counters
from tcpscope.diagnose.counters import Memory
from tcpscope.diagnose.rules.memory_pressure import ABORTED, ENTERED, rule
from tests.diagnose.rules.connections import connection, track


def check(memory: Memory | None, grown: dict[str, int], *tracks: Any) -> list[Finding]:
    witness = SimpleNamespace(memory=memory, namespaces=(1, 2), grown=lambda inode, name: grown.get(name))
    evidence: Any = SimpleNamespace(counters=witness, sockets=SimpleNamespace(now=tracks))
    return list(rule.check(evidence))


LIMITS = {"low": 100, "pressure": 200, "limit": 300, "page_bytes": 4096}


def test_below_the_pressure_it_is_silent() -> None:
    full_buffers = {"TcpExtPruneCalled": 1000, "TcpExtTCPRcvQDrop": 1000, ABORTED: 3}  # orphans count as aborted, too
    assert check(Memory(200, **LIMITS), full_buffers) == []
    assert check(None, full_buffers) == []


def test_at_the_pressure_who_holds_most_is_named() -> None:
    small = track(rule, [connection(memory=50_000)])
    large = track(rule, [connection(memory=700_000, pid=0x7FFFFFFF, comm="cache", unread=600_000)])
    (finding,) = check(Memory(201, **LIMITS), {}, small, large)
    assert (finding.severity, finding.who) == ("warning", f"cache (PID {0x7FFFFFFF})")
    assert [holder["bytes"] for holder in finding.facts["holders"]] == [700_000, 50_000]
    assert finding.facts["tcp_mem"] == [100, 200, 300]
    tcp_mem = finding.remedies[-1]
    assert (tcp_mem.name, tcp_mem.present, tcp_mem.proposed) == ("net.ipv4.tcp_mem", "100 200 300", "200 400 600")


def test_aborted_connections_are_critical() -> None:
    (finding,) = check(Memory(1, **LIMITS), {ENTERED: 1, ABORTED: 4})  # it has passed
    assert (finding.severity, finding.facts["count"], finding.facts["pressures"]) == ("critical", 8, 2)


def test_the_account_is_the_kernels() -> None:
    memory = counters.memory()
    assert memory is not None
    assert 0 < memory.low <= memory.pressure <= memory.limit
    assert memory.pages >= 0
