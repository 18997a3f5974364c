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


def test_after_the_first_snapshot_only_pools_that_are_near_their_end() -> None:
    asked = []

    class InUse:
        least = 0.0

        def poll(self) -> list[Any]:
            asked.append(self.least)
            row = SimpleNamespace(netns=1, family=4, laddr="a", raddr="b", rport=len(asked), used=1, failed=0)
            return [SimpleNamespace(kind="snapshot", round=len(asked), rows=[row])]

    source = Pools.__new__(Pools)
    source.run, source._next_s, source._round = InUse(), 0.0, None  # type: ignore[assignment]
    source.failed = {}
    for _ in range(2):
        source._take(source.run.poll())
    assert asked == [0.0, pools.NEAR]
    assert [key[-1] for key in source.first] == [1]
    assert [row.rport for row in source.now] == [2]
