"""Snapshots of local ports come each second, or less often where they are costly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import pools
from tcpscope.diagnose.pools import Pools


class Time:
    """Of both clocks; a snapshot takes `cost_s` of them."""

    def __init__(self, cost_s: float) -> None:
        self.now_s, self.cost_s = 100.0, cost_s
        self.snapshots = 0

    def monotonic(self) -> float:
        return self.now_s

    thread_time = monotonic

    def poll(self) -> list[Any]:
        self.now_s += self.cost_s
        self.snapshots += 1
        return []


@pytest.mark.parametrize(("cost_s", "snapshots"), [(0.0, 100), (0.005, 100), (0.1, 20)])
def test_they_take_a_hundredth_and_come_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, cost_s: float, snapshots: int
) -> None:
    time = Time(cost_s)
    monkeypatch.setattr(pools, "time", time)
    source = Pools.__new__(Pools)
    source.run, source._next_s = SimpleNamespace(poll=time.poll), 0.0  # type: ignore[assignment]
    while time.now_s < 200.0:
        source.poll()
        time.now_s += 1.0
    assert time.snapshots == pytest.approx(snapshots, abs=1)


def test_what_a_pool_used_in_the_first_snapshot() -> None:
    """Of those that are near their end, now or later."""
    source = Pools.__new__(Pools)
    source.first, source.failed, source._round = {}, {}, -1
    for round_, used_first in ((1, 5), (2, 7)):
        row = SimpleNamespace(netns=1, family=4, laddr="a", raddr="b", rport=round_, used=9, failed=0)
        source.run = SimpleNamespace(pools=[SimpleNamespace(used_first=used_first)])  # type: ignore[assignment]
        source._take([SimpleNamespace(kind="snapshot", round=round_, rows=[row])])  # type: ignore[list-item]
    assert [(key[-1], first.used) for key, first in source.first.items()] == [(1, 5), (2, 7)]
    assert [row.rport for row in source.now] == [2]
    assert not source.is_full


@pytest.mark.parametrize("failed", [0, 3])
def test_a_pool_without_room_is_told(monkeypatch: pytest.MonkeyPatch, failed: int) -> None:
    monkeypatch.setattr(pools, "_POOLS_AT_MOST", 2)
    source = Pools.__new__(Pools)
    source.first, source.failed, source.at_failure, source._round = {}, {}, {}, -1
    source.run = SimpleNamespace(pools=[SimpleNamespace(used_first=5)])  # type: ignore[assignment]
    for rport, full in ((1, False), (2, False), (1, False), (3, True)):
        row = SimpleNamespace(netns=1, family=4, laddr="a", raddr="b", rport=rport, used=9, failed=failed)
        row.errno, row.failed_pid, row.failed_comm = "EADDRNOTAVAIL", 7, "app"
        source._take([SimpleNamespace(kind="snapshot", round=1, rows=[row])])  # type: ignore[list-item]
        assert bool(list(source.blind_spots())) == full
    assert len(source.failed) == (2 if failed else 0)
