"""How long is the round trip, and to whom?

One sample per ACK of new data: the time since that data was last sent, as the kernel measures it (rack.rtt_us). The
handshake gives a sample, too; without SACK it is the only one. A host that only receives data gives no others. With
--smoothed a sample is the kernel's smoothed RTT at that moment, as `ss -ti` shows it. Percentiles are accurate to 1/8
of their value; count and mean are exact. min and max are exact, or to 1/8 if two samples are counted at the same
moment. With -n each result has only the groups with the most samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from tcpscope.aggregate import Aggregate, distribution
from tcpscope.errors import TcpscopeError, UsageError, did_you_mean
from tcpscope.filters import address_text
from tcpscope.kernel import compiled_filter
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.kernel.machine import available_memory
from tcpscope.kernel.spec import Spec
from tcpscope.output import Column, histogram
from tcpscope.output.histogram import Histogram
from tcpscope.request import Option, Request
from tcpscope.run import Batch, Run, Ticker
from tcpscope.schema import Clock, comm_text
from tcpscope.session import Session, closed_on_error
from tcpscope.summary import TOTAL
from tcpscope.tool import Tool

_KEYS = {
    "laddr": ("laddr",),
    "raddr": ("raddr",),
    "lport": ("lport",),
    "rport": ("rport",),
    "pid": ("pid", "comm"),
    "connection": ("pid", "comm", "laddr", "lport", "raddr", "rport", "cookie"),
}
_MAX_KEYS = 4096
_TOTAL_KEYS = 16384
"""At most so many groups have a total, or --max-keys if that is more. A total takes 2 KB."""

_ENTRY_BYTES = 56  # of the kernel's, beside key and value: struct htab_elem and struct bucket, kernel/bpf/hashtab.c
_MUCH_MEMORY = 100_000_000

_KEY_COLUMNS = (
    Column("pid", width=7, doc="process that owns the connection", nullable=True),
    Column("comm", "comm", doc="name of that process", nullable=True),
    Column("laddr", "address", doc="local address"),
    Column("lport", doc="local port"),
    Column("raddr", "address", doc="remote address"),
    Column("rport", doc="remote port"),
    Column("cookie", width=8, doc="socket cookie, what ss -e prints as sk:", nullable=True),
)
_FIRST = ("count", "p50_us", "p99_us")
_TIME = Column("time", "time", doc="when the tool read the group from the kernel")


class Rtt(Tool):
    probes = ("rtt",)
    important = ("raddr", "rport", *_FIRST, "comm", "max_us", "pid", "laddr", "lport", *histogram.IMPORTANT)
    aliases = ("tcprtt",)
    examples = {
        "rtt --by raddr -i 10": "for each remote address, every ten seconds",
        "rtt -R 443 -d 60 --histogram": "the distribution of a minute, to port 443",
    }
    intervals = "once, at the end"
    only_with = {"max_keys": "--by"}
    options = (
        Option(
            ("--by",),
            "Group by these keys, comma-separated: laddr, raddr, lport, rport, pid; or by connection, or none.",
            str,
            "none",
            names=True,
            metavar="KEYS",
        ),
        Option(("--smoothed",), "Take the kernel's smoothed RTT (rtt: in ss -ti) instead of each measurement."),
        Option(("--histogram",), "Draw the distribution of each group too."),
        Option(
            ("--max-keys",),
            f"Keep at most N groups per interval; samples of others count as lost.  [default: {_MAX_KEYS}]",
            int,
            metavar="N",
        ),
    )

    def columns(self, request: Request) -> tuple[Column, ...]:
        wanted = {name for key in _parse_by(request.options["by"]) for name in _KEYS[key]}
        return (_TIME, *(column for column in _KEY_COLUMNS if column.name in wanted), *histogram.COLUMNS, TOTAL)

    def open(self, request: Request) -> Run:
        available = self.columns(request)
        shown = [column.name for column in available if column.kind != "distribution"]
        by = _parse_by(request.options["by"])
        drawn = ("histogram",) if request.options["histogram"] or not by else ()
        columns = request.choose(available, shown, drawn)
        max_keys = request.options["max_keys"]
        if max_keys is not None and not 1 <= max_keys <= 1 << 20:
            raise UsageError(f"--max-keys {max_keys}", "a number from 1 to 1048576")
        if max_keys and not by:
            raise UsageError(f"--max-keys {max_keys}", f"needs {self.only_with['max_keys']}")
        owner = "pid" in by or "connection" in by or compiled_filter.asks_owner(request.filter)
        constants = {f"by_{name}": True for name in by} | {
            "want_owner": owner,
            "smoothed": request.options["smoothed"],
        }
        max_keys = (max_keys or _MAX_KEYS) if by else 1
        note = _memory_note(max_keys)
        entries = {"rtts_even": max_keys, "rtts_odd": max_keys}
        skip = () if owner else ("woken", "woken_again")
        session = Session(
            "rtt",
            None,
            request.filter,
            constants=constants,
            entries=entries,
            owners=owner,
            skip=skip,
            debug=request.debug,
        )
        with closed_on_error(session):
            run = _Measuring(request, columns, session, max_keys)
            run.notes += note
            return run


class _Measuring(Run):
    """Reads the kernel's distributions at each interval and at the end."""

    more = "--max-keys"

    def __init__(self, request: Request, columns: Sequence[Column], session: Session, max_keys: int) -> None:
        super().__init__(columns, session)
        self._session, self._reader = session, _Reader(session, max_keys)
        self.waits = request.interval is None
        self._interval, self._ticker = request.interval, Ticker(request.interval)
        self._clock = Clock(request.time)
        self._row = msgspec.defstruct("Rtt", [(column.name, Any) for column in columns])
        self._keys = [column.name for column in columns if column.name in _Key.__struct_fields__]
        self._round = 0

    def poll(self) -> Iterator[Batch]:
        if self._ticker.due():
            yield self._batch("interval", self._reader.take())

    def end(self) -> Iterator[Batch]:
        self._session.end()
        last, reader = self._reader.take(), self._reader
        if self._interval:
            yield self._batch("interval", last)
        yield self._batch("total", reader.total)
        if reader.without_total:
            self.notes.append(
                f"{len(reader.total)} groups have a total; {reader.without_total} samples of others are in "
                "the intervals only"
            )
        self.stats.shown = reader.samples

    @property
    def pause(self) -> float:
        return self._ticker.remaining

    def _batch(self, kind: Literal["interval", "total"], found: dict[Any, Histogram]) -> Batch:
        self._round += 1
        when = None if self._clock.mode == "none" else self._clock.read(monotonic_ns())
        ordered = sorted(found.items(), key=lambda item: -item[1].count)
        return Batch(kind, [self._make(key, each, when, kind == "total") for key, each in ordered], self._round)

    def _make(self, key: _Key, samples: Histogram, when: Any, total: bool) -> Any:
        values = {name: getattr(key, name) for name in self._keys} | self._reader.owners.get(key, {})
        values |= histogram.figures(samples) | {"time": when, "total": total}
        return self._row(*(values[column.name] for column in self.columns))


def _memory_note(max_keys: int) -> list[str]:
    """A line about the kernel memory for the groups, if it is much. TcpscopeError if it is too much."""
    spec = Spec.of("rtt")
    entry = spec.layout("rtt_key", internal=True).size + spec.layout("rtt_value", internal=True).size + _ENTRY_BYTES
    needed, free = 2 * max_keys * entry, available_memory()
    text = f"--max-keys {max_keys} takes {needed / 1e6:,.0f} MB of the kernel's memory"
    if free is not None and needed > free // 2:
        raise TcpscopeError(
            text, f"{free / 1e6:,.0f} MB are free: at most {free // 4 // entry} keys fit in half of that"
        )
    return [text] if needed > _MUCH_MEMORY else []


def _parse_by(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in _KEYS and name != "none":
            raise UsageError(f"--by {name}", did_you_mean(name, _KEYS) or f"allowed: none, {', '.join(_KEYS)}")
    if not names or (len(names) > 1 and {"none", "connection"} & set(names)):
        raise UsageError(f"--by {text}", "'none' and 'connection' stand alone; the others go together")
    return () if names == ("none",) else names


class _Reader:
    """Removes the distributions from the kernel, and adds them up for the whole run."""

    def __init__(self, session: Session, capacity: int) -> None:
        self._aggregate = Aggregate(session.loaded, "rtts", "rtt_key", "rtt_value")
        self._capacity = capacity
        self.total: dict[Any, Histogram] = {}
        self.owners: dict[Any, dict[str, Any]] = {}
        self.samples = self.without_total = 0

    def take(self) -> dict[Any, Histogram]:
        """Key -> distribution since the last call. Adds each to `total`, unless that has its most keys already."""
        found: dict[Any, Histogram] = {}
        for name in self.owners.keys() - self.total.keys():
            del self.owners[name]
        for key, value in self._aggregate.take():
            name = _plain(key)
            found[name] = distribution(value)
            if value.owner_pid:
                self.owners[name] = {"pid": value.owner_pid, "comm": comm_text(value.owner_comm)}
        for name, samples in found.items():
            self.samples += samples.count
            if name in self.total:
                self.total[name] += samples
            elif len(self.total) < max(self._capacity, _TOTAL_KEYS):
                self.total[name] = samples
            else:
                self.without_total += samples.count
        return found


class _Key(msgspec.Struct, frozen=True):
    pid: int | None
    comm: str | None
    laddr: str
    lport: int
    raddr: str
    rport: int
    cookie: int | None


def _plain(key: Any) -> _Key:
    return _Key(
        pid=key.pid or None,
        comm=comm_text(key.comm) or None,
        laddr=address_text(key.laddr),
        lport=key.lport,
        raddr=address_text(key.raddr),
        rport=key.rport,
        cookie=key.cookie or None,
    )


tool = Rtt()
