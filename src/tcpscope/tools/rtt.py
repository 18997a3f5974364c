"""How long is the round trip, and to whom?

One sample for each acknowledgement that delivered a newer packet than all before: the time from its last transmission
until then, as the kernel measures it (rack.rtt_us). A packet is what TCP hands to the device, up to 64 KB. A receiver
of data gives no samples, however many segments it gets. The handshake gives one, too; without SACK it is the only one.
With --smoothed the kernel's smoothed RTT at that moment instead, as `ss -ti` shows it. Percentiles are known to 1/8 of
their value; count, min, max and mean are exact. With -n only the keys with the most samples are shown, each time.
"""

from __future__ import annotations

import struct
import sys
import time
from typing import Any

import msgspec

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import address_text
from tcpscope.kernel import filtering
from tcpscope.output import Column, histogram
from tcpscope.output.histogram import Histogram, bucket_start
from tcpscope.schema import Clock, comm_text
from tcpscope.session import Session, monotonic_ns, wait_for_programs
from tcpscope.stop import Stop
from tcpscope.tool import Option, Request, Tool

_KEYS = {
    "laddr": ("laddr",),
    "raddr": ("raddr",),
    "lport": ("lport",),
    "rport": ("rport",),
    "pid": ("pid", "comm"),
    "connection": ("pid", "comm", "laddr", "lport", "raddr", "rport", "cookie"),
}
_TOTAL_KEYS = 16384
"""So many keys, or --max-keys if that is more, have a total: one takes 2 KB, and connections come without end."""

_KEY_COLUMNS = (
    Column("pid", doc="process that owns the connection"),
    Column("comm", "comm", doc="name of that process"),
    Column("laddr", "address", doc="local address"),
    Column("lport", doc="local port"),
    Column("raddr", "address", doc="remote address"),
    Column("rport", doc="remote port"),
    Column("cookie", doc="socket cookie, what ss -e prints as sk:"),
)

class Rtt(Tool):
    probes = ("rtt",)
    aliases = ("tcprtt",)
    intervals = True
    options = (
        Option(("--by",), "One distribution for each: none, laddr, raddr, lport, rport, pid, connection; "
               "or several with commas.", str, "none"),
        Option(("--smoothed",), "The smoothed RTT, as ss -ti shows it, instead of each measurement."),
        Option(("--histogram",), "Draw the distribution for each key too."),
        Option(("--max-keys",), "So many keys at the most in an interval; samples of further ones count as lost.",
               int, 4096),
    )  # fmt: skip

    def run(self, request: Request) -> None:
        by = _parse_by(request.options["by"])
        max_keys = request.options["max_keys"]
        if not 1 <= max_keys <= 1 << 20:
            raise UsageError(f"--max-keys {max_keys}", "a number from 1 to 1048576")
        owner = "pid" in by or "connection" in by or filtering.asks_owner(request.filter)
        constants = {f"by_{name}": True for name in by} | {
            "want_owner": owner,
            "smoothed": request.options["smoothed"],
        }
        skip = () if owner else ("accept", "seed")
        entries = {"rtts_even": max_keys, "rtts_odd": max_keys} | ({} if owner else {"connections": 1, "listening": 1})
        request.filter = filtering.kernel_only(request.filter, "rtt")
        columns = _columns(request, by)
        with (
            Stop(request.duration) as stop,
            Session("rtt", None, request.filter, constants=constants, skip=skip, entries=entries,
                    debug=request.debug) as session,
        ):  # fmt: skip
            report = _Report(request, by, columns)
            if not request.ready(stop, session):
                return
            reader = _Reader(session, max_keys)
            report.owners = reader.owners
            while not stop:
                deadline = time.monotonic() + (request.interval or 1e9)
                while not stop and time.monotonic() < deadline:
                    stop.wait(deadline - time.monotonic())
                if request.interval and not stop:
                    report.write(reader.take(), total=False)
            session.end()
            last = reader.take()
            if request.interval:
                report.write(last, total=False)
            report.write(reader.total, total=True)
            if reader.without_total:
                print(f"tcpscope: {len(reader.total)} keys have a total; {reader.without_total} samples of others are "
                      "in the intervals only", file=sys.stderr)  # fmt: skip
            session.stats.shown = reader.samples
            request.finish(session.account(), report.sink, more="--max-keys")


def _parse_by(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in _KEYS and name != "none":
            raise UsageError(f"--by {name}", did_you_mean(name, _KEYS) or f"allowed: none, {', '.join(_KEYS)}")
    if not names or (len(names) > 1 and {"none", "connection"} & set(names)):
        raise UsageError(f"--by {text}", "'none' and 'connection' stand alone; the others go together")
    return () if names == ("none",) else names


class _Reader:
    """Takes the distributions out of the kernel's two maps in turn: while one is read the other is filled."""

    def __init__(self, session: Session, capacity: int) -> None:
        self._session = session
        self._capacity = capacity
        self._epoch = session.loaded.memory("epoch").cast("I")
        self._key = session.spec.layout("rtt_key", internal=True)
        self._value = session.spec.layout("rtt_value", internal=True)
        self.total: dict[Any, Histogram] = {}
        self.owners: dict[Any, dict[str, Any]] = {}
        self.samples = self.without_total = 0

    def take(self) -> dict[Any, Histogram]:
        """What was measured since the last call, by key; `total` grows by it, as far as there is room."""
        ended = "rtts_odd" if self._epoch[0] & 1 else "rtts_even"
        self._epoch[0] += 1
        wait_for_programs()
        found: dict[Any, Histogram] = {}
        for name in self.owners.keys() - self.total.keys():
            del self.owners[name]
        for raw, key, value in self._session.loaded.entries(ended, self._key, self._value, self._capacity):
            name = _plain(key)
            found[name] = _histogram(value)
            if value.owner_pid:
                self.owners[name] = {"pid": value.owner_pid, "comm": comm_text(value.owner_comm)}
            self._session.loaded.delete(ended, raw)
        for name, distribution in found.items():
            self.samples += distribution.count
            if name in self.total:
                self.total[name] += distribution
            elif len(self.total) < max(self._capacity, _TOTAL_KEYS):
                self.total[name] = distribution
            else:
                self.without_total += distribution.count
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


def _histogram(value: Any) -> Histogram:
    buckets = struct.unpack(f"<{len(value.buckets) // 4}I", value.buckets)
    shards = len(value.max_us) // 4
    lowest = [n - 1 for n in struct.unpack(f"<{shards}I", value.min_us) if n]
    highest = struct.unpack(f"<{shards}I", value.max_us)
    # Two runs of the program on one CPU, or on one shard, may overtake each other: then the bucket is what is known.
    filled = [index for index, n in enumerate(buckets) if n]
    return Histogram(
        buckets,
        value.sum_us,
        min([*lowest, bucket_start(filled[0] + 1) - 1]) if filled else None,
        max([*highest, bucket_start(filled[-1])]) if filled else None,
    )


def _keys(by: tuple[str, ...]) -> tuple[Column, ...]:
    shown = {name for key in by for name in _KEYS[key]}
    return tuple(column for column in _KEY_COLUMNS if column.name in shown)


def _columns(request: Request, by: tuple[str, ...]) -> tuple[Column, ...]:
    """The columns to show, or a UsageError."""
    stamp = () if request.time == "none" else (Column("time", "time", doc="when it was read"),)
    period = (Column("total", "bool", doc="over the whole run, not an interval"),)
    available = (*stamp, *_keys(by), *histogram.COLUMNS, *period)
    default = tuple(column.name for column in available if column.name != "histogram")
    return request.choose(available, default)


class _Report:
    """Rows of distributions, and in a table the drawings."""

    def __init__(self, request: Request, by: tuple[str, ...], columns: tuple[Column, ...]) -> None:
        self._request = request
        self._clock = Clock(request.time)
        self._columns = columns
        self._row = msgspec.defstruct("Rtt", [(column.name, Any) for column in self._columns])
        self._draw = request.output == "table" and (request.options["histogram"] or not by)
        self._keys = [column.name for column in _keys(by)]
        self.sink = request.sink(self._columns)
        self.owners: dict[Any, dict[str, Any]] = {}

    def write(self, found: dict[Any, Histogram], total: bool) -> None:
        when = None if self._request.time == "none" else self._clock.read(monotonic_ns())
        ordered = sorted(found.items(), key=lambda item: -item[1].count)
        if self._request.max_events is not None:
            ordered = ordered[: self._request.max_events]
        if not self._draw:
            self.sink.rows([self._make(key, distribution, when, total) for key, distribution in ordered])
        for key, distribution in ordered if self._draw else ():
            self.sink.rows([self._make(key, distribution, when, total)])
            drawing = "\n".join(["", *distribution.draw("us"), "", ""])
            self._request.stream.write(drawing.encode())
        if not ordered:
            self.sink.rows([])
        self._request.stream.flush()

    def _make(self, key: _Key, distribution: Histogram, when: Any, total: bool) -> Any:
        values = {name: getattr(key, name) for name in self._keys} | self.owners.get(key, {})
        values |= histogram.figures(distribution) | {"time": when, "total": total}
        return self._row(*(values[column.name] for column in self._columns))


tool = Rtt()
