"""What connections have moved, as the object `traffic` tells it, each byte once. `top` and `subnet` add it up."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, NamedTuple

import msgspec

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.kernel import compiled_filter
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.kernel.spec import Spec
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.run import NOTHING, Batch, Run, Ticker
from tcpscope.schema import Clock
from tcpscope.session import POLL_SECONDS, Session

TIME = Column("time", "time", doc="when the interval or the run ended")
BYTES = ("tx_bytes", "rx_bytes", "retrans_bytes")
RATES = ("tx_bytes_per_s", "rx_bytes_per_s", "retrans_pct")
_DERIVED = (
    Column("tx_bytes_per_s", unit="", width=10, title="TX_B/s", doc="data sent for the first time, bytes per second"),
    Column("rx_bytes_per_s", unit="", width=10, title="RX_B/s", doc="data received, bytes per second"),
    Column(
        "retrans_pct",
        "float",
        title="RETR%",
        width=5,
        nullable=True,
        doc="data sent again, in percent of all that was sent; null: nothing was sent",
    ),
    Column("interval_us", unit="us", doc="how long the interval was"),
)
_OWNER = ("pid", "uid", "comm", "cgroup")
_NUMERIC = ("int", "float")
_KEPT_NS = 2_000_000_000
"""How long it is known what was counted of a connection: much longer than events of a look and of an end are apart."""


def moved_columns() -> tuple[Column, ...]:
    """The columns of what was moved: bytes, rates, and the length of the interval."""
    layout = Spec.of("traffic").layout("traffic")
    return (*(Column.of(layout.field(name)) for name in BYTES), *_DERIVED)


def skipped(request: Request, columns: Iterable[Column]) -> tuple[str, ...]:
    """Hooks that find the listener of a child, and so its owner before accept(): only where an owner is asked for."""
    owned = compiled_filter.asks_owner(request.filter) or any(column.name in _OWNER for column in columns)
    return () if owned else ("child4", "child6", "child_woken", "child_woken_again")


SORT = Option(
    ("--sort",),
    "Print the largest of this column first: tx, rx, retrans, ...  [default: bytes sent and received]",
    str,
    metavar="COLUMN",
)


def sorted_by(request: Request, columns: Iterable[Column]) -> str | None:
    """The column that --sort names; `tx` is tx_bytes. UsageError if it is none of these, or has no numbers."""
    name: str | None = request.options["sort"]
    if name is None:
        return None
    numeric = [column.name for column in columns if column.kind in _NUMERIC]
    for found in (name, f"{name}_bytes"):
        if found in numeric:
            return found
    raise UsageError(f"--sort {name}", did_you_mean(name, numeric) or f"it sorts by {', '.join(numeric)}")


class Moved(NamedTuple):
    """Bytes: sent for the first time, received, sent again."""

    tx: int = 0
    rx: int = 0
    retrans: int = 0

    def __bool__(self) -> bool:
        return any(self)

    def plus(self, other: Moved) -> Moved:
        return Moved(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Moved) -> Moved:
        return Moved(*(a - b for a, b in zip(self, other, strict=True)))

    def values(self, interval_us: int) -> dict[str, Any]:
        """The columns `moved_columns`, over an interval of that length."""
        sent, us = self.tx + self.retrans, max(interval_us, 1)
        return {
            "tx_bytes": self.tx,
            "rx_bytes": self.rx,
            "retrans_bytes": self.retrans,
            "tx_bytes_per_s": round(self.tx * 1_000_000 / us),
            "rx_bytes_per_s": round(self.rx * 1_000_000 / us),
            "retrans_pct": round(100 * self.retrans / sent, 2) if sent else None,
            "interval_us": interval_us,
        }


NOTHING_MOVED = Moved()


class Interval(NamedTuple):
    """In nanoseconds of the kernel's clock."""

    began_ns: int
    ended_ns: int

    @property
    def us(self) -> int:
        return (self.ended_ns - self.began_ns) // 1000


@dataclass
class _Known:
    """A connection that has moved something just now: what was counted of it, when, and its last interval."""

    counted: Moved
    seen_ns: int
    shown_in: int = -1


class Counting(Run):
    """Yields rows of what was moved in each interval. A tool gives the session, adds up, and makes the rows.

    An event has what its connection has moved since it began, and what the last look had told of it. If a look and the
    end read a connection at the same time, both events may have the same in the second: then what was counted already
    is known here. An event that was lost makes no error, because the next one begins where the last that came ended.
    """

    def __init__(self, request: Request, columns: Sequence[Column], sort: str | None, session: Session) -> None:
        super().__init__(columns, session)
        self._session, self._clock, self._sort = session, Clock(request.time), sort
        self._ticker = Ticker(request.interval or 1.0)
        self._raw = session.spec.layout("traffic", internal=True).decoder(raw=True).rows
        self._row = msgspec.defstruct("Traffic", [(column.name, Any) for column in columns])
        self._known: dict[tuple[int, int], _Known] = {}
        self.round = 0
        session.loaded.run("look")
        session.loaded.memory("begun")[0] = True
        self.began_ns = self._since_ns = self._forgot_ns = monotonic_ns()

    def _rows_of(self, records: memoryview) -> Iterable[Any]:
        """What the tool decodes of these records beside the numbers: one for each."""
        return repeat(None)

    @abstractmethod
    def _add(self, raw: Any, row: Any, moved: Moved, first: bool, overlaps: bool) -> None:
        """An event says that its connection has moved so much more; `first`: for the first time in this interval.

        `overlaps`: it has the time of another event in it.
        """

    @abstractmethod
    def _ended(self, interval: Interval) -> list[dict[str, Any]]:
        """The rows of an interval, as mappings of the columns; the next interval begins."""

    def _totals(self, interval: Interval) -> list[dict[str, Any]] | None:
        """The rows of the whole run; None: the tool has no total."""
        return None

    def poll(self) -> Iterator[Batch]:
        self._take()
        yield self._interval() if self._ticker.due() else NOTHING

    def end(self) -> Iterator[Batch]:
        yield self._interval(last=True)
        totals = self._totals(Interval(self.began_ns, self._since_ns))
        if totals is not None:
            yield self._batch("total", totals, self._since_ns)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._session.descriptors

    @property
    def pause(self) -> float:
        return min(POLL_SECONDS, self._ticker.remaining)

    def _interval(self, last: bool = False) -> Batch:
        ended_ns = monotonic_ns()
        self._session.loaded.run("look")
        if last:
            self._session.end()
        self._take()
        began_ns, self._since_ns = self._since_ns, ended_ns
        batch = self._batch("snapshot", self._ended(Interval(began_ns, ended_ns)), ended_ns)
        self.round += 1
        return batch

    def _take(self) -> None:
        now_ns = monotonic_ns()
        for records in self._session.batches():
            for raw, row in zip(self._raw(records), self._rows_of(records), strict=False):
                self.stats.shown += 1
                now = Moved(raw.tx_bytes, raw.rx_bytes, raw.retrans_bytes)
                key = raw.socket, raw.opened_ns
                known = self._known.get(key)
                if known is None:
                    known = self._known[key] = _Known(Moved(raw.tx, raw.rx, raw.retrans), now_ns)
                known.seen_ns = now_ns
                counted = Moved(*map(max, now, known.counted))
                if moved := counted.minus(known.counted):
                    overlaps = Moved(raw.tx, raw.rx, raw.retrans) != known.counted
                    self._add(raw, row, moved, known.shown_in != self.round, overlaps)
                    known.counted, known.shown_in = counted, self.round
        if now_ns - self._forgot_ns > _KEPT_NS:  # after the events that waited here while this process did
            self._known = {key: known for key, known in self._known.items() if now_ns - known.seen_ns < _KEPT_NS}
            self._forgot_ns = now_ns

    def _batch(self, kind: Literal["snapshot", "total"], found: list[dict[str, Any]], ended_ns: int) -> Batch:
        when = None if self._clock.mode == "none" else self._clock.read(ended_ns)
        found.sort(key=self._size, reverse=True)
        rows = [self._row(*((values | {"time": when})[column.name] for column in self.columns)) for values in found]
        return Batch(kind, rows, self.round)

    def _size(self, values: dict[str, Any]) -> float:
        if self._sort is None:
            return float(values["tx_bytes"] + values["rx_bytes"])
        value = values[self._sort]
        return -1.0 if value is None else float(value)
