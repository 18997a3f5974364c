"""The one loop of all tools: batches that are given here, so that what must come out is known."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import tcpscope
from tcpscope import run as running
from tcpscope.output import Column
from tcpscope.request import Request
from tcpscope.run import NOTHING, Batch, Run, Ticker, whole
from tcpscope.session import Stats
from tcpscope.stop import Stop
from tcpscope.tool import find, names


class Given(Run):
    """Gives these batches, a list at each poll, and `last` at the end. Its stop comes with the last poll."""

    def __init__(self, *polls: list[Batch], last: list[Batch] | None = None, counted: bool = True) -> None:
        super().__init__([Column("n")])
        self.polls, self.last, self.counted = list(polls), last or [], counted
        self.stop = Stop()

    def poll(self) -> Iterator[Batch]:
        batches = self.polls.pop(0)
        for batch in batches:
            self.stats.seen += len(batch.rows)
            self.stats.shown += len(batch.rows)
            yield batch
        if not self.polls:
            self.stop.stop()

    def end(self) -> Iterator[Batch]:
        for batch in self.last:
            self.stats.seen += len(batch.rows)
            self.stats.shown += len(batch.rows)
            yield batch

    @property
    def pause(self) -> float:
        return 0

    def given(self, most: int | None = None) -> list[tuple[str, list[int]]]:
        batches = list(self.batches(self.stop, most))
        self.stop.close()
        return [(batch.kind, list(batch.rows)) for batch in batches if batch is not NOTHING]


def events(*rows: int) -> Batch:
    return Batch("event", rows)


def test_all_batches_and_what_is_left() -> None:
    run = Given([events(1), events(2)], [], [events(3)], last=[events(4)])
    assert run.given() == [("event", [1]), ("event", [2]), ("event", [3]), ("event", [4])]


def test_time_passes_after_each_poll() -> None:
    run = Given([events(1)], [], [events(2)])
    assert [batch is NOTHING for batch in run.batches(run.stop)] == [False, True, True, False, True]


def test_one_look_at_least() -> None:
    run = Given([events(1)])
    run.stop.stop()
    assert run.given() == [("event", [1])]


def test_it_may_end_by_itself() -> None:
    run = Given([events(1)], [events(2)])
    run.done = True
    assert run.given() == [("event", [1])]


def test_a_stream_ends_after_so_many_rows() -> None:
    """What comes after the last one was seen, and was not asked for."""
    run = Given([events(1, 2), events(3, 4), events(5)], [events(6)], last=[events(7, 8)])
    assert [row for _, rows in run.given(most=3) for row in rows] == [1, 2, 3]
    assert run.polls == [[events(6)]]
    assert run.stats == Stats(seen=6, shown=3, filtered=3)


@pytest.mark.parametrize("kind", ["snapshot", "interval", "total"])
def test_of_everything_else_so_many_each_time(kind: str) -> None:
    """A round may come in several batches."""
    first = [Batch(kind, [1, 2], 1), Batch(kind, [3, 4], 1)]
    run = Given(first, [Batch(kind, [5], 2)], last=[Batch(kind, [6, 7, 8, 9], 3)], counted=False)
    assert [rows for _, rows in run.given(most=3)] == [[1, 2], [3], [5], [6, 7, 8]]
    assert run.stats == Stats(seen=9, shown=9)  # rows that are made of the events are not what is counted


def test_what_has_ended_or_was_closed_gives_nothing_more() -> None:
    run = Given([events(1)], [events(2)], last=[events(3)])
    run.done = True
    assert [list(batch.rows) for batch in run.batches(run.stop)] == [[1], [], [3]]
    assert list(run.batches(run.stop)) == []
    run = Given([events(1)], [events(2)], last=[events(3)])
    batches = run.batches(run.stop)
    assert next(batches) == events(1)
    run.close()
    assert list(batches) == [NOTHING]


def test_a_signal_ends_a_long_snapshot() -> None:
    run = Given([Batch("snapshot", [1], 1), Batch("snapshot", [2], 1)])
    batches = run.batches(run.stop)
    assert next(batches).rows == [1]
    run.stop.stop()
    assert [list(batch.rows) for batch in batches] == [[]]


def test_a_ticker_counts_from_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: clock.now))
    ticker, at_once, never = Ticker(2.0), Ticker(2.0, at_once=True), Ticker(None)
    due = []
    for clock.now in (110.0, 111.0, 112.0, 113.5, 114.0, 121.0, 121.5, 122.0):
        due.append((ticker.due(), at_once.due(), never.due()))
    assert [first for first, _, _ in due] == [False, False, True, False, True, True, False, False]
    assert [second for _, second, _ in due] == [True, False, True, False, True, True, False, False]
    assert not any(third for _, _, third in due)
    assert (ticker.remaining, never.remaining) == (1.0, running.FOREVER)


@pytest.mark.root
@pytest.mark.parametrize("name", names())
def test_every_tool_from_python(name: str) -> None:
    """Rows have the columns that the tool says it has."""
    tool = find(name)
    request = Request(options={option.name: option.unset for option in tool.options})
    chosen = tuple(column.name for column in tool.columns(request)[:3])
    seconds = 2.5 if name in ("cong", "retrans") else 1  # a SYN is sent again after a second
    asked = ({"interval": 0.1} if name == "rtt" else {}) | ({} if tool.once else {"duration": seconds})
    with (
        contextlib.ExitStack() as stack,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("127.0.0.1", 0), backlog=0) as full,
        tcpscope.open(name, columns=chosen, **asked) as rows,
    ):
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        refused, nobody = (stack.enter_context(socket.socket()) for _ in range(2))
        nobody.bind(("127.0.0.1", 0))
        assert refused.connect_ex(nobody.getsockname()) == errno.ECONNREFUSED
        client = socket.create_connection(listener.getsockname())
        child, _ = listener.accept()
        client.send(b"x")
        child.recv(1)
        for end in (client, child):
            end.close()
        found = list(rows)
        stats = rows.stats
    assert stats.seen == stats.shown + stats.filtered + stats.limited + stats.lost
    assert found
    assert all(row.__struct_fields__ == chosen for row in found)


def test_batches_of_one_round_as_one() -> None:
    given = [
        NOTHING,
        Batch("snapshot", [1], 1),
        Batch("snapshot", [2, 3], 1),
        NOTHING,
        Batch("snapshot", [4], 2),
        Batch("snapshot", [5], 3),
        Batch("total", [6], 3),
        Batch("event", [7]),
        Batch("event", [8]),
        Batch("total", [9], 4),
    ]
    assert [(batch.kind, batch.rows) for batch in whole(iter(given)) if batch.rows] == [
        ("snapshot", [1, 2, 3]),
        ("snapshot", [4]),
        ("snapshot", [5]),
        ("total", [6]),
        ("event", [7]),
        ("event", [8]),
        ("total", [9]),
    ]
