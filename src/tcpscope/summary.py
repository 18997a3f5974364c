"""Rows of a stream put together: how many there are of each kind, or how a number is distributed among them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from tcpscope.errors import UsageError
from tcpscope.output import Column, Sink, histogram
from tcpscope.output.histogram import Histogram
from tcpscope.schema import Clock, Layout
from tcpscope.session import monotonic_ns
from tcpscope.stop import Stop

if TYPE_CHECKING:
    from tcpscope.tool import Request, Stream

MAX_KINDS = 65536
"""Rows of further kinds count as lost: nobody reads so many, and a machine in trouble makes them without end."""

_COUNT = Column("count", doc="rows")
_TOTAL = Column("total", "bool", doc="over the whole run, not an interval")


@dataclass(frozen=True)
class Summary:
    """What a stream can be put together to, with the flag --`option`.

    by  columns that make a kind; --by chooses others
    of  a column in us whose distribution is asked for; None: the rows are only counted

    --max-events is the number of kinds that are printed each time; the account has the rows of all of them.
    """

    option: str
    help: str
    by: tuple[str, ...]
    of: str | None = None

    def columns(self, layout: Layout, request: Request) -> tuple[Column, ...]:
        """All that can be shown."""
        stamp = () if request.time == "none" else (Column("time", "time", doc="when it was put together"),)
        kind = map(Column.of, self._kind(layout, request).fields)
        return (*stamp, *kind, _COUNT, *(histogram.COLUMNS[1:] if self.of else ()), _TOTAL)

    def run(self, tool: Stream, request: Request) -> None:
        """Print it every --interval, and over everything at the end."""
        available = self.columns(tool.layout(request), request)
        columns = request.choose(available, [column.name for column in available if column.name != "histogram"])
        with Stop(request.duration) as stop, tool.open(request) as session:
            sink = request.sink(columns)
            if not request.ready(stop, session):
                return
            assert session.layout is not None
            kind = self._kind(session.layout, request)
            names = [column.name for column in kind.fields]
            kind_of = _getter(names)
            read = kind if self.of is None else session.layout.select(dict.fromkeys((*names, self.of)))
            value_of = attrgetter(self.of) if self.of else None
            report = _Report(request, sink, columns, names, draw=bool(self.of) and request.output == "table")
            whole, period = _Groups(bool(self.of)), _Groups(bool(self.of))
            deadline = time.monotonic() + request.interval if request.interval else None
            for rows in tool.rows(session, stop, request, read.decoder(Clock("none"))):
                if rows:
                    kinds, values = list(map(kind_of, rows)), list(map(value_of, rows)) if value_of else []
                    left_out = whole.add(kinds, values)
                    session.stats.shown -= left_out
                    session.stats.lost += left_out
                    if deadline:
                        period.add(kinds, values)
                if deadline and request.interval and time.monotonic() >= deadline:
                    report.write(period, total=False)
                    period = _Groups(bool(self.of))
                    deadline += request.interval
            if deadline:
                report.write(period, total=False)
            report.write(whole, total=True)
            request.finish(session.account(), sink)

    def _kind(self, layout: Layout, request: Request) -> Layout:
        text = request.options.get("by")
        names = self.by if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
        if not names:
            raise UsageError("--by is empty", "names of columns with commas between them")
        if "time" in names:
            raise UsageError("--by has 'time'", "every row has its own; --interval puts together what comes in a time")
        return layout.select(dict.fromkeys(names))


@dataclass
class _Group:
    count: int = 0
    values: Histogram | None = None


class _Groups:
    """What has been seen of each kind, and with `distributed` the distribution of its numbers."""

    def __init__(self, distributed: bool) -> None:
        self._groups: dict[tuple[Any, ...], _Group] = {}
        self._distributed = distributed

    def add(self, kinds: Sequence[tuple[Any, ...]], values: Sequence[int | None]) -> int:
        """A batch: the kind of each row, and its number (none at all if rows are only counted).

        Returns how many rows were left out because there are kinds enough.
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

    def largest(self) -> list[tuple[tuple[Any, ...], _Group]]:
        """All, those with most rows first."""
        return sorted(self._groups.items(), key=lambda item: (-item[1].count, str(item[0])))


class _Report:
    """Rows of groups, and below each its drawing."""

    def __init__(
        self, request: Request, sink: Sink, columns: Sequence[Column], names: Sequence[str], draw: bool
    ) -> None:
        self._request = request
        self._sink = sink
        self._columns = [column.name for column in columns]
        self._names = names
        self._draw = draw
        self._clock = Clock(request.time)
        self._row = msgspec.defstruct("Summary", [(name, Any) for name in self._columns])

    def write(self, groups: _Groups, total: bool) -> None:
        when = None if self._request.time == "none" else self._clock.read(monotonic_ns())
        largest = groups.largest()[: self._request.max_events]
        if not self._draw:
            self._sink.rows([self._make(kind, group, when, total) for kind, group in largest])
        for kind, group in largest if self._draw else ():
            self._sink.rows([self._make(kind, group, when, total)])
            if group.values and group.values.count:
                self._request.stream.write("\n".join(["", *group.values.draw("us"), "", ""]).encode())
        if not largest:
            self._sink.rows([])
        self._request.stream.flush()

    def _make(self, kind: tuple[Any, ...], group: _Group, when: Any, total: bool) -> Any:
        values = dict(zip(self._names, kind, strict=True)) | (histogram.figures(group.values) if group.values else {})
        values |= {"time": when, "count": group.count, "total": total}
        return self._row(*(values[name] for name in self._columns))


def _getter(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A function from a row to these columns of it."""
    if len(names) == 1:
        return lambda row: (getattr(row, names[0]),)
    return attrgetter(*names)
