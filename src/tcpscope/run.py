"""A running tool. It yields batches of rows, and does not know its reader.

A reader calls `batches()`, the one loop of all tools. Or it calls `poll()` now and then, and `end()` once at the end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from tcpscope.output import Column
from tcpscope.schema import Decoder
from tcpscope.session import POLL_SECONDS, Session, Stats
from tcpscope.stop import Stop

FOREVER = 1e6
"""Seconds to wait, if only a descriptor or a stop can end the wait."""


@dataclass(frozen=True)
class Batch:
    """Rows: structs whose attributes are the run's columns.

    event     each row is something that happened
    snapshot  each row is something that exists
    interval  each row is a group, over the last interval
    total     each row is a group, over the whole run

    A snapshot, interval or total may come in several batches. They have the same `round`. `times_ns` are those of the
    first and the last event of each group that the kernel counts; (0, 0) of others.
    """

    kind: Literal["event", "snapshot", "interval", "total"]
    rows: Sequence[Any]
    round: int = 0
    times_ns: Sequence[tuple[int, int]] = ()


NOTHING = Batch("event", ())
"""An empty batch: time has passed."""


class Run(ABC):
    """From `with tool.open(request) as run` until its end.

    columns   the columns of its rows, in their order
    sessions  its probes in the kernel
    stats     its own part of the account
    keep      capabilities that it needs while it runs
    notes     lines for the user; the reader prints and removes them
    more      the option that helps against loss if it is larger
    accounts  it counts events, so an account is printed at its end
    counted   the account counts its rows; else it counts what the rows are made of
    done      it ends by itself, after the next poll
    waits     it has batches at its end only
    over      it has ended or was closed; there are no more batches
    important columns that a narrow terminal shows, the most important first; empty: those of the tool
    repeats   what a row of its snapshots is ("listener"), if a snapshot replaces the previous one on a terminal
    reached   which row came to the limit of --warn, in words; then the command line ends with status 6. Empty: none
    buffer_bytes  kernel memory of buffers that belong to no map
    """

    keep: tuple[str, ...] = ()
    more = "--buffer"
    accounts = True
    counted = False
    done = waits = over = False
    important: tuple[str, ...] = ()
    repeats = ""
    buffer_bytes = 0
    reached = ""

    def __init__(self, columns: Sequence[Column], *sessions: Session) -> None:
        self.columns = tuple(columns)
        self.sessions = sessions
        self.notes = list(dict.fromkeys(note for session in sessions for note in session.notes))
        self.stats = sessions[0].stats if sessions else Stats()

    @abstractmethod
    def poll(self) -> Iterator[Batch]:
        """New batches. Never waits. The reader may stop after any batch, and gets no batch twice."""

    @abstractmethod
    def end(self) -> Iterator[Batch]:
        """Detach, and yield the last batches. The account is final after that."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors that are readable when there is something new."""
        return ()

    @property
    def pause(self) -> float:
        """Seconds until the next poll, if no descriptor is readable before."""
        return POLL_SECONDS

    def not_taken(self, rows: int) -> None:
        """So many rows were not written after all."""
        if self.counted:
            self.stats.shown -= rows
            self.stats.lost += rows

    def account(self) -> Stats:
        """Exact after the end: seen == shown + filtered + limited + lost."""
        return sum((session.account() for session in self.sessions), Stats())

    def batches(self, stop: Stop, most: int | None = None) -> Iterator[Batch]:
        """Poll until `stop`, at least once. Yields `NOTHING` each time before it waits.

        `most` limits the rows. A run of events ends after so many. Of other batches, each round has only the first.
        """
        limited = _Limit(self, most)
        while not self.over:
            for batch in self.poll():
                yield limited(batch)
                if stop or limited.reached or self.over:
                    break
            yield NOTHING
            if self.over:
                return
            if stop or self.done or limited.reached:
                self.over = True
                yield from map(limited, self.end())
                if self.account().table_full:
                    self.notes += dict.fromkeys(why for session in self.sessions for why in session.why_full)
                return
            stop.wait(self.pause, *self.descriptors)

    def close(self) -> None:
        """Detach. May be called twice."""
        self.over = True
        for session in self.sessions:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def whole(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, those of one round as one."""
    held: Batch | None = None
    for batch in batches:
        if held and (batch.kind, batch.round) == (held.kind, held.round):
            times_ns = [*held.times_ns, *batch.times_ns]
            held = Batch(held.kind, [*held.rows, *batch.rows], held.round, times_ns)
            continue
        if held:
            yield held
        held = None if batch.kind == "event" else batch
        if not held:
            yield batch
    if held:
        yield held


class _Limit:
    def __init__(self, run: Run, most: int | None) -> None:
        self._run, self._most = run, most
        self._round: tuple[str, int] = ("", 0)
        self._given = 0
        self.reached = False

    def __call__(self, batch: Batch) -> Batch:
        if self._most is None:
            return batch
        if (batch.kind, batch.round) != self._round:
            self._round, self._given = (batch.kind, batch.round), 0
        rows = batch.rows[: self._most - self._given]
        self._given += len(rows)
        self.reached = self.reached or (batch.kind == "event" and self._given == self._most)
        if self._run.counted:
            self._run.stats.shown -= len(batch.rows) - len(rows)
            self._run.stats.filtered += len(batch.rows) - len(rows)
        return Batch(batch.kind, rows, batch.round, batch.times_ns[: len(rows)])


class Streaming(Run):
    """The events of a session, decoded.

    after  a function that changes the rows of each batch
    """

    counted = True

    def __init__(
        self, session: Session, decoder: Decoder, after: Callable[[list[Any]], list[Any]] | None = None, rate: int = 0
    ) -> None:
        super().__init__([Column.of(field) for field in decoder.fields], session)
        self._session, self._after = session, after
        self._decode = decoder.rows
        self._over = OverRate(rate, self.notes)

    def poll(self) -> Iterator[Batch]:
        self._session.release_held()
        yield from map(self._batch, self._session.batches())
        self._over.say(self._session.counters)

    def end(self) -> Iterator[Batch]:
        self._session.end()
        yield from map(self._batch, self._session.batches())
        self._over.say(self._session.counters, at_once=True)

    def _batch(self, records: memoryview) -> Batch:
        rows = self._decode(records)
        self.stats.shown += len(rows)
        return Batch("event", self._after(rows) if self._after else rows)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._session.descriptors


class Ticker:
    """Due every `seconds`, counted from the first call of `due()`; with `at_once` also at that call. None: never."""

    def __init__(self, seconds: float | None, at_once: bool = False) -> None:
        self._seconds, self._at_once = seconds, at_once
        self._next: float | None = None

    def due(self) -> bool:
        if self._seconds is None:
            return False
        now = time.monotonic()
        if self._next is None:
            self._next = now + self._seconds
            return self._at_once
        if now < self._next:
            return False
        self._next += self._seconds
        if self._next <= now:  # fallen behind
            self._next = now + self._seconds
        return True

    @property
    def remaining(self) -> float:
        """Seconds until it is due again."""
        return FOREVER if self._next is None else max(0.0, self._next - time.monotonic())


class OverRate:
    """Says in the notes how many rows were over --rate, at most once a second."""

    def __init__(self, rate: int, notes: list[str]) -> None:
        self._rate, self._notes, self._second = rate, notes, Ticker(1.0 if rate else None)
        self._before, self._unread, self._said = 0, 0, ""

    def say(self, counters: Callable[[], Mapping[str, int]], at_once: bool = False) -> None:
        """`counters` returns how many there are by now, as `limited`."""
        if not (self._second.due() or at_once):
            return
        limited = counters()["limited"]
        more, self._before = limited - self._before, limited
        if not more:
            return
        if self._said in self._notes:  # the reader has not taken it: one line, not one for each second
            self._notes.remove(self._said)
            more += self._unread
        self._said, self._unread = f"{more:,} more rows, over --rate {self._rate}", more
        self._notes.append(self._said)
