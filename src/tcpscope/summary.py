"""Groups the rows of a stream: counts them (--count), or shows how a number is distributed in each group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import msgspec
from msgspec import structs

from tcpscope import groups
from tcpscope.errors import UsageError, did_you_mean
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.output import Column, histogram
from tcpscope.output.histogram import Histogram
from tcpscope.request import Request, names_in
from tcpscope.run import FOREVER, NOTHING, Batch, Run, Ticker
from tcpscope.schema import Clock
from tcpscope.session import POLL_SECONDS, Session, Stats, closed_on_error

MAX_KINDS = 65536
"""Most groups of a run, and of an interval. Rows of further groups count as lost, unless the intervals have them: a
machine in trouble makes groups without end."""

_TIME = Column("time", "time", doc="when the interval or the run ended")
_COUNT = Column("count", doc="rows")
_LARGEST = Column(
    "largest", "bool", nullable=True, doc="of the groups of this connection that with the largest 99th percentile"
)
TOTAL = Column("total", "bool", doc="over the whole run, not an interval")


@dataclass(frozen=True)
class Summary:
    """A way to group the rows of a stream, with the flag --`option`.

    by   columns whose values make a group; --by chooses others
    of   column in us whose distribution is shown; None: rows are only counted. An object whose groups are distributions
         makes it in the kernel (groups.py)
    sum  column whose sum is shown; only for objects that count in the kernel
    of_one  columns that groups of one connection share: they stand together, and the largest is marked, not drawn.
            If --by leaves one of them out, a group is not of one connection, and none is marked

    The account counts the rows of all groups, also if --max-events prints fewer groups.
    """

    option: str
    help: str
    by: tuple[str, ...]
    of: str | None = None
    sum: str | None = None
    of_one: tuple[str, ...] = ()

    def columns(self, stream: Sequence[Column], request: Request) -> tuple[Column, ...]:
        """All columns of the groups of a stream with these columns."""
        known = {column.name: column for column in stream}
        names = self._kind(request)
        for name in names:
            if name not in known:
                raise UsageError(
                    f"unknown column '{name}'", did_you_mean(name, known) or f"there are {', '.join(known)}"
                )
        # The number may be null in all rows of a group.
        distribution = [structs.replace(column, nullable=True) for column in histogram.COLUMNS[1:] if self.of]
        summed = [known[self.sum]] if self.sum and self.sum not in names else []
        marked = [_LARGEST] if self.of_one else []
        return (_TIME, *(known[name] for name in names), _COUNT, *summed, *distribution, *marked, TOTAL)

    def open(self, request: Request, available: Sequence[Column], events: Callable[[Sequence[str]], Run]) -> Run:
        """A run that yields the groups. `events` opens the stream with the columns that it gets as argument."""
        columns, names = self._chosen(request, available), self._kind(request)
        read = (*names, self.of) if self.of else names
        return _OfRows(request, columns, names, self.of, events(tuple(dict.fromkeys(read))), self.of_one)

    def open_counted(
        self,
        request: Request,
        available: Sequence[Column],
        session: Callable[[Sequence[str], str | None], Session],
        event: str,
        frame: Callable[[int], str],
    ) -> Run:
        """Groups of the struct `event` that the kernel counts.

        `session` opens the probe, with the columns to count by, and the one to sum or whose distribution is made.
        `frame` gives the name of a function's address.
        """
        columns, names = self._chosen(request, available), self._kind(request)
        with closed_on_error(session(names, self.of or self.sum)) as opened:
            return _OfKernel(request, columns, names, self.of, opened, event, frame, self.of_one)

    def _chosen(self, request: Request, available: Sequence[Column]) -> tuple[Column, ...]:
        shown = [column.name for column in available if column.kind != "distribution"]
        return request.choose(available, shown, drawn=("histogram",) if self.of and not self.of_one else ())

    def _kind(self, request: Request) -> tuple[str, ...]:
        text = request.options.get("by")
        names = self.by if text is None else names_in(text)
        if not names:
            raise UsageError("--by is empty", "give names of columns, separated by commas")
        if "time" in names:
            raise UsageError("--by has 'time'", "each row has a time of its own; --interval groups rows by time")
        return tuple(dict.fromkeys(names))


class _Grouping(Run):
    """Yields groups at each interval and at the end."""

    def __init__(
        self,
        request: Request,
        columns: Sequence[Column],
        names: Sequence[str],
        of: str | None,
        sessions: Sequence[Session],
        of_one: Sequence[str] = (),
    ) -> None:
        super().__init__(columns, *sessions)
        self._names, self._of = names, of
        self._marks = bool(of_one) and set(of_one) <= set(names)
        self._of_one = [index for index, name in enumerate(names) if name in of_one]
        sums = [column.name for column in columns if column.name not in (*names, "time", "count", "largest", "total")]
        which = () if request.interval is None else ("total",)  # an interval and the total look alike without it
        numbers = (*names, *histogram.IMPORTANT) if of else ("count", *sums, *which, *names, "total", "time")
        self.important = tuple(dict.fromkeys(numbers))
        self._kind = _getter(names)
        self._clock = Clock(request.time)
        self.waits = request.interval is None
        self._interval, self._ticker = request.interval, Ticker(request.interval)
        self._whole, self._period = _Groups(bool(of)), _Groups(bool(of))
        self._row = msgspec.defstruct("Summary", [(column.name, Any) for column in columns])
        self._round = self._without_total = 0

    def _interval_ended(self) -> Batch:
        ended, self._period = self._period, _Groups(bool(self._of))
        return self._ended("interval", ended)

    def _last(self) -> Iterator[Batch]:
        if self._interval:
            yield self._interval_ended()
        yield self._ended("total", self._whole)
        if self._without_total:
            self.notes.append(
                f"{self._without_total} rows of further groups are in the intervals only, not in the total"
            )

    @property
    def pause(self) -> float:
        return self._ticker.remaining

    def _without_room(self, rows: int, period: int = 0) -> None:
        """So many rows found no group in the total, and in the interval, if there are intervals."""
        lost = period if self._interval else rows
        self._without_total += rows if self._interval else 0
        self.stats.shown -= lost
        self.stats.lost += lost

    def _ended(self, which: Literal["interval", "total"], groups: _Groups) -> Batch:
        self._round += 1
        when = None if self._clock.mode == "none" else self._clock.read(monotonic_ns())
        ordered = groups.largest()
        largest = self._by_connection(ordered) if self._marks else None
        rows = [
            self._make(kind, group, when, which == "total", None if largest is None else kind in largest)
            for kind, group in ordered
        ]
        return Batch(which, rows, self._round, [(group.first_ns, group.last_ns) for _, group in ordered])

    def _by_connection(self, ordered: list[tuple[tuple[Any, ...], _Group]]) -> set[tuple[Any, ...]]:
        """Put the groups of one connection together, the largest first. Returns the largest ones."""

        def connection(kind: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(kind[index] for index in self._of_one)

        def p99(group: _Group) -> int:
            return (group.values.percentile(99) or 0) if group.values else 0

        ordered.sort(key=lambda item: (str(connection(item[0])), -p99(item[1])))
        firsts = {connection(kind): (kind, p99(group)) for kind, group in reversed(ordered)}
        return {kind for kind, longest in firsts.values() if longest}

    def _make(self, kind: tuple[Any, ...], group: _Group, when: Any, total: bool, largest: bool | None) -> Any:
        values = (
            histogram.figures(group.values) if group.values else {column.name: group.sum for column in self.columns}
        )
        values |= dict(zip(self._names, kind, strict=True)) | {"time": when, "count": group.count}
        values |= {"largest": largest, "total": total}
        return self._row(*(values[column.name] for column in self.columns))


class _OfRows(_Grouping):
    """Groups the rows of another run."""

    def __init__(
        self,
        request: Request,
        columns: Sequence[Column],
        names: Sequence[str],
        of: str | None,
        events: Run,
        of_one: Sequence[str] = (),
    ) -> None:
        super().__init__(request, columns, names, of, events.sessions, of_one)
        self._events, self.notes, self.stats = events, events.notes, events.stats

    def poll(self) -> Iterator[Batch]:
        for batch in self._events.poll():
            self._add(batch.rows)
            yield self._interval_ended() if self._ticker.due() else NOTHING  # there may be no end of events
        self.done = self._events.done
        if self._ticker.due():
            yield self._interval_ended()

    def end(self) -> Iterator[Batch]:
        for batch in self._events.end():
            self._add(batch.rows)
        yield from self._last()

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._events.descriptors

    @property
    def pause(self) -> float:
        return min(self._events.pause, super().pause)

    def account(self) -> Stats:
        return self._events.account()

    def _add(self, rows: Sequence[Any]) -> None:
        if not rows:
            return
        kinds = list(map(self._kind, rows))
        values = list(map(attrgetter(self._of), rows)) if self._of else []
        period = self._period.add(kinds, values) if self._interval else 0
        self._without_room(self._whole.add(kinds, values), period)


class _OfKernel(_Grouping):
    """Takes the groups that the kernel has counted."""

    more = ""  # no ring

    def __init__(
        self,
        request: Request,
        columns: Sequence[Column],
        names: Sequence[str],
        of: str | None,
        session: Session,
        event: str,
        frame: Callable[[int], str],
        of_one: Sequence[str] = (),
    ) -> None:
        super().__init__(request, columns, names, of, [session], of_one)
        self._second = Ticker(1.0)
        self._session, self._counted = session, groups.Counted(session, event, names, frame)

    def poll(self) -> Iterator[Batch]:
        self._session.release_held()
        ended = self._ticker.due()
        if self._second.due() or ended:  # the kernel has room for fewer groups than there is here
            self._take()
        if ended:
            yield self._interval_ended()

    def begin_anew(self) -> None:
        """Leave out what was counted until now."""
        self._take()
        self._whole, self._period = _Groups(bool(self._of)), _Groups(bool(self._of))

    @property
    def pause(self) -> float:
        held = POLL_SECONDS if self._session.holds_back else FOREVER
        return min(self._second.remaining, super().pause, held)

    def end(self) -> Iterator[Batch]:
        self._session.end()
        self._take()
        yield from self._last()

    def _take(self) -> None:
        for group in self._counted.take():
            self.stats.shown += group.count
            kind = self._kind(group.row)
            period = self._period.add_group(kind, group) if self._interval else 0
            self._without_room(self._whole.add_group(kind, group), period)


@dataclass
class _Group:
    count: int = 0
    values: Histogram | None = None
    sum: int = 0
    first_ns: int = 0
    last_ns: int = 0


class _Groups:
    """Rows per group and, with `distributed`, the distribution of their numbers."""

    def __init__(self, distributed: bool) -> None:
        self._groups: dict[tuple[Any, ...], _Group] = {}
        self._distributed = distributed

    def add(self, kinds: Sequence[tuple[Any, ...]], values: Sequence[int | None]) -> int:
        """Add a batch: the group of each row, and its number (no numbers if rows are only counted).

        Returns how many rows were left out because there is no room for their group.
        """
        left_out = 0
        for kind, count in Counter(kinds).items():
            if kind in self._groups:
                self._groups[kind].count += count
            elif len(self._groups) < MAX_KINDS:
                self._groups[kind] = _Group(count, Histogram.of(()) if self._distributed else None)
            else:
                left_out += count
        known: dict[tuple[Any, ...], list[int]] = {}
        for kind, value in zip(kinds, values, strict=bool(values)):
            if value is not None and kind in self._groups:
                known.setdefault(kind, []).append(value)
        for kind, numbers in known.items():
            group = self._groups[kind]
            assert group.values is not None
            group.values += Histogram.of(numbers)
        return left_out

    def add_group(self, kind: tuple[Any, ...], counted: groups.Group) -> int:
        """Add rows of one group. Returns how many were left out because there is no room for it."""
        if kind not in self._groups:
            if len(self._groups) >= MAX_KINDS:
                return counted.count
            self._groups[kind] = _Group()
        group = self._groups[kind]
        group.count += counted.count
        group.sum += counted.sum
        group.first_ns = min(group.first_ns or counted.first_ns, counted.first_ns)
        group.last_ns = max(group.last_ns, counted.last_ns)
        if counted.values:
            group.values = group.values + counted.values if group.values else counted.values
        return 0

    def largest(self) -> list[tuple[tuple[Any, ...], _Group]]:
        """All groups, those with most rows first."""
        return sorted(self._groups.items(), key=lambda item: (-item[1].count, str(item[0])))


def _getter(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that returns these columns of a row as a tuple."""
    if len(names) == 1:
        return lambda row: (getattr(row, names[0]),)
    return attrgetter(*names)
