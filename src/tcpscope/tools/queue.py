"""Which listener's SYN queue or accept queue overflows, whose is it, and how full are they?

Without options a table of all listeners, refreshed on a terminal, plain rows every interval in a pipe: both queue
lengths, their limit and where it comes from, owner, refusals, accepts, and how long the oldest connection waits.
With --events one row per refused handshake: which queue, at which step (SYN or final ACK), from whom, and the lengths
and limits at that moment; --stack adds the kernel stack.

The refusals are read off the kernel's own counters, so they sum to TcpExtListenOverflows, TCPReqQFullDrop and
SyncookiesSent exactly. Where functions cannot be hooked they are sampled: the number is that of TcpExtListenDrops, the
listener is the one whose socket has dropped packets meanwhile; the peer is not known, cause and step only at times.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

from tcpscope import listeners, sampling
from tcpscope.errors import UnsupportedError, UsageError
from tcpscope.kernel.symbols import Symbols
from tcpscope.output import Column, open_sink
from tcpscope.sampling import Sample, Sampler
from tcpscope.schema import Clock, Decoder
from tcpscope.session import RING_BYTES, Session, monotonic_ns
from tcpscope.stop import Stop
from tcpscope.tool import Option, Request, Stream

_TABLE = ("laddr", "lport", "pid", "comm", "accept_queue", "accept_limit", "limit_from", "syn_queue", "overflows",
          "syn_drops", "cookies", "accepts_per_s", "since_accept_ms", "oldest_wait_ms")  # fmt: skip
_EVENTS = ("time", "laddr", "lport", "pid", "comm", "raddr", "rport", "cause", "step", "answer", "accept_queue",
           "accept_limit", "syn_queue", "syncookies", "count")  # fmt: skip


class Queue(Stream):
    """Two views of the probe `listeners`: its snapshots, and with --events its event stream."""

    intervals = True
    for_more: ClassVar = {"CAP_SYSLOG": "names of functions in --stack; without it, addresses"}

    def __init__(self) -> None:
        super().__init__(
            "listeners",
            "overflow",
            _EVENTS,
            aliases=("tcpsynbl",),
            options=(
                Option(("-e", "--events"), "One row per refused handshake."),
                Option(("--stack",), "With --events: the kernel stack of each."),
            ),
        )

    def open(self, request: Request) -> Session:
        if request.options.get("events") and request.interval is not None:
            raise UsageError(f"--interval {request.interval:g}", "with --events rows come as things happen")
        for option, given in (("--stack", request.options.get("stack")), ("--buffer", request.buffer)):
            if given and not request.options.get("events"):
                raise UsageError(option, "it goes with --events")
        self.check(request)
        return listeners.open_session(
            request.filter, events=bool(request.options.get("events")), stacks=bool(request.options.get("stack")),
            ring_bytes=request.buffer or RING_BYTES, debug=request.debug,
        )  # fmt: skip

    def check(self, request: Request) -> None:
        if request.options.get("events"):
            super().check(request)
        else:
            request.choose(listeners.COLUMNS)
            request.refuse_peers("a listener has no remote end; with --events the peers are known")

    def decoder(self, session: Session, request: Request) -> Decoder:
        assert session.layout is not None
        stack = request.options.get("stack")
        default = (*_EVENTS, "stack") if stack else _EVENTS
        frame = _symbols().name if stack else hex
        return request.select(session.layout, default).decoder(Clock(request.time), frame=frame)

    def rows(
        self, session: Session, stop: Stop, request: Request, decoder: Decoder | None = None
    ) -> Iterator[list[Any]]:
        if not request.options.get("events"):
            raise UsageError("'queue' makes no events by itself", "options={'events': True} asks for them")
        if listeners.sees_refusals(session):
            for rows in super().rows(session, stop, request, decoder):
                yield _with_function(rows) if request.options.get("stack") else rows
            return
        sampler = Sampler()
        sampler.look(listeners.snapshot(session, all_=True))
        yield from _sampled(decoder or self.decoder(session, request), session, sampler, stop, request)

    def run(self, request: Request) -> None:
        with Stop(request.duration) as stop, self.open(request) as session:
            if request.options.get("events"):
                self._run_events(request, session, stop)
            else:
                self._run_table(request, session, stop)

    def _run_events(self, request: Request, session: Session, stop: Stop) -> None:
        exact = listeners.sees_refusals(session)
        if not exact:
            _refuse_unknown(request)
        decoder = self.decoder(session, request)
        sink = request.sink(map(Column.of, decoder.fields))
        sampler = Sampler()
        if not exact:
            sampler.look(listeners.snapshot(session, all_=True))
        if not request.ready(stop, session):
            return
        sink.rows([])
        if request.options.get("stack") and not len(_symbols()):
            print("tcpscope: --stack shows addresses: the names need CAP_SYSLOG", file=sys.stderr)
        if exact:
            batches: Iterator[list[Any]] = self.rows(session, stop, request)
        else:
            print(f"tcpscope: {listeners.why_sampled(session)}: {sampling.LIMITS}", file=sys.stderr)
            batches = _sampled(decoder, session, sampler, stop, request)
        for rows in batches:
            sink.rows(rows)
            request.stream.flush()
        request.finish(session.account(), sink)

    def _run_table(self, request: Request, session: Session, stop: Stop) -> None:
        columns = request.choose(listeners.COLUMNS, _TABLE if request.interactive else ("time", *_TABLE))
        if request.time == "none":
            columns = tuple(column for column in columns if column.name != "time")
        sink = request.sink(columns)
        if not request.ready(stop, session):
            return
        rates, clock = listeners.Rates(), Clock(request.time)
        left = request.max_events
        while True:  # once at least
            when = None if request.time == "none" else clock.read(monotonic_ns())
            found = listeners.by_urgency(listeners.snapshot(session))
            rows = [listeners.row(listener, when, rates.rate(listener)) for listener in found]
            if left is not None:
                rows, left = rows[:left], left - len(rows[:left])
            if request.interactive:
                _refresh(request, columns, rows, when)
            else:
                sink.rows(_project(rows, columns))
            request.stream.flush()
            if left == 0:
                break
            stop.wait(request.interval or 1.0)
            if stop:
                break
        if request.stats or request.strict:
            session.end()
            request.finish(session.account(), sink)


def _with_function(rows: list[Any]) -> list[Any]:
    """Rows whose stacks begin with the function that refused: the trampolines of 7.2 leave no frame of it behind."""
    for row in rows:
        stack: list[str] = getattr(row, "stack", None) or []
        named = any("+" in frame for frame in stack)
        if named and row.step == "SYN" and not any("tcp_conn_request" in frame for frame in stack):
            stack.insert(0, "tcp_conn_request")
    return rows


@cache
def _symbols() -> Symbols:
    """Read once, and early: when rows are decoded the privilege to see addresses is gone."""
    return Symbols()


def _project(rows: list[Any], columns: tuple[Column, ...]) -> list[Any]:
    """Rows with these columns only, for the formats that write all of a row."""
    import msgspec

    if [column.name for column in columns] == [column.name for column in listeners.COLUMNS]:
        return rows
    type_ = msgspec.defstruct("Row", [(column.name, Any) for column in columns])
    return [type_(*(getattr(row, column.name) for column in columns)) for row in rows]


def _refresh(request: Request, columns: tuple[Column, ...], rows: list[Any], when: Any) -> None:
    """Draw the table anew, cut to what the terminal has."""
    size = shutil.get_terminal_size()
    page = io.BytesIO()
    open_sink(request.output, columns, page, request.header).rows(rows)
    number = f"{len(rows)} listener{'' if len(rows) == 1 else 's'}"
    lines = [f"{when}  {number}" if when else number, *page.getvalue().decode().splitlines()]
    if any(len(line) > size.columns for line in lines):
        lines[0] += "; cut to fit: see --columns"
    text = "\n".join(_cut(line, size.columns) for line in lines[: size.lines - 1])
    request.stream.write(f"\x1b[H\x1b[J{text}\n".encode())


def _cut(line: str, width: int) -> str:
    """The line, or as much of it as fits with a mark that there is more."""
    return line if len(line) <= width else line[: width - 1] + ">"


def _refuse_unknown(request: Request) -> None:
    """UnsupportedError for what samples cannot know."""
    for option, value in request.filter.describe():
        if option in ("--rport", "--raddr"):
            raise UnsupportedError(f"{option} {value}", "peers are not known where functions cannot be hooked")
    if request.options.get("stack"):
        raise UnsupportedError("--stack", "there are no stacks where functions cannot be hooked")


def _sampled(
    decoder: Decoder, session: Session, sampler: Sampler, stop: Stop, request: Request
) -> Iterator[list[Any]]:
    """Rows like those of the events, of what was refused between two looks."""
    clock = Clock(request.time)
    while True:
        stop.wait(sampling.SECONDS)
        samples = sampler.look(listeners.snapshot(session, all_=True))
        when = clock.read(monotonic_ns())
        rows = [_row(decoder, sample, when) for sample in samples if sample.listener.wanted]
        session.stats.seen += len(samples)
        session.stats.filtered += len(samples) - len(rows)
        left = None if request.max_events is None else request.max_events - session.stats.shown
        session.stats.shown += len(rows[:left])
        session.stats.filtered += len(rows) - len(rows[:left])
        yield rows[:left]
        if stop or (left is not None and len(rows) >= left):
            session.end()
            return


def _row(decoder: Decoder, sample: Sample, when: str | float) -> Any:
    owner = sample.listener.owner
    values = {
        "time": when, "cause": sample.cause or "UNKNOWN", "step": sample.step, "count": sample.count,
        "pid": owner.pid if owner else None, "comm": owner.comm if owner else None, "uid": owner.uid if owner else None,
    }  # fmt: skip
    return decoder.row_type(*(values.get(f.name, getattr(sample.listener, f.name, None)) for f in decoder.fields))


tool = Queue()
