"""How near is each local address to running out of local ports?

One row for each local address, remote address and remote port: connections with the same three, in a network namespace,
each need a local port of their own. A port that bind() has taken is missing to all of them. Such ports have a row for
their local address, too. Of a row: the ports in use by state, the share of the available range, who holds most, how
long connect() looked for a port, and calls that found none. From half of the range on, where connect() begins to look
through both halves, a row is a warning, from 90 % on it is critical.

Without --interval it prints the present state and ends. --warn 50% ends with status 6 if a row reached that share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from tcpscope.errors import UsageError
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.output import Column, endpoint
from tcpscope.ports import Pool, Pools, attach
from tcpscope.request import Option, Request
from tcpscope.run import Batch, Run, Ticker
from tcpscope.schema import Clock
from tcpscope.session import Session, closed_on_error
from tcpscope.tool import Tool

_HALF, _END = 0.5, 0.9


class _Look(msgspec.Struct, frozen=True):
    """A pool in a snapshot, the time of the snapshot, and how long ago the one before was (None: there was none)."""

    pool: Pool
    when: str | float | None
    seconds: float | None
    counts: bool  # what was done since the snapshot before, or since the beginning; a single snapshot cannot say it


class _Of(Column, frozen=True):
    """A column, and the formula of its value."""

    formula: Callable[[_Look], Any] = lambda look: None


_COLUMNS = (
    _Of("time", "time", doc="when the snapshot was taken", formula=lambda look: look.when),
    _Of("netns", doc="network namespace, as inode number", width=10, formula=lambda look: look.pool.netns),
    _Of("family", doc="IP version of the packets", title="IP", formula=lambda look: look.pool.family),
    _Of("laddr", "address", doc="local address", formula=lambda look: look.pool.laddr),
    _Of(
        "raddr",
        "address",
        nullable=True,
        doc="remote address; null: the row is about ports that bind() has taken for the local address",
        formula=lambda look: look.pool.raddr,
    ),
    _Of("rport", nullable=True, doc="remote port", formula=lambda look: look.pool.rport),
    _Of("level", "text", nullable=True, width=8, doc="warning or critical", formula=lambda look: _level(look.pool)),
    _Of(
        "used",
        width=5,
        doc="ports in use: those of the row's sockets, and `bound`",
        formula=lambda look: look.pool.used,
    ),
    _Of(
        "available",
        width=5,
        title="OF",
        nullable=True,
        doc="ports from first_port to last_port, without the reserved ones",
        formula=lambda look: look.pool.range and look.pool.range.available,
    ),
    _Of(
        "percent",
        "float",
        width=5,
        title="%",
        nullable=True,
        doc="share of the available ports that is in use, 100 at most",
        formula=lambda look: None if look.pool.share is None else round(100 * look.pool.share, 1),
    ),
    _Of("syn_sent", width=4, title="SYN", doc="sockets in SYN_SENT", formula=lambda look: look.pool.syn_sent),
    _Of("established", width=5, title="ESTAB", doc="established", formula=lambda look: look.pool.established),
    _Of(
        "closing",
        width=5,
        doc="in FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK or CLOSING",
        formula=lambda look: look.pool.closing,
    ),
    _Of(
        "time_wait",
        width=5,
        title="TIMEWAIT",
        doc="timewait sockets, also those that ss shows in FIN_WAIT2",
        formula=lambda look: look.pool.time_wait,
    ),
    _Of(
        "bound",
        width=5,
        doc="ports of the range that bind() has taken: in the namespace, listeners too; without a remote end: for this "
        "address, without listeners",
        formula=lambda look: look.pool.bound,
    ),
    _Of("pid", width=7, nullable=True, doc="process that holds most", formula=lambda look: _owner(look.pool, "pid")),
    _Of("comm", "comm", nullable=True, doc="name of that process", formula=lambda look: _owner(look.pool, "comm")),
    _Of("uid", width=5, nullable=True, doc="user of that process", formula=lambda look: _owner(look.pool, "uid")),
    _Of(
        "held",
        width=5,
        nullable=True,
        doc="sockets of the row that this process has opened or bound, those in TIME_WAIT too",
        formula=lambda look: _owner(look.pool, "number"),
    ),
    _Of(
        "opened",
        width=6,
        nullable=True,
        doc="calls of connect() since the snapshot before, those that found no port too; null without --interval",
        formula=lambda look: look.pool.opened if look.counts else None,
    ),
    _Of(
        "opened_per_s",
        "float",
        width=6,
        title="OPEN/s",
        nullable=True,
        doc="the same per second",
        formula=lambda look: round(look.pool.opened / look.seconds, 1) if look.seconds else None,
    ),
    _Of(
        "search_us",
        "float",
        unit="us",
        width=8,
        title="SEARCH(us)",
        nullable=True,
        doc="time in connect() from SYN_SENT to the SYN, in which it looks for a port: mean since the snapshot before",
        formula=lambda look: look.pool.search_us,
    ),
    _Of(
        "search_max_us",
        unit="us",
        width=8,
        title="MAX(us)",
        nullable=True,
        doc="the longest of them",
        formula=lambda look: look.pool.search_max_us,
    ),
    _Of(
        "failed",
        width=6,
        nullable=True,
        doc="calls that found no port since the snapshot before; null without --interval",
        formula=lambda look: sum(look.pool.failures.values()) if look.counts else None,
    ),
    _Of(
        "errno",
        "text",
        nullable=True,
        width=13,
        doc="EADDRNOTAVAIL: of connect(), EADDRINUSE: of bind() to port 0; of several the most frequent one",
        formula=lambda look: max(look.pool.failures, key=lambda name: look.pool.failures[name], default=None),
    ),
    _Of(
        "failed_pid",
        width=7,
        nullable=True,
        doc="process whose calls failed most",
        formula=lambda look: look.pool.failing and look.pool.failing.pid,
    ),
    _Of(
        "failed_comm",
        "comm",
        nullable=True,
        doc="name of that process",
        formula=lambda look: look.pool.failing and look.pool.failing.comm,
    ),
    _Of(
        "first_port",
        width=5,
        nullable=True,
        doc="of the range: ip_local_port_range, narrowed by IP_LOCAL_PORT_RANGE; null: the sockets have several ranges",
        formula=lambda look: look.pool.range and look.pool.range.first,
    ),
    _Of(
        "last_port",
        width=5,
        nullable=True,
        doc="the range's last port",
        formula=lambda look: look.pool.range and look.pool.range.last,
    ),
    _Of(
        "reserved",
        width=5,
        nullable=True,
        doc="ports of the range in ip_local_reserved_ports",
        formula=lambda look: look.pool.range and look.pool.range.reserved,
    ),
    _Of(
        "step_width",
        width=5,
        nullable=True,
        doc="ip_local_port_step_width; null: the kernel has no such sysctl",
        formula=lambda look: look.pool.step_width,
    ),
    _Of(
        "tw_reuse",
        width=5,
        nullable=True,
        doc="tcp_tw_reuse: connect() may take a port that is in TIME_WAIT; 2: on the loopback device only",
        formula=lambda look: look.pool.tw_reuse,
    ),
)


def _level(pool: Pool) -> str | None:
    if pool.share is None or pool.share < _HALF:
        return None
    return "critical" if pool.share >= _END else "warning"


def _owner(pool: Pool, name: str) -> Any:
    return pool.owner and getattr(pool.owner, name)


class Ports(Tool):
    probes = ("ports",)
    shown = (
        "time",
        "level",
        "percent",
        "used",
        "available",
        "laddr",
        "raddr",
        "rport",
        "established",
        "time_wait",
        "bound",
        "pid",
        "comm",
        "held",
        "opened_per_s",
        "search_us",
        "failed",
        "errno",
    )
    important = (
        "percent",
        "laddr",
        "raddr",
        "level",
        "comm",
        "used",
        "available",
        "failed",
        "time_wait",
        "pid",
        "established",
        "bound",
        "search_us",
        "errno",
    )
    alarming = {"level": lambda level: level == "critical", "failed": bool}
    once = True
    intervals = "once"
    examples = {
        "ports": "what is in use now",
        "ports -i 5 --raddr 192.0.2.10": "every five seconds, of connections to an address",
        "ports --warn 50% -n 1 -o json": "for a script: status 6 if half of the local ports are in use",
    }
    options = (
        Option(
            ("--warn",),
            "End with status 6 if a row has reached this share of its available ports.",
            str,
            metavar="PERCENT",
        ),
    )
    for_more = {
        "CAP_SYS_ADMIN": "older sockets of other network namespaces than its own",
        "CAP_SYS_PTRACE": "those of network namespaces without a name",
    }

    def columns(self, request: Request) -> tuple[Column, ...]:
        for option, value in request.filter.describe():
            if option in ("--lport", "--port"):
                raise UsageError(f"{option} {value}", "a row has many local ports; --rport is for the remote one")
        _share(request.options["warn"])
        return _COLUMNS

    def open(self, request: Request) -> Run:
        columns = request.choose(self.columns(request), self.shown)
        self.check_duration(request)
        with closed_on_error(attach(request.filter, request.debug)) as session:
            return _InUse(request, columns, session)


def _share(text: str | None) -> float | None:
    """50% as 0.5."""
    if text is None:
        return None
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise UsageError(f"--warn {text}", "give a percentage from above 0 to 100, such as 50%")
    return percent / 100


class _InUse(Run):
    """
    least  leave out rows with a smaller share in use, unless calls have failed
    pools  what the rows of the last snapshot show
    """

    least = 0.0
    pools: Sequence[Pool] = ()

    def __init__(self, request: Request, columns: Sequence[Column], session: Session) -> None:
        super().__init__(columns, session)
        self._session = session
        self._warn, self._clock = _share(request.options["warn"]), Clock(request.time)
        self._pools = Pools(session, request.filter, self.notes)
        self._ticker = Ticker(request.interval, at_once=True)
        self.done = request.interval is None
        self.repeats = "" if self.done else "pool"
        self._row = msgspec.defstruct("Ports", [(column.name, Any) for column in columns])
        self._before_ns: int | None = None
        self._round = 0
        self._said, self._worst = False, 0.0

    def poll(self) -> Iterator[Batch]:
        if self.done or self._ticker.due():
            yield self.look()

    def end(self) -> Iterator[Batch]:
        self._session.end()
        yield from ()

    @property
    def pause(self) -> float:
        return self._ticker.remaining

    def look(self) -> Batch:
        """A snapshot now."""
        self._round += 1
        self.pools = found = self._pools.look(self.least)
        now_ns = monotonic_ns()
        seconds = None if self._before_ns is None else (now_ns - self._before_ns) / 1e9
        self._before_ns = now_ns
        when = None if self._clock.mode == "none" else self._clock.read(now_ns)
        formulas = {column.name: column.formula for column in _COLUMNS}
        looks = [_Look(pool, when, seconds, not self.done) for pool in found]
        self._judge(found)
        if self.done and not found:
            self.notes.append("no socket that matches holds a local port for a connection of its own")
        return Batch(
            "snapshot",
            [self._row(*(formulas[column.name](look) for column in self.columns)) for look in looks],
            self._round,
        )

    def _judge(self, found: list[Pool]) -> None:
        worst = next(iter(found), None)  # those with the largest share come first
        if worst is None or worst.share is None:
            return
        if not self._said and worst.share >= _HALF:
            self._said = True
            self.notes.append(_remedy(worst))
        if self._warn is not None and worst.share >= max(self._warn, self._worst):
            self._worst = worst.share
            self.reached = f"{_name(worst)} had {100 * worst.share:.1f} % of its local ports in use"


def _name(pool: Pool) -> str:
    return pool.laddr if pool.raddr is None else f"{pool.laddr} to {endpoint(pool.raddr, pool.rport or 0)}"


def _remedy(pool: Pool) -> str:
    """What helps against a pool that nears its end."""
    if pool.raddr is None:
        return f"{_name(pool)}: IP_BIND_ADDRESS_NO_PORT before bind() lets destinations share local ports"
    step = "; net.ipv4.ip_local_port_step_width shortens the search" if pool.step_width == 0 else ""
    helps = "a wider net.ipv4.ip_local_port_range, further addresses or fewer, longer connections help"
    return f"{_name(pool)}: {helps}{step}"


tool = Ports()
