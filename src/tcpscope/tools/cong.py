"""How long is each connection in which state of congestion control?

Every interval one row for each connection that was not in Open all the time: its owner, both ends, how long it was in
Open, Disorder, CWR, Recovery and Loss, and how often the state changed. The five times add up to the time for which the
connection existed in the interval. --all adds the connections that were always in Open. At the end comes a row for each
connection over the whole run. --events prints one row per change, --histogram how long the visits to each state were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

import msgspec

from tcpscope.errors import UsageError
from tcpscope.kernel import compiled_filter
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.run import NOTHING, Batch, Run, Ticker
from tcpscope.schema import Clock
from tcpscope.session import POLL_SECONDS, RING_BYTES, Session, closed_on_error, wait_for_programs
from tcpscope.summary import TOTAL, Summary
from tcpscope.tool import Stream

_STATES = ("Open", "Disorder", "CWR", "Recovery", "Loss")  # enum tcp_ca_state, include/uapi/linux/tcp.h
_ENDS = ("time", "pid", "comm", "laddr", "lport", "raddr", "rport")
_TIMES = tuple(
    Column(f"{name.lower()}_us", unit="us", width=8, title=f"{title}(us)", doc=f"time in {name}")
    for name, title in zip(_STATES, ("OPEN", "DISORD", "CWR", "RECOV", "LOSS"), strict=True)
)
_CHANGES = Column("changes", doc="changes of the state")
_TIME = Column("time", "time", doc="when the interval or the run ended")
_NOW = Column(
    "ca_state",
    "text",
    width=8,
    title="STATE",
    doc="state at that moment; null: the connection has ended",
    nullable=True,
)
_TOTALS = 16384
"""At most so many connections have a row at the end."""

_ENDED = 255
"""In place of a state: the connection has ended."""

_NEVER = 1 << 63


def _is_loss(state: str | None) -> bool:
    return state == "Loss"


class Cong(Stream):
    def __init__(self) -> None:
        super().__init__(
            "congestion",
            (*_ENDS, "ca_state", "next_state", "visit_us", "cwnd", "ssthresh"),
            important=("ca_state", "next_state", "visit_us", "raddr", "comm", "time", "pid", "cwnd", "ssthresh"),
            alarming={"loss_us": bool, "ca_state": _is_loss, "next_state": _is_loss},
            aliases=("tcpcong",),
            examples={
                "cong -i 5": "connections that were not always in Open, every five seconds",
                "cong --events --raddr 10.0.0.0/8": "each change of connections to a network",
            },
            options=(
                Option(("--all",), "Print also the connections that were always in Open."),
                Option(("-e", "--events"), "Print one row per change of the state."),
            ),
            summaries=(
                Summary(
                    "histogram",
                    "Print the distribution of the visits to each state, not rows.",
                    ("ca_state",),
                    "visit_us",
                ),
            ),
            constants=lambda request: {"want_all": request.options["all"], "only_followed": _adds_up(request)},
        )
        self.intervals = "1; with --histogram once, at the end"
        self.only_with = {"by": "--histogram", "rate": "--events"}

    def columns(self, request: Request) -> tuple[Column, ...]:
        events, histogram = request.options["events"], request.options["histogram"]
        if events and histogram:
            raise UsageError("--events and --histogram", "one of them at a time")
        if events and request.interval is not None:
            raise UsageError(f"--interval {request.interval:g}", "with --events rows come as events happen")
        if request.options["all"] and (events or histogram):
            raise UsageError("--all", "it goes with neither --events nor --histogram")
        if not events and request.rate is not None:
            raise UsageError(f"--rate {request.rate}", "needs --events")
        if not histogram and request.options["by"] is not None:
            raise UsageError(f"--by {request.options['by']}", "needs --histogram")
        if not _adds_up(request):
            return super().columns(request)
        ends = (Column.of(each) for each in self.layout.fields if each.name in self._whose)
        return (_TIME, *ends, *_TIMES, _CHANGES, _NOW, TOTAL)

    def floods(self, request: Request) -> bool:
        return bool(request.options["events"])

    def skip(self, request: Request) -> tuple[str, ...]:
        return () if _adds_up(request) else ("look",)

    def ring_bytes(self, request: Request) -> int:
        return self.ring_for_all_sockets() if _adds_up(request) else RING_BYTES

    def begin(self, session: Session, request: Request) -> None:
        session.loaded.memory("begun_ns").cast("Q")[0] = monotonic_ns()

    def open(self, request: Request) -> Run:
        available = self.columns(request)
        if not _adds_up(request):
            return super().open(request)
        shown = (*_ENDS, *(each.name for each in (*_TIMES, _CHANGES, _NOW, TOTAL)))
        columns = request.choose(available, shown)
        with closed_on_error(self.session(request)) as session:
            return _AddingUp(request, columns, session, self._whose)

    @property
    def _whose(self) -> tuple[str, ...]:
        """The fields that say whose connection it is."""
        names = [each.name for each in self.layout.fields]
        return tuple(names[1 : names.index("ca_state")])

    def _asked(self, request: Request) -> Summary | None:
        return self.summaries[0] if request.options["histogram"] else None


def _adds_up(request: Request) -> bool:
    """Whether the request asks for times in intervals."""
    return not (request.options["events"] or request.options["histogram"])


@dataclass
class _Spent:
    """What a connection did in an interval, or in the whole run."""

    us: list[int] = field(default_factory=lambda: [0] * len(_STATES))
    changes: int = 0

    def __iadd__(self, other: _Spent) -> _Spent:
        self.us = list(map(add, self.us, other.us))
        self.changes += other.changes
        return self

    @property
    def was_elsewhere(self) -> bool:
        return bool(self.changes or any(self.us[1:]))


@dataclass
class _Connection:
    """A connection, and its visits up to `until_us`, in microseconds of the kernel's clock.

    at_border  the state that it was in when the interval ended; _ENDED: none
    total      up to the last border
    after      what it did after the border at which this interval ends
    """

    until_us: int
    ends: Any = None
    state: int = 0
    at_border: int = 0
    round: int = 0
    total: _Spent = field(default_factory=_Spent)
    now: _Spent = field(default_factory=_Spent)
    after: _Spent = field(default_factory=_Spent)

    @classmethod
    def found(cls, raw: Any, began_us: int) -> _Connection:
        """One that is not known yet: it has been in one state since then, or since before this interval began."""
        connection = cls(began_us)
        connection.total.us[raw.ca_state] += max(0, began_us - raw.since_ns // 1000)
        return connection

    def visit(self, raw: Any, border_us: int) -> None:
        until_us = raw.time // 1000
        self.spend(raw.ca_state, raw.since_ns // 1000, until_us, border_us)
        self.state = raw.next_state
        if raw.next_state not in (raw.ca_state, _ENDED):
            (self.now if until_us <= border_us else self.after).changes += 1

    def spend(self, state: int, since_us: int, until_us: int, border_us: int) -> None:
        """It was in this state. What is known already does not count again."""
        since_us = max(since_us, self.until_us)
        self.now.us[state] += max(0, min(until_us, border_us) - since_us)
        self.after.us[state] += max(0, until_us - max(since_us, border_us))
        self.until_us = max(self.until_us, until_us)
        if since_us <= border_us < until_us:
            self.at_border = state

    def end_interval(self, border_us: int) -> _Spent:
        """What it did in the interval. From its last change until the border it was in one state."""
        if self.until_us <= border_us:
            if self.state != _ENDED:
                self.spend(self.state, self.until_us, border_us, border_us)
            self.at_border = self.state
        ended, self.now, self.after = self.now, self.after, _Spent()
        self.total += ended
        return ended

    def has_ended(self, border_us: int) -> bool:
        return self.state == _ENDED and self.until_us <= border_us


class _AddingUp(Run):
    """Adds up visits by interval. A look may pass by an entry of the table: it stays known for the next one."""

    repeats = "connection"

    def __init__(self, request: Request, columns: Sequence[Column], session: Session, ends: Sequence[str]) -> None:
        super().__init__(columns, session)
        assert session.layout is not None
        self.important = ("loss_us", "recovery_us", "raddr", "changes", "ca_state", "open_us", "comm", "disorder_us")
        self._session, self._clock, self._all = session, Clock(request.time), request.options["all"]
        self._raw = session.spec.layout("congestion", internal=True).decoder(raw=True).rows
        self._decode = session.layout.select(ends).decoder().rows
        self._labels = session.layout.field("ca_state").labels or {}
        self._row = msgspec.defstruct("Congestion", [(column.name, Any) for column in columns])
        self._ticker = Ticker(request.interval or 1.0)
        self._known: dict[tuple[int, int], _Connection] = {}
        self._ended: list[_Connection] = []
        self._without_total = 0
        self._changes_owner = compiled_filter.asks_owner(request.filter)  # accept() may take it out of the filter
        self._round = self._lost = 0
        self._began_us: int = session.loaded.memory("begun_ns").cast("Q")[0] // 1000

    def poll(self) -> Iterator[Batch]:
        self._take(_NEVER)
        if self._ticker.due():
            border_us = self._look()
            wait_for_programs()  # one may have seen a change before the border, and not sent it yet
            yield self._interval(border_us)
        else:
            yield NOTHING

    def end(self) -> Iterator[Batch]:
        border_us = self._look()
        self._session.end()
        yield self._interval(border_us)
        connections = [*self._ended, *self._known.values()]
        yield Batch("total", self._rows(border_us, ((each, each.total) for each in connections), True), self._round)
        if self._without_total:
            self.notes.append(f"{self._without_total} connections that have ended have no total")

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._session.descriptors

    @property
    def pause(self) -> float:
        return min(POLL_SECONDS, self._ticker.remaining)

    def _look(self) -> int:
        """Ask for the visits that go on now. Returns the time at which the interval ends."""
        self._round += 1
        border_us = monotonic_ns() // 1000
        self._session.loaded.run("look")
        return border_us

    def _take(self, border_us: int) -> None:
        for records in self._session.batches():
            for raw, ends in zip(self._raw(records), self._decode(records), strict=True):
                self.stats.shown += 1
                key = raw.socket, raw.opened_ns
                if key not in self._known:
                    self._known[key] = _Connection.found(raw, self._began_us)
                connection = self._known[key]
                connection.ends, connection.round = ends, self._round
                connection.visit(raw, border_us)

    def _interval(self, border_us: int) -> Batch:
        self._take(border_us)
        spent = [(each, each.end_interval(border_us)) for each in self._known.values()]
        self._began_us = border_us
        rows = self._rows(border_us, spent, False)
        self._forget(border_us)
        return Batch("snapshot", rows, self._round)

    def _rows(self, border_us: int, spent: Iterable[tuple[_Connection, _Spent]], total: bool) -> list[Any]:
        """Those first that were in another state than Open for the longest time."""
        when = None if self._clock.mode == "none" else self._clock.read(border_us * 1000)
        shown = [(each, did) for each, did in spent if self._all or did.was_elsewhere]
        shown.sort(key=lambda found: -sum(found[1].us[1:]))
        return [self._make(each, did, when, total) for each, did in shown]

    def _make(self, connection: _Connection, spent: _Spent, when: Any, total: bool) -> Any:
        state = connection.at_border
        values = dict(zip((column.name for column in _TIMES), spent.us, strict=True)) | {
            "time": when,
            "changes": spent.changes,
            "ca_state": None if state == _ENDED else self._labels.get(state, str(state)),
            "total": total,
        }
        names = (column.name for column in self.columns)
        return self._row(*(values[name] if name in values else getattr(connection.ends, name) for name in names))

    def _forget(self, border_us: int) -> None:
        """What has ended; and what neither this look nor the one before has seen, unless one of them lost something."""
        before, self._lost = self._lost, self._session.counters()["lost"]
        for key, connection in list(self._known.items()):
            unseen = self._lost == before and connection.round < self._round - 1
            if not unseen and not connection.has_ended(border_us):
                continue
            del self._known[key]
            self.stats.missed += not connection.has_ended(border_us) and not self._changes_owner
            if len(self._ended) < _TOTALS:
                self._ended.append(connection)
            else:
                self._without_total += 1


tool = Cong()
