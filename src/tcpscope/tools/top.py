"""Who moves bytes now?

Every interval one row for each connection that has sent or received data in it: its owner, both ends, how many bytes
and how fast, the round-trip time, and what kept the sender from sending more. --by adds up connections: by process
(pid), remote address (raddr), cgroup, or other columns. Most bytes first, or --sort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from tcpscope.errors import UsageError, did_you_mean
from tcpscope.limits import LIMITS, UNKNOWN, Chronograph
from tcpscope.output import Column
from tcpscope.request import Option, Request, names_in
from tcpscope.run import Run
from tcpscope.session import Session, closed_on_error
from tcpscope.tool import Stream
from tcpscope.traffic import (
    BYTES,
    NOTHING_MOVED,
    RATES,
    SORT,
    TIME,
    Counting,
    Interval,
    Moved,
    moved_columns,
    skipped,
    sorted_by,
)

_CONNECTIONS = Column("connections", width=5, title="CONNS", doc="connections that have moved data in the interval")
_NOUNS = {"pid": "process", "raddr": "remote address", "cgroup": "cgroup"}
_NUMBERS = ("time", "srtt_us", *BYTES)
_ROWS = 1 << 17
"""Most rows of an interval. Events of further ones count as lost."""


class Top(Stream):
    intervals = "1"
    rated = False

    def _whose(self) -> dict[str, Column]:
        """The columns that say whose the bytes are."""
        return {each.name: Column.of(each) for each in self.layout.fields if each.name not in _NUMBERS}

    def columns(self, request: Request) -> tuple[Column, ...]:
        whose, by = self._whose(), _by(request)
        for name in by:
            if name == "connection":
                raise UsageError(f"--by {','.join(by)}", "connection stands alone")
            if name not in whose:
                hint = did_you_mean(name, ("connection", *whose)) or f"there are connection, {', '.join(whose)}"
                raise UsageError(f"--by {name}", hint)
        if not by:
            return (TIME, *whose.values(), *moved_columns(), Column.of(self.layout.field("srtt_us")), *LIMITS)
        return (TIME, *(whose[name] for name in _named(by)), _CONNECTIONS, *moved_columns())

    def floods(self, request: Request) -> bool:
        return False

    def skip(self, request: Request) -> tuple[str, ...]:
        return skipped(request, self.columns(request))

    def ring_bytes(self, request: Request) -> int:
        return self.ring_for_all_sockets()

    def open(self, request: Request) -> Run:
        available, by = self.columns(request), _by(request)
        names = ("time", *_named(by), "connections", *self.shown) if by else self.shown
        columns, whose = request.choose(available, tuple(dict.fromkeys(names))), self._whose()
        sort = sorted_by(request, [column for column in available if column.name not in whose])
        with closed_on_error(self.session(request)) as session:
            return _Adding(request, columns, sort, session, by, [each.name for each in available])


def _by(request: Request) -> tuple[str, ...]:
    """The columns to add up by; empty: each connection has its row."""
    names = names_in(request.options["by"])
    if not names:
        raise UsageError("--by is empty", "give names of columns, separated by commas")
    return () if names == ("connection",) else names


def _named(by: Sequence[str]) -> tuple[str, ...]:
    """The columns of a group: with a process its name, too."""
    return tuple(dict.fromkeys(name for each in by for name in ((each, "comm") if each == "pid" else (each,))))


@dataclass
class _Group:
    """A connection or several. `row` is what the newest event says of it, and `raw` that event."""

    raw: Any
    row: Any
    moved: Moved = NOTHING_MOVED
    connections: int = 0
    limits: Chronograph = field(default_factory=Chronograph)


class _Adding(Counting):
    """Adds up by connection, or by columns."""

    def __init__(
        self,
        request: Request,
        columns: Sequence[Column],
        sort: str | None,
        session: Session,
        by: Sequence[str],
        available: Sequence[str],
    ) -> None:
        assert session.layout is not None
        fields = [each.name for each in session.layout.fields if each.name in available and each.name not in BYTES]
        self._whose = [name for name in fields if name != "time"]
        self._decode = session.layout.select(self._whose).decoder().rows
        self._by, self._key = bool(by), _key(by)
        self._groups: dict[Any, _Group] = {}
        self.repeats = _NOUNS.get(",".join(by), "group") if by else "connection"
        super().__init__(request, columns, sort, session)

    def _rows_of(self, records: memoryview) -> Sequence[Any]:
        return self._decode(records)

    def _add(self, raw: Any, row: Any, moved: Moved, first: bool, overlaps: bool) -> None:
        key = self._key(raw, row)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= _ROWS:
                self.stats.shown -= 1
                self.stats.lost += 1
                return
            group = self._groups[key] = _Group(raw, row)
        group.raw, group.row, group.moved = raw, row, group.moved.plus(moved)
        group.connections += first
        if not overlaps:
            group.limits.add(raw)

    def _ended(self, interval: Interval) -> list[dict[str, Any]]:
        ended, self._groups = self._groups, {}
        return [self._values(group, interval) for group in ended.values()]

    def _values(self, group: _Group, interval: Interval) -> dict[str, Any]:
        values = {name: getattr(group.row, name) for name in self._whose} | group.moved.values(interval.us)
        if self._by:
            return values | {"connections": group.connections}
        if not (group.moved.tx or group.moved.retrans):
            return values | UNKNOWN
        until_ns = min(group.raw.time, interval.ended_ns) if group.raw.ended else interval.ended_ns
        return values | group.limits.shares((until_ns - max(interval.began_ns, group.raw.opened_ns)) // 1000)


def _key(by: Sequence[str]) -> Callable[[Any, Any], Any]:
    """Gives the group of an event."""
    if not by:
        return lambda raw, row: (raw.socket, raw.opened_ns)
    values = attrgetter(*by)
    return lambda raw, row: values(row)


tool = Top(
    "traffic",
    ("time", *BYTES, *RATES, "srtt_us", "limit", "pid", "comm", "raddr", "rport", "laddr", "lport"),
    important=(*BYTES[:2], "raddr", "comm", "limit", "pid", "srtt_us", *BYTES[2:], "connections", *RATES[2:], "laddr"),
    aliases=("tcptop",),
    examples={
        "top -n 10": "the ten connections that move most",
        "top --by pid -i 5": "by process, every five seconds",
        "top --sort retrans_pct": "those first that lose most",
    },
    options=(
        Option(
            ("--by",),
            "Add up by connection, or by these columns, comma-separated: pid, raddr, cgroup, ...",
            str,
            "connection",
            names=True,
            metavar="NAMES",
        ),
        SORT,
    ),
)
