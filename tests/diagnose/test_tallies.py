"""Counts by group, for the time that the rules look at."""

from __future__ import annotations

import errno
import socket
import time
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import tallies, text
from tcpscope.diagnose.tallies import Groups, Tally
from tcpscope.filters import Filter
from tcpscope.lab.hosts import Lab
from tcpscope.request import Request
from tcpscope.run import Batch
from tcpscope.session import Stats


def groups(**tallies: Tally) -> Groups:
    made: Any = Groups.__new__(Groups)
    group = namedtuple("group", ("raddr", "outcome"))
    made.tallies = {group(*name.split("_")): tally for name, tally in tallies.items()}
    made.ever = {}
    return made  # type: ignore[no-any-return]


def tally(*parts: tuple[float, int, int]) -> Tally:
    made = Tally()
    for part in parts:
        made.add(*part)
    return made


def test_a_tally_forgets_what_is_older() -> None:
    found = tally((10.0, 2, 20), (20.0, 3, 30), (30.0, 4, 40))
    assert (found.count, found.sum, found.first_s, found.last_s) == (9, 90, 10.0, 30.0)
    assert found.since(20.0) == 4
    found.forget(20.0)
    assert (found.count, found.sum, found.first_s, found.last_s) == (7, 70, 20.0, 30.0)


def test_a_tally_of_many_intervals_keeps_its_sum() -> None:
    found = tally(*((float(second), 1, 2) for second in range(5000)))
    assert (found.count, found.sum) == (5000, 10_000)
    found.forget(5000.0)
    assert (found.count, found.sum) == (0, 0)


def test_what_comes_in_one_look_is_one_part() -> None:
    found = tally(*((float(look), 1, look % 2) for look in range(400) for _ in range(20)))
    assert (found.count, found.sum) == (8000, 4000)
    found.forget(340.0)
    assert (found.count, found.sum, found.first_s) == (1200, 600, 340.0)


def test_numbers_of_merged_parts_stay_where_they_were() -> None:
    found = tally(*((float(second), 1, second) for second in range(700)))
    assert found.sum == sum(range(700))
    found.forget(650.0)
    assert (found.count, found.sum) == (50, sum(range(650, 700)))


def test_groups_without_room_count_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "GROUPS_AT_MOST", 2)
    found: Any = groups()
    found.run = SimpleNamespace(stats=Stats(shown=9))
    found._group, found._by, found._number = namedtuple("group", ("raddr",)), ("raddr",), None
    rows = [SimpleNamespace(raddr=raddr, count=3) for raddr in ("a", "b", "c")]
    found._take([Batch("interval", rows, times_ns=[(0, 0)] * 3)])
    assert {group.raddr: each.count for group, each in found.tallies.items()} == {"a": 3, "b": 3}
    assert (found.run.stats.shown, found.run.stats.lost) == (6, 3)


def test_groups_are_chosen_and_put_together() -> None:
    found = groups(
        a_OK=tally((1.0, 1, 0)), a_REFUSED=tally((2.0, 2, 0)), b_REFUSED=tally((3.0, 4, 0)), b_DEAD=tally((9.0, 8, 0))
    )
    assert found.total().count == 15
    assert found.total(outcome="REFUSED").count == 6
    assert found.total(outcome={"REFUSED", "DEAD"}, raddr="b").count == 12
    together = found.together("raddr")
    assert {key: (each.count, each.first_s, each.last_s) for key, each in together.items()} == {
        ("a",): (3, 1.0, 2.0),
        ("b",): (12, 3.0, 9.0),
    }
    assert together is not found.together("raddr")
    assert found.total(outcome="REFUSED").count == 6  # putting together changes nothing


def test_groups_that_are_quiet_are_forgotten() -> None:
    found = groups(a_OK=tally((1.0, 1, 0)), b_OK=tally((5.0, 1, 0)))
    found.forget(3.0)
    assert [group.raddr for group in found.tallies] == ["b"]


def test_what_is_forgotten_is_still_in_the_count_of_the_whole_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: Any = groups()
    attempts._group, attempts._number = namedtuple("group", ("raddr", "outcome")), None
    attempts._by = attempts._group._fields
    now_s = 100.0
    monkeypatch.setattr(tallies.time, "monotonic", lambda: now_s)
    for outcome in ("ESTABLISHED", "REFUSED", "GAVE_UP"):
        attempts._take([Batch("interval", [SimpleNamespace(raddr="a", outcome=outcome, count=3)], times_ns=[(0, 0)])])
        now_s += 100.0
        attempts.forget(now_s - 60.0)
    assert attempts.tallies == {}
    seen: Any = SimpleNamespace(attempts=attempts)
    counted = text.counts(seen)
    assert (counted["connects"], counted["connects_failed"], counted["connects_given_up"]) == (9, 3, 3)


@pytest.mark.parametrize(
    ("intervals", "apart"),
    [
        ([(1.0, 1.0), (2.2, 2.2)], False),
        ([(1.0, 1.0), (2.6, 2.6)], True),
        ([(1.0, 2.6)], True),  # of two intervals that were read as one
        ([(1.0, 1.0)], False),
    ],
)
def test_how_far_two_times_are_apart_says_the_kernel(intervals: list[tuple[float, float]], apart: bool) -> None:
    made = Tally()
    for number, (first_s, last_s) in enumerate(intervals):
        made.add(100.0 + number, 1, between_ns=(int(first_s * 1e9), int(last_s * 1e9)))
    assert made.is_apart(1.5) == apart
    made.add(200.0, 1, between_ns=(int(9e9), int(9e9)))
    made.forget(200.0)
    assert not made.is_apart(1.5)


def test_the_kernels_times_of_several_tallies() -> None:
    total = Tally()
    for at_s in (5, 3, 4):
        one = Tally()
        one.add(100.0, 1, between_ns=(at_s * 10**9, (at_s + 1) * 10**9))
        total.merge(one)
    assert total.between_ns == (3 * 10**9, 6 * 10**9)


@pytest.mark.root
def test_the_times_are_those_of_the_kernel(lab: Lab) -> None:
    found = Groups(Request(filter=Filter(netns=(lab.client.inode,))), "connect", ("rport",))

    def refused() -> tuple[int, int]:
        with lab.client.socket(socket.AF_INET) as client:
            began_ns = time.monotonic_ns()
            assert client.connect_ex((lab.server.ipv4, 8080)) == errno.ECONNREFUSED
            return began_ns, time.monotonic_ns()

    with found.run:
        times = refused(), refused(), refused()
        found.end()
    (tally,) = found.tallies.values()
    assert tally.count == 3
    for (began_ns, ended_ns), at_ns in zip((times[0], times[-1]), tally.between_ns, strict=True):
        assert began_ns <= at_ns <= ended_ns
