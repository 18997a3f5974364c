"""How full do a listener's SYN queue and accept queue get, against their limit?

One row per listener. At each handshake that completes, the kernel adds both lengths to distributions: how many
connections then wait for accept(), this one among them, and how many handshakes still wait for their final ACK.
Percentiles are accurate to 1/8 of their value. max is exact, or to 1/8 if two handshakes are counted at the same
moment. `full` is how many handshakes found the queue full: they are refused, or answered by a SYN cookie, and not among
the lengths. With -n each result has only the listeners with the most handshakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

from tcpscope import listeners
from tcpscope.aggregate import Aggregate, distribution
from tcpscope.errors import UnsupportedError
from tcpscope.filters import address_text
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.output import Column
from tcpscope.output.histogram import Histogram
from tcpscope.request import Option, Request
from tcpscope.run import Batch, Run, Ticker
from tcpscope.schema import Clock, comm_text
from tcpscope.session import Session, closed_on_error
from tcpscope.summary import TOTAL
from tcpscope.tool import Tool

_QUEUES = {"accept": "accept queue", "syn": "SYN queue"}
_TOTALS = 16384
"""At most so many listeners have a total."""


def _of_queue(name: str, title: str) -> tuple[Column, ...]:
    short = title.split()[0].upper()
    texts = {
        "p50": "half of the lengths are not longer; known to 1/8",
        "p99": "99 % are not longer; known to 1/8",
        "max": "longest",
    }
    return (
        *(
            Column(f"{name}_{key}", title=f"{short} {key.upper()}", doc=f"{title}: {text}", nullable=True)
            for key, text in texts.items()
        ),
        Column(
            f"{name}_max_percent",
            title=f"{short} MAX(%)",
            doc=f"{title}: longest, in percent of the limit",
            nullable=True,
        ),
        Column(f"{name}_full", title=f"{short} FULL", doc=f"handshakes that found the {title} full", nullable=True),
    )


_COLUMNS = (
    Column("time", "time", doc="when the tool read the lengths from the kernel"),
    Column("netns", width=10, doc="network namespace, as inode number"),
    Column("family", title="IP", doc="IP version of the address"),
    Column("laddr", "address", doc="address it listens on"),
    Column("lport", doc="port it listens on"),
    Column("cookie", width=8, doc="socket cookie of the listener, what ss -e prints as sk:", nullable=True),
    Column("pid", width=7, doc="process that called listen(); of an older listener, one that holds it", nullable=True),
    Column("comm", "comm", doc="name of that process", nullable=True),
    Column("limit", doc="limit of both queues: listen()'s backlog, cut to somaxconn"),
    Column("handshakes", title="SHAKES", doc="handshakes that completed"),
    *(column for name, title in _QUEUES.items() for column in _of_queue(name, title)),
    *(
        Column(
            f"{name}_histogram",
            "distribution",
            f"{title} length",
            doc=f"[from, to, count] of the lengths of the {title}, by power of two",
        )
        for name, title in _QUEUES.items()
    ),
    TOTAL,
)


class Synbl(Tool):
    probes = ("listeners",)
    important = (
        "lport",
        "laddr",
        "limit",
        "handshakes",
        "accept_max",
        "accept_full",
        "syn_max",
        "syn_full",
        "accept_p99",
        "syn_p99",
        "comm",
        "accept_p50",
        "syn_p50",
        "pid",
        "accept_max_percent",
        "syn_max_percent",
        "time",
    )
    alarming = {"accept_full": bool, "syn_full": bool}
    aliases = ("tcpsynbl",)
    examples = {
        "synbl -i 10": "all listeners with handshakes, every ten seconds",
        "synbl -L 443 -d 60 --histogram": "the distributions of a minute, of one port",
    }
    intervals = "once, at the end"
    options = (Option(("--histogram",), "Draw the distributions of each listener too."),)

    def columns(self, request: Request) -> tuple[Column, ...]:
        request.refuse_peers("the lengths of a queue are those of all peers")
        return _COLUMNS

    def open(self, request: Request) -> Run:
        hidden = {"netns", "family", "cookie"}
        shown = [each.name for each in self.columns(request) if each.kind != "distribution" and each.name not in hidden]
        drawn = tuple(f"{name}_histogram" for name in _QUEUES) if request.options["histogram"] else ()
        columns = request.choose(_COLUMNS, shown, drawn)
        session = listeners.open_session(request.filter, lengths=True, debug=request.debug)
        with closed_on_error(session):
            if not listeners.sees_lengths(session):
                raise UnsupportedError(
                    "the listener of a handshake is not known",
                    "functions cannot be hooked here, and there is no tracepoint sk_data_ready (6.3)",
                )
            return _Measuring(request, columns, session)


class _Listener(NamedTuple):
    socket: int
    since_ns: int
    netns: int
    family: int
    laddr: str
    lport: int


def _nothing() -> Histogram:
    return Histogram.of(())


@dataclass
class _Lengths:
    """What is known of one listener over some time: the distribution of each queue, and how often it was full."""

    lengths: dict[str, Histogram] = field(default_factory=dict)
    full: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_QUEUES, 0))
    limit: int = 0
    cookie: int | None = None
    pid: int | None = None
    comm: str | None = None

    def add(self, queue: str, value: Any) -> None:
        """What the kernel counted for one of the queues."""
        self.lengths[queue] = _sum(self.lengths.get(queue), distribution(value))
        self.full[queue] += value.full
        self.limit, self.cookie = value.limit, value.cookie or None
        self.pid, self.comm = value.owner_pid or None, comm_text(value.owner_comm) or None

    def __iadd__(self, other: _Lengths) -> _Lengths:
        for queue, lengths in other.lengths.items():
            self.lengths[queue] = _sum(self.lengths.get(queue), lengths)
        self.full = {queue: n + other.full[queue] for queue, n in self.full.items()}
        self.limit, self.cookie, self.pid, self.comm = other.limit, other.cookie, other.pid, other.comm
        return self

    @property
    def handshakes(self) -> int:
        return self.lengths["accept"].count if "accept" in self.lengths else 0

    @property
    def counted(self) -> int:
        """In the kernel's account: a handshake that completes counts once for each queue."""
        return sum(lengths.count for lengths in self.lengths.values()) + sum(self.full.values())

    def values(self, queue: str, knows_full: bool) -> dict[str, Any]:
        """The columns of one queue."""
        lengths = self.lengths.get(queue) or _nothing()
        percent = None if lengths.max is None or not self.limit else round(100 * lengths.max / self.limit)
        return {
            f"{queue}_p50": lengths.percentile(50),
            f"{queue}_p99": lengths.percentile(99),
            f"{queue}_max": lengths.max,
            f"{queue}_max_percent": percent,
            f"{queue}_full": self.full[queue] if knows_full else None,
            f"{queue}_histogram": [list(octave) for octave in lengths.octaves()],
        }


def _sum(one: Histogram | None, other: Histogram) -> Histogram:
    return other if one is None else one + other


class _Measuring(Run):
    """Reads the kernel's distributions at each interval and at the end."""

    more = ""

    def __init__(self, request: Request, columns: Sequence[Column], session: Session) -> None:
        super().__init__(columns, session)
        self._session = session
        self._aggregate = Aggregate(session.loaded, "lengths", "length_key", "length")
        self._queue_name: Callable[[int], str] = lambda number: session.spec.labels("queue")[number].lower()
        if why := listeners.why_sampled(session):
            self.notes.append(f"{why}: how often a queue was full is not known")
        self._knows_full = not why
        self.waits = request.interval is None
        self._interval, self._ticker = request.interval, Ticker(request.interval)
        self._clock = Clock(request.time)
        self._row = msgspec.defstruct("Backlog", [(column.name, Any) for column in columns])
        self._total: dict[_Listener, _Lengths] = {}
        self._without_total = self._round = 0

    def poll(self) -> Iterator[Batch]:
        if self._ticker.due():
            yield self._batch("interval", self._take())

    def end(self) -> Iterator[Batch]:
        self._session.end()
        last = self._take()
        if self._interval:
            yield self._batch("interval", last)
        yield self._batch("total", self._total)
        if self._without_total:
            self.notes.append(f"{self._without_total} listeners have no total; they are in the intervals only")

    @property
    def pause(self) -> float:
        return self._ticker.remaining

    def _take(self) -> dict[_Listener, _Lengths]:
        found: dict[_Listener, _Lengths] = {}
        for key, value in self._aggregate.take():
            name = _Listener(
                key.socket,
                key.since_ns,
                key.netns,
                key.family,
                address_text(key.laddr),
                key.lport,
            )
            found.setdefault(name, _Lengths()).add(self._queue_name(key.queue), value)
        for name, lengths in found.items():
            self.stats.shown += lengths.counted
            if name in self._total or len(self._total) < _TOTALS:
                whole = self._total.setdefault(name, _Lengths())
                whole += lengths
            else:
                self._without_total += 1
        return found

    def _batch(self, kind: Literal["interval", "total"], found: dict[_Listener, _Lengths]) -> Batch:
        self._round += 1
        when = None if self._clock.mode == "none" else self._clock.read(monotonic_ns())
        ordered = sorted(
            found.items(),
            key=lambda item: (-item[1].handshakes, -sum(item[1].full.values()), item[0].lport, item[0].laddr),
        )
        return Batch(kind, [self._make(key, each, when, kind == "total") for key, each in ordered], self._round)

    def _make(self, key: _Listener, lengths: _Lengths, when: Any, total: bool) -> Any:
        values = key._asdict() | {
            "time": when,
            "total": total,
            "cookie": lengths.cookie,
            "pid": lengths.pid,
            "comm": lengths.comm,
            "limit": lengths.limit,
            "handshakes": lengths.handshakes,
        }
        for queue in _QUEUES:
            values |= lengths.values(queue, self._knows_full)
        return self._row(*(values[column.name] for column in self.columns))


tool = Synbl()
