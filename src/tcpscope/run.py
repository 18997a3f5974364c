"""A tool at work. It yields batches of rows, and knows nothing of who shows them.

Whoever opens a run calls `batches()`, which is the one loop of all tools, or `poll()` now and then and `end()` at last.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from tcpscope.kernel import filtering
from tcpscope.output import Column
from tcpscope.schema import Decoder
from tcpscope.session import POLL_SECONDS, Session, Stats
from tcpscope.stop import Stop

FOREVER = 1e6
"""Seconds, for who waits for a descriptor or a stop only."""


@dataclass(frozen=True)
class Batch:
    """Rows, structs whose attributes are the run's columns.

    event     each is something that happened
    snapshot  each is something that exists
    interval  what was put together since the interval before
    total     what was put together over the whole run

    `round` counts the snapshots, intervals and totals: one of them may come in several batches.
    """

    kind: Literal["event", "snapshot", "interval", "total"]
    rows: Sequence[Any]
    round: int = 0


_AT_ONCE = 64
"""Batches of a stream in one poll: they may come faster than they are read."""

NOTHING = Batch("event", ())
"""Time has passed."""


class Run(ABC):
    """From `with tool.open(request) as run` until its end.

    columns   of its rows, in their order
    sessions  the probes that it has in the kernel
    stats     its own part of the account
    keep      capabilities that it needs while it runs
    notes     what the user should know, a line each; who reads them takes them out
    more      the option of which more helps against loss
    accounts  whether it counts events, so that an account belongs at its end
    counted   whether its rows are what the account counts; else they are made of that
    done      it ends by itself, after the next poll
    over      it has ended or was closed: there are no more batches
    repeats   what its snapshots are of, when each takes the place of the one before: "listener"
    """

    keep: tuple[str, ...] = ()
    more = "--buffer"
    accounts = True
    counted = False
    done = over = False
    repeats = ""

    def __init__(self, columns: Sequence[Column], *sessions: Session) -> None:
        self.columns = tuple(columns)
        self.sessions = sessions
        self.notes = [note for session in sessions for note in session.notes]
        self.stats = sessions[0].stats if sessions else Stats()

    @abstractmethod
    def poll(self) -> Iterator[Batch]:
        """What is new. Never waits. Whoever reads it may stop after any batch; what was given is given."""

    @abstractmethod
    def end(self) -> Iterator[Batch]:
        """Detach; what is left, after which the account is final."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when there is something new."""
        return ()

    @property
    def pause(self) -> float:
        """Seconds after which to poll again, whether or not a descriptor is readable."""
        return POLL_SECONDS

    def account(self) -> Stats:
        """Exact after the end: seen == shown + filtered + lost."""
        owners = {session.owners for session in self.sessions if session.owners}
        shared = sum((each.account() for each in owners), Stats())
        return sum((session.account() for session in self.sessions), shared)

    def batches(self, stop: Stop, most: int | None = None) -> Iterator[Batch]:
        """Poll until `stop`, once at least; `NOTHING` each time before it waits.

        At most `most` rows: of events in all, and the run ends then; of everything else in each round.
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
        return Batch(batch.kind, rows, batch.round)


class Streaming(Run):
    """The events of a session, decoded.

    after  what is done to the rows of each batch
    """

    counted = True

    def __init__(
        self, session: Session, decoder: Decoder, after: Callable[[list[Any]], list[Any]] | None = None
    ) -> None:
        super().__init__([Column.of(field) for field in decoder.fields], session)
        self._session, self._after = session, after
        self._decode = decoder.rows
        self._keep = residual_filter(session)

    def poll(self) -> Iterator[Batch]:
        yield from map(self._batch, itertools.islice(self._session.batches(), _AT_ONCE))

    def end(self) -> Iterator[Batch]:
        self._session.end()
        yield from map(self._batch, self._session.batches())

    def _batch(self, records: memoryview) -> Batch:
        rows = self._decode(records)
        wanted = self._keep(records, rows) if self._keep else rows
        self.stats.shown += len(wanted)
        self.stats.filtered += len(rows) - len(wanted)
        return Batch("event", self._after(wanted) if self._after else wanted)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._session.descriptors


class Ticker:
    """Due every so many seconds from the first question on, and then too if `at_once`; without seconds never."""

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
        """Seconds until it is due."""
        return FOREVER if self._next is None else max(0.0, self._next - time.monotonic())


def residual_filter(session: Session) -> Callable[[memoryview, list[Any]], list[Any]] | None:
    """What the kernel could not decide: a function that keeps the matching rows of a batch."""
    if session.residual.is_empty:
        return None
    assert session.layout is not None
    raw = session.layout.select(("family", "laddr", "raddr", "lport", "rport")).decoder(raw=True)
    wanted = session.residual
    return lambda batch, rows: [
        row for row, r in zip(rows, raw.rows(batch), strict=True) if filtering.matches(wanted, r)
    ]
