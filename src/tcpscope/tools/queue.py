"""Which listener's SYN queue or accept queue overflows, whose is it, and how full are they?

Without options it shows a table of all listeners: both queue lengths, their limit and its origin, owner, refusals,
accepts, and how long the oldest connection has waited. A terminal is refreshed; a pipe gets rows every interval. With
--events it shows one row per refused handshake: which queue, at which step (SYN or final ACK), from whom, and the
lengths and limits at that moment. --stack adds the kernel stack.

Refusals come from the kernel's own counters, so they sum to TcpExtListenOverflows, TCPReqQFullDrop and SyncookiesSent
exactly. On kernels before 6.11 whose functions cannot be hooked, it samples TcpExtListenDrops, and names the listener
whose socket has dropped packets meanwhile. Then the peer is not known, and the cause and the step only at times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec

from tcpscope import listeners, sampling
from tcpscope.errors import UnsupportedError, UsageError
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.symbols import kernel_symbols
from tcpscope.listeners import Key, Listener, Snapshots
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.run import Batch, OverRate, Run, Streaming, Ticker
from tcpscope.sampling import Sample, Sampler
from tcpscope.schema import Clock, Decoder
from tcpscope.session import RING_BYTES, Session, closed_on_error
from tcpscope.tool import Stream

_TABLE = (
    "time",
    "laddr",
    "lport",
    "pid",
    "comm",
    "accept_queue",
    "accept_limit",
    "limit_from",
    "syn_queue",
    "overflows",
    "syn_drops",
    "cookies",
    "accepts_per_s",
    "since_accept_ms",
    "oldest_wait_ms",
)
_TABLE_IMPORTANT = (
    "laddr",
    "overflows",
    "accept_queue",
    "accept_limit",
    "oldest_wait_ms",
    "time",
    "comm",
    "pid",
    "syn_queue",
    "syn_drops",
    "accepts_per_s",
    "limit_from",
    "cookies",
    "since_accept_ms",
)
_REFUSALS = ("overflows", "syn_drops", "cookies")
_QUEUES = ("accept_queue", "accept_limit", "syn_queue")
_EVENTS = (
    "time",
    "laddr",
    "lport",
    "pid",
    "comm",
    "raddr",
    "rport",
    "cause",
    "step",
    "answer",
    "accept_queue",
    "accept_limit",
    "syn_queue",
    "syncookies",
    "count",
)


_EVENTS_IMPORTANT = (
    "cause",
    "laddr",
    "count",
    "raddr",
    "time",
    "step",
    "comm",
    "answer",
    "pid",
    "accept_queue",
    "accept_limit",
    "syn_queue",
)


class _Look(NamedTuple):
    """A listener in a snapshot, the time of the snapshot, and the accepts per second since the snapshot before."""

    listener: Listener
    when: str | float | None
    accepts_per_s: float | None


class _Derived(Column, frozen=True):
    """A column that is not in the kernel's record. `formula` computes its value."""

    formula: Callable[[_Look], Any] = lambda look: None

    @classmethod
    def refused(cls, name: str, doc: str, *causes: str, step: str | None = None) -> _Derived:
        """A column that counts refusals for these causes, at `step` or at both; None if they cannot be counted."""
        return cls(name, doc=doc, nullable=True, formula=lambda look: look.listener.count(*causes, step=step))


_DERIVED = (
    _Derived("time", "time", doc="when the snapshot was taken", formula=lambda look: look.when),
    _Derived("family", doc="IP version of the address", title="IP", formula=lambda look: look.listener.family),
    _Derived("laddr", "address", doc="address it listens on", formula=lambda look: look.listener.laddr),
    _Derived("lport", doc="port it listens on", formula=lambda look: look.listener.lport),
    _Derived(
        "pid",
        doc="process that accepts from it; if that is not known, one that holds it and should",
        width=7,
        formula=lambda look: look.listener.owner and look.listener.owner.pid,
    ),
    _Derived(
        "comm",
        "comm",
        doc="name of that process",
        formula=lambda look: look.listener.owner and look.listener.owner.comm,
    ),
    _Derived(
        "limit_from",
        "text",
        doc="where that limit comes from: listen()'s backlog or somaxconn (derived)",
        formula=lambda look: look.listener.limit_from,
    ),
    _Derived.refused(
        "overflows",
        "handshakes refused because the accept queue was full, since the tool first saw the listener",
        "ACCEPT_QUEUE_FULL",
    ),
    _Derived.refused("overflows_at_syn", "overflows at the SYN", "ACCEPT_QUEUE_FULL", step="SYN"),
    _Derived.refused(
        "overflows_at_ack",
        "overflows at the final ACK: the client believes it is connected",
        "ACCEPT_QUEUE_FULL",
        step="ACK",
    ),
    _Derived.refused(
        "syn_drops",
        "SYNs refused because the SYN queue was full, or its last quarter reserved",
        "SYN_QUEUE_FULL",
        "SYN_QUEUE_RESERVED",
    ),
    _Derived.refused("cookies", "SYNs answered by a SYN cookie", "COOKIE_SENT"),
    _Derived(
        "accepts",
        doc="accept() calls that returned a connection, since the tool first saw the listener",
        nullable=True,
        formula=lambda look: look.listener.accepts,
    ),
    _Derived(
        "accepts_per_s",
        "float",
        doc="accepts per second, since the snapshot before",
        nullable=True,
        title="ACCEPT/s",
        formula=lambda look: look.accepts_per_s,
    ),
    _Derived(
        "since_accept_ms",
        unit="ms",
        doc="time since the last accept()",
        nullable=True,
        title="LAST(ms)",
        formula=lambda look: _ms(look.listener.since_accept_us),
    ),
    _Derived(
        "oldest_wait_ms",
        unit="ms",
        doc="how long ago the kernel answered the connection at the head of the accept queue with its first SYN-ACK",
        nullable=True,
        title="WAIT(ms)",
        formula=lambda look: _ms(look.listener.oldest_wait_us),
    ),
    _Derived("holders", "list", doc="every process that holds it", formula=lambda look: list(look.listener.holders)),
)
_ORDER = (
    "time",
    "netns",
    "family",
    "laddr",
    "lport",
    "pid",
    "comm",
    "accept_queue",
    "accept_limit",
    "limit_from",
    "syn_queue",
    "overflows",
    "overflows_at_syn",
    "overflows_at_ack",
    "syn_drops",
    "cookies",
    "drops",
    "accepts",
    "accepts_per_s",
    "since_accept_ms",
    "oldest_wait_ms",
    "somaxconn",
    "max_syn_backlog",
    "syncookies",
    "abort_on_overflow",
    "cookie",
    "holders",
)


def _columns() -> tuple[Column, ...]:
    """All columns of a listener: those of the kernel's record, and derived ones."""
    read = {field.name: Column.of(field) for field in Spec.of("listeners").layout("listener").fields}
    # Of an event they are unknown if several listeners of the address may have refused.
    read |= {name: msgspec.structs.replace(read[name], nullable=False) for name in _QUEUES}
    known: dict[str, Column] = read | {column.name: column for column in _DERIVED}
    return tuple(known[name] for name in _ORDER)


def _value_of(column: Column, look: _Look) -> Any:
    return column.formula(look) if isinstance(column, _Derived) else getattr(look.listener, column.name)


class _Rates:
    """Accepts per second between this snapshot and the one before."""

    def __init__(self) -> None:
        self._before: dict[Key, int] = {}
        self._when = 0.0

    def of(self, found: Iterable[Listener]) -> dict[Key, float]:
        """The rate of each listener that was in the snapshot before, too."""
        before, began = self._before, self._when
        self._before = {own.key: own.accepts for own in found if own.accepts is not None}
        self._when = time.monotonic()
        elapsed = self._when - began
        return {
            key: round((accepts - before[key]) / elapsed, 1)
            for key, accepts in self._before.items()
            if key in before and before[key] <= accepts and elapsed > 0
        }


def _ms(us: int | None) -> int | None:
    return None if us is None else us // 1000


def _by_urgency(listeners: Iterable[Listener]) -> list[Listener]:
    """Listeners that refuse come first, then the fullest."""
    return sorted(
        listeners,
        key=lambda own: (
            -(own.count("ACCEPT_QUEUE_FULL") or 0),
            -own.accept_queue / (own.accept_limit + 1),
            own.lport,
            own.laddr,
        ),
    )


class Queue(Stream):
    """Two views of the probe `listeners`: its snapshots, and with --events its event stream."""

    intervals = "1"
    for_more: ClassVar = {"CAP_SYSLOG": "names of functions in --stack; without it, addresses"}

    def __init__(self) -> None:
        self.only_with = dict.fromkeys(("stack", "rport", "raddr", "buffer"), "--events")
        super().__init__(
            "listeners",
            _EVENTS,
            important=_EVENTS_IMPORTANT,
            alarming={"overflows": bool, "syn_drops": bool},
            event="overflow",
            examples={
                "queue": "all listeners, again every second",
                "queue --events -L 443": "each refused handshake of one port",
            },
            options=(
                Option(("-e", "--events"), "Print one row per refused handshake."),
                Option(("--stack",), "Print the kernel stack of each refusal."),
            ),
        )

    def columns(self, request: Request) -> tuple[Column, ...]:
        events, stack = request.options["events"], request.options["stack"]
        if events and request.interval is not None:
            raise UsageError(f"--interval {request.interval:g}", "with --events rows come as events happen")
        for option, given in (("--stack", stack or None), ("--buffer", request.buffer), ("--rate", request.rate)):
            if given is not None and not events:
                raise UsageError(option, "it goes with --events")
        if not events:
            request.refuse_peers("a listener has no remote end; with --events the peers are known")
        return super().columns(request) if events else _columns()

    def floods(self, request: Request) -> bool:
        return bool(request.options["events"])

    def open(self, request: Request) -> Run:
        available = self.columns(request)
        if not request.options["events"]:
            columns = request.choose(available, _TABLE)
            with closed_on_error(self.session(request)) as session:
                return _Table(request, columns, session)
        shown = (*_EVENTS, "stack") if request.options["stack"] else _EVENTS
        names = [column.name for column in request.choose(available, shown)]
        return self.events(request, names, Clock(request.time))

    def events(self, request: Request, names: Sequence[str], clock: Clock) -> Run:
        stack = bool(request.options["stack"])
        with closed_on_error(self.session(request)) as session:
            assert session.layout is not None
            decoder = session.layout.select(names).decoder(clock, frame=kernel_symbols().name if stack else hex)
            if why := listeners.why_sampled(session):
                _refuse_unknown(request)
                run: Run = _Sampling(session, decoder, clock, request.rate or 0)
                run.notes.append(f"{why}: {sampling.LIMITS}")
            else:
                run = Streaming(session, decoder, _with_function if stack else None, request.rate or 0)
                if stack and not len(kernel_symbols()):
                    run.notes.append("functions are shown as addresses: the names need CAP_SYSLOG")
        return run

    def session(self, request: Request, by: Sequence[str] = (), number: str | None = None) -> Session:
        return listeners.open_session(
            request.filter,
            events=bool(request.options["events"]),
            stacks=bool(request.options["stack"]),
            ring_bytes=request.buffer or RING_BYTES,
            rate_per_s=request.rate or 0,
            debug=request.debug,
        )


class _Table(Run):
    """All listeners, every --interval."""

    accounts = False
    repeats = "listener"

    def __init__(self, request: Request, columns: Sequence[Column], session: Session) -> None:
        super().__init__(columns, session)
        self.important = _TABLE_IMPORTANT
        if why := listeners.why_sampled(session):
            self.important = tuple(name for name in _TABLE_IMPORTANT if name not in _REFUSALS)
            self.notes.append(f"{why}: refusals are not counted here; --events and diagnose sample them")
        self._session, self._clock = session, Clock(request.time)
        self._snapshots = Snapshots(session)
        self._rates, self._ticker = _Rates(), Ticker(request.interval or 1.0, at_once=True)
        self._row = msgspec.defstruct("Listener", [(column.name, Any) for column in columns])
        self._round = 0

    def poll(self) -> Iterator[Batch]:
        if not self._ticker.due():
            return
        self._round += 1
        when = None if self._clock.mode == "none" else self._clock.read(monotonic_ns())
        found = _by_urgency(self._snapshots.look())
        rates = self._rates.of(found)
        looks = [_Look(listener, when, rates.get(listener.key)) for listener in found]
        rows = [self._row(*(_value_of(column, look) for column in self.columns)) for look in looks]
        yield Batch("snapshot", rows, self._round)

    def end(self) -> Iterator[Batch]:
        self._session.end()
        if self._session.counters()["table_full"]:
            self.notes.append(f"not all listeners are shown: there is room for {listeners.LISTENERS_AT_MOST} at a time")
        yield from ()

    @property
    def pause(self) -> float:
        return self._ticker.remaining


class _Sampling(Run):
    """Rows like those of events, for the refusals between two snapshots."""

    counted = True

    def __init__(self, session: Session, decoder: Decoder, clock: Clock, rate: int) -> None:
        super().__init__([Column.of(field) for field in decoder.fields], session)
        self._session, self._decoder, self._clock = session, decoder, clock
        self._rate, self._second, self._given = rate, 0, 0
        self._over = OverRate(rate, self.notes)
        self._ticker, self._sampler = Ticker(sampling.SECONDS), Sampler()
        self._snapshots = Snapshots(session)
        self._sampler.look(self._snapshots.look(all_=True))

    def poll(self) -> Iterator[Batch]:
        if self._ticker.due():
            yield self._look()
        self._over.say(lambda: {"limited": self.stats.limited})

    def end(self) -> Iterator[Batch]:
        yield self._look(fresh=True)
        self._over.say(lambda: {"limited": self.stats.limited}, at_once=True)
        self._session.end()

    @property
    def pause(self) -> float:
        return self._ticker.remaining

    def _look(self, fresh: bool = False) -> Batch:
        samples = self._sampler.look(self._snapshots.look(all_=True, fresh=fresh))
        when = self._clock.read(monotonic_ns())
        rows = [_row(self._decoder, sample, when) for sample in samples if sample.listener.wanted]
        self.stats.seen += len(samples)
        self.stats.filtered += len(samples) - len(rows)
        shown = self._within_rate(rows)
        self.stats.shown += len(shown)
        self.stats.limited += len(rows) - len(shown)
        return Batch("event", shown)

    def _within_rate(self, rows: list[Any]) -> list[Any]:
        if (second := monotonic_ns() // 10**9) != self._second:
            self._second, self._given = second, 0
        shown = rows[: max(0, self._rate - self._given)] if self._rate else rows
        self._given += len(shown)
        return shown


def _with_function(rows: list[Any]) -> list[Any]:
    """Add the function that refused at the front of a stack: with the trampolines of 7.2 its frame is missing."""
    for row in rows:
        stack: list[str] = getattr(row, "stack", None) or []
        named = any("+" in frame for frame in stack)
        if named and getattr(row, "step", None) == "SYN" and not any("tcp_conn_request" in frame for frame in stack):
            stack.insert(0, "tcp_conn_request")
    return rows


def _refuse_unknown(request: Request) -> None:
    """Raise UnsupportedError if the run needs what sampling does not know."""
    for option, value in request.filter.describe():
        if option in ("--rport", "--raddr"):
            raise UnsupportedError(f"{option} {value}", "peers are not known where refusals are sampled")
    if request.options["stack"]:
        raise UnsupportedError("--stack", "there are no stacks where refusals are sampled")


def _row(decoder: Decoder, sample: Sample, when: str | float) -> Any:
    owner = sample.listener.owner
    values = {
        "time": when,
        "cause": sample.cause or "UNKNOWN",
        "step": sample.step,
        "count": sample.count,
        "pid": owner.pid if owner else None,
        "comm": owner.comm if owner else None,
        "uid": owner.uid if owner else None,
    }
    return decoder.row_type(*(values.get(f.name, getattr(sample.listener, f.name, None)) for f in decoder.fields))


tool = Queue()
