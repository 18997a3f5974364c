"""Each byte counts once, in whatever order the events of looks and of ends come."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import count, permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tcpscope import traffic
from tcpscope.errors import UsageError
from tcpscope.kernel.spec import Spec
from tcpscope.limits import LEAST_US, UNKNOWN, Chronograph
from tcpscope.output import Column
from tcpscope.request import Request
from tcpscope.session import Session, Stats
from tcpscope.traffic import NOTHING_MOVED, Counting, Interval, Moved, sorted_by

SPEC = Spec.of("traffic")
LAYOUT = SPEC.layout("traffic", internal=True)


def event(now: Moved, told: Moved = NOTHING_MOVED, socket: int = 1, **more: int) -> bytes:
    """A record of the ring."""
    record = bytearray(LAYOUT.size)
    values = dict(zip(traffic.BYTES, now, strict=True)) | told._asdict() | {"socket": socket, "opened_ns": 7} | more
    for field in LAYOUT.fields:
        if field.name in values:
            struct.pack_into(f"<{field.format}", record, field.offset, values[field.name])
    return bytes(record)


class Adding(Counting):
    def __init__(self, *rounds: Sequence[bytes]) -> None:
        """A run that gets these events, those of a round with each look."""
        batches: Iterator[Sequence[bytes]] = iter([*rounds, *[()] * 9])
        session = SimpleNamespace(
            spec=SPEC,
            notes=[],
            stats=Stats(),
            loaded=SimpleNamespace(run=lambda hook: None, memory=lambda name: bytearray(1)),
            batches=lambda: [memoryview(b"".join(found))] if (found := next(batches)) else [],
            end=lambda: None,
        )
        self.moved = Moved()
        self.firsts = 0
        self.overlaps: list[bool] = []
        super().__init__(Request(), [], None, cast(Session, session))

    def _add(self, raw: Any, row: Any, moved: Moved, first: bool, overlaps: bool) -> None:
        self.moved = self.moved.plus(moved)
        self.firsts += first
        self.overlaps.append(overlaps)

    def _ended(self, interval: Interval) -> list[dict[str, Any]]:
        return []

    def play(self, rounds: int) -> Moved:
        for _ in range(rounds):
            self._interval()
        return self.moved


def test_a_look_after_the_other() -> None:
    found = Adding([event(Moved(10, 5, 1))], [event(Moved(30, 5, 1), Moved(10, 5, 1))])
    assert found.play(2) == Moved(30, 5, 1)
    assert (found.firsts, found.stats.shown) == (2, 2)


def test_what_was_moved_before_the_tool_does_not_count() -> None:
    assert Adding([event(Moved(110, 5, 0), Moved(100, 0, 0))]).play(1) == Moved(10, 5, 0)


@pytest.mark.parametrize("end_knows", [Moved(), Moved(10, 5, 1), Moved(10, 0, 0)])
@pytest.mark.parametrize("together", [True, False])
def test_a_look_and_the_end_at_the_same_time(end_knows: Moved, together: bool) -> None:
    """The end has seen what the look has told, or not, or half of it. If it has, its event comes later."""
    look, end = event(Moved(10, 5, 1)), event(Moved(12, 5, 1), end_knows, ended=1)
    for order in permutations([look, end]):
        if end_knows and order[0] == end:
            continue
        found = Adding(order) if together else Adding(*([each] for each in order))
        assert found.play(2) == Moved(12, 5, 1)
        alone = end_knows == Moved(10, 5, 1)
        assert found.overlaps in ([False, not alone], [False])


def test_a_lost_event_is_made_up_for() -> None:
    """The kernel notes nothing as told if there was no room: the second event begins at the same number."""
    assert Adding([], [event(Moved(25, 0, 0))]).play(2) == Moved(25, 0, 0)


def test_another_connection_of_a_socket_counts_anew() -> None:
    found = Adding([event(Moved(10, 0, 0), ended=1), event(Moved(4, 0, 0), opened_ns=8)])
    assert found.play(1) == Moved(14, 0, 0)
    assert found.firsts == 2


def test_it_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it knows of connections is bounded by time, however long an interval is."""
    clock = count(0, traffic._KEPT_NS // 2)
    monkeypatch.setattr(traffic, "monotonic_ns", lambda: next(clock))
    found = Adding(*[[event(Moved(1, 0, 0), socket=number)] for number in range(8)])
    for _ in range(8):
        found._take()
        assert len(found._known) <= 6
    assert found.moved == Moved(8, 0, 0)


@pytest.mark.parametrize(
    ("name", "error"), [("tx_byte", "did you mean 'tx_bytes'"), ("raddr", "it sorts by tx_bytes, rtt")]
)
def test_sort_takes_columns_of_numbers(name: str, error: str) -> None:
    columns = [Column("tx_bytes"), Column("raddr", "address"), Column("rtt", "float")]
    assert sorted_by(Request(options={"sort": "rtt"}), columns) == "rtt"
    assert sorted_by(Request(options={"sort": "tx"}), columns) == "tx_bytes"
    assert sorted_by(Request(options={"sort": None}), columns) is None
    with pytest.raises(UsageError, match=f"--sort {name}; {error}"):
        sorted_by(Request(options={"sort": name}), columns)


def measured(**values: int) -> Any:
    defaults = {"busy_us": 0, "rwnd_us": 0, "sndbuf_us": 0, "cwnd_limited": 0, "app_limited": 0}
    return SimpleNamespace(**defaults | values)


@pytest.mark.parametrize(
    ("values", "shares"),
    [
        ({}, ("application", 100.0, 0.0, 0.0, 0.0)),
        ({"rwnd_us": 700_000}, ("rwnd", 30.0, 70.0, 0.0, 0.0)),
        ({"sndbuf_us": 600_000, "busy_us": 400_000}, ("sndbuf", 0.0, 0.0, 60.0, 0.0)),
        ({"busy_us": 900_000, "cwnd_limited": 1, "app_limited": 1}, ("cwnd", 10.0, 0.0, 0.0, 90.0)),
        ({"busy_us": 900_000, "app_limited": 1}, ("application", 100.0, 0.0, 0.0, 0.0)),
        ({"busy_us": 900_000}, (None, 10.0, 0.0, 0.0, 0.0)),
        ({"rwnd_us": 2_000_000}, ("rwnd", 0.0, 100.0, 0.0, 0.0)),
    ],
)
def test_what_limits_a_sender(values: dict[str, int], shares: tuple[Any, ...]) -> None:
    limits = Chronograph()
    limits.add(measured(**values))
    assert tuple(limits.shares(1_000_000).values()) == shares
    assert limits.shares(int(LEAST_US) - 1) == UNKNOWN
