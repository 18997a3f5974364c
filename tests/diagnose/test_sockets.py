"""What is kept of connections that a look has found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import sockets
from tcpscope.diagnose.sockets import Sockets, Track


@pytest.fixture
def found() -> Sockets:
    made = Sockets.__new__(Sockets)
    made.served, made._served, made.sent, made.twice = {}, 0, {}, {}
    return made


def row(raddr: str, opened_s: float, lport: int = 80) -> Any:
    return SimpleNamespace(netns=1, lport=lport, raddr=raddr, opened_ns=round(opened_s * 1e9))


def test_peers_that_were_served_are_forgotten_in_time(found: Sockets) -> None:
    for each in (row("192.0.2.1", 5), row("192.0.2.1", 3), row("192.0.2.2", 9), row("192.0.2.1", 1, lport=81)):
        found._serve(each)
    assert found.served == {(1, 80): {"192.0.2.1": 5.0, "192.0.2.2": 9.0}, (1, 81): {"192.0.2.1": 1.0}}
    found.forget(6.0)
    assert found.served == {(1, 80): {"192.0.2.2": 9.0}}


def test_their_number_is_bounded(found: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_PEERS_AT_MOST", 3)
    for host in range(9):
        found._serve(row(f"192.0.2.{host}", host, lport=80 + host))
    found._serve(row("192.0.2.0", 20))
    assert found.served == {
        (1, 80): {"192.0.2.0": 20.0},
        (1, 81): {"192.0.2.1": 1.0},
        (1, 82): {"192.0.2.2": 2.0},
    }
    found.forget(10.0)
    found._serve(row("192.0.2.9", 21))
    assert found.served == {(1, 80): {"192.0.2.0": 20.0, "192.0.2.9": 21.0}}
    assert found.is_full


def test_segments_of_peers_without_room_are_told(found: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_PEERS_AT_MOST", 2)
    found._last_s = found._next_s = found._first_s = 0.0
    found.looks = found.left_out = found.connections = 0
    numbers = {"data_segs_out": 5, "total_retrans": 1, "dsack_dups": 0, "reord_seen": 0}
    for host, full in ((1, False), (2, False), (1, False), (3, True)):
        each = SimpleNamespace(**vars(row(f"192.0.2.{host}", 5.0)) | numbers)
        found._add_up(Track(each, each, 6.0, 6.0), 6.0)
        assert found.is_full == full
    assert {peer[1]: (tally.count, tally.sum) for peer, tally in found.sent.items()} == {
        "192.0.2.1": (10, 2),
        "192.0.2.2": (5, 1),
    }
    assert list(found.blind_spots()) == ["only the first 2 remote addresses were counted"]


class Time:
    """Of both clocks; a look takes `cost_s` of them."""

    def __init__(self, cost_s: float) -> None:
        self.now_s, self.cost_s = 100.0, cost_s

    def monotonic(self) -> float:
        return self.now_s

    thread_time = monotonic

    def run(self, hook: str) -> None:
        self.now_s += self.cost_s


@pytest.mark.parametrize(
    ("cost_s", "seconds", "looks", "told"),
    [(0.01, 100, 100, None), (0.05, 100, 40, None), (0.25, 100, 8, "every 13 s"), (0.25, 10, 1, "every 12 s")],
)
def test_looks_take_a_fiftieth_and_rare_ones_are_told(
    found: Sockets, monkeypatch: pytest.MonkeyPatch, cost_s: float, seconds: float, looks: int, told: str | None
) -> None:
    time = Time(cost_s)
    monkeypatch.setattr(sockets, "time", time)
    loaded = SimpleNamespace(run=time.run)
    found._session = SimpleNamespace(loaded=loaded, counters=lambda: {"lost": 0})  # type: ignore[assignment]
    found.run = SimpleNamespace(poll=list)  # type: ignore[assignment]
    found._looked_at, found._moving = [200_000], [0]  # type: ignore[assignment]
    found.tracks, found.numbers = {}, {}
    found.looks = found.left_out = found._lost = found.connections = 0
    found._first_s = found._last_s = found._next_s = 0.0
    while time.now_s < 100 + seconds:
        found.poll()
        time.now_s += 0.2
    assert found.looks == pytest.approx(looks, abs=2 + looks // 5)
    notes = list(found.blind_spots())
    assert len(notes) == bool(told)
    assert all(told in note for note in notes if told)


def test_segments_are_counted_in_32_bits() -> None:
    def grown(before: int | None, now: int) -> int:
        rows = [n if n is None else SimpleNamespace(segments=n) for n in (before, now)]
        return sockets.grown("segments", *rows)

    assert (grown(None, 7), grown(5, 7), grown(7, 7)) == (7, 2, 0)
    assert grown(2**32 - 3, 4) == 7
    assert grown(900, 4) == 4  # the socket has connected again
