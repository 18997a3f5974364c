"""--rate: a flood is cut to so many rows in a second, and the account has the rest."""

from __future__ import annotations

import socket
from collections import Counter

import pytest

import tcpscope
from tcpscope import UsageError
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.run import OverRate

RATE, CONNECTS = 5, 100

pytestmark = pytest.mark.root


def test_no_second_has_more_rows() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=CONNECTS) as server:
        port = server.getsockname()[1]
        with tcpscope.open("connect", rport=port, rate=RATE, time="elapsed") as events:
            opened_s = monotonic_ns() / 1e9
            for _ in range(CONNECTS):
                socket.create_connection(("127.0.0.1", port)).close()
                server.accept()[0].close()
            closed_s = monotonic_ns() / 1e9
            events.stop()
            rows = list(events)
            account, notes = events.stats, events.notes
    seconds = int(closed_s) - int(opened_s) + 1
    assert RATE <= len(rows) <= RATE * seconds
    assert account.shown == len(rows)
    assert account.shown + account.limited == CONNECTS
    assert account.seen == account.shown + account.filtered + account.limited + account.lost
    assert account.lossless
    said = [int(note.partition(" more rows, over --rate 5")[0]) for note in notes if "--rate" in note]
    assert sum(said) == account.limited
    assert len(said) <= 1  # nobody took one: they do not pile up
    assert max(Counter(int(opened_s + row.time) for row in rows).values()) <= 2 * RATE  # the two clocks differ


def test_groups_have_no_rate() -> None:
    with pytest.raises(UsageError, match=r"--rate 5; --count prints groups"):
        tcpscope.open("retrans", count=True, rate=5)


@pytest.mark.parametrize("rate", [-1, 1.5, True, 1 << 32])
def test_a_rate_is_a_whole_number(rate: object) -> None:
    with pytest.raises(UsageError, match="--rate"):
        tcpscope.open("connect", rate=rate)  # type: ignore[call-overload]


def test_one_note_until_it_is_read() -> None:
    notes: list[str] = []
    over = OverRate(RATE, notes)
    for limited in (3, 10):
        over.say(lambda: {"limited": limited}, at_once=True)  # noqa: B023
    assert notes == ["10 more rows, over --rate 5"]
    notes.clear()
    over.say(lambda: {"limited": 11}, at_once=True)
    over.say(lambda: {"limited": 11}, at_once=True)
    assert notes == ["1 more rows, over --rate 5"]
