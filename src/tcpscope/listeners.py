"""Listeners as they are now: queues, limits and where they come from, holders, activity. For `queue` and `diagnose`."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from tcpscope.filters import Filter, address_text
from tcpscope.kernel import filtering
from tcpscope.kernel.features import Kernel
from tcpscope.output import Column
from tcpscope.schema import comm_text
from tcpscope.session import Session

UNREAD = 2**64 - 1
STEPS = ("syn", "ack")
CAUSES = ("ACCEPT_QUEUE_FULL", "SYN_QUEUE_FULL", "COOKIE_SENT", "SYN_QUEUE_RESERVED", "OTHER")
MIB = {
    "mib_listen_overflows": "LINUX_MIB_LISTENOVERFLOWS",
    "mib_listen_drops": "LINUX_MIB_LISTENDROPS",
    "mib_reqq_full_cookies": "LINUX_MIB_TCPREQQFULLDOCOOKIES",
    "mib_reqq_full_drop": "LINUX_MIB_TCPREQQFULLDROP",
}
"""Constants of the probe -> the enumerator of the kernel that each is the number of."""


class Holder(msgspec.Struct, frozen=True, order=True):
    """A process that has the listener open as file descriptor `fd`."""

    pid: int
    comm: str
    uid: int
    fd: int

    def __str__(self) -> str:
        return f"{self.comm}({self.pid})"


class NetCounters(NamedTuple):
    """A namespace's ListenDrops, ListenOverflows and TCPReqQFullDrop; read only where refusals have to be sampled."""

    drops: int
    overflows: int
    full: int


@dataclass(frozen=True)
class Listener:
    """One listening socket at one moment.

    `refused` counts by (step, cause) since the tool saw it first, None where the kernel's functions cannot be hooked;
    `drops` is the socket's own count since listen(): a refused SYN is one, a refused final ACK two, because there the
    kernel counts the refusal and the packet that is thrown away with it.
    `oldest_wait_us` is the time since the SYN-ACK of the connection at the head of the accept queue was sent.
    """

    socket: int
    cookie: int | None
    netns: int
    family: int
    laddr: str
    lport: int
    holders: tuple[Holder, ...]
    accept_queue: int
    accept_limit: int
    syn_queue: int
    somaxconn: int
    max_syn_backlog: int
    syncookies: int
    abort_on_overflow: bool
    drops: int
    accepts: int | None
    since_accept_us: int | None
    oldest_wait_us: int | None
    refused: dict[tuple[str, str], int] | None = field(default=None, repr=False)
    counters: NetCounters | None = field(default=None, repr=False)
    wanted: bool = True

    @property
    def key(self) -> tuple[int, int | None]:
        """What tells it from others, also from a later one at the same address where the kernel gives cookies."""
        return self.socket, self.cookie

    @property
    def limit_from(self) -> str:
        """Where the limit of the accept queue comes from. Derived: listen() cuts its backlog to somaxconn."""
        if self.accept_limit < self.somaxconn:
            return "listen()"
        return "somaxconn" if self.accept_limit == self.somaxconn else "listen(), before somaxconn was lowered"

    @property
    def owner(self) -> Holder | None:
        """The first of the holders."""
        return self.holders[0] if self.holders else None

    def count(self, cause: str, step: str | None = None) -> int | None:
        """Refusals of that cause, at one step or at both; None if not known."""
        if self.refused is None:
            return None
        return sum(n for (s, c), n in self.refused.items() if c == cause and step in (None, s))

    @property
    def name(self) -> str:
        """Address and port as ss writes them."""
        return f"[{self.laddr}]:{self.lport}" if self.family == 6 else f"{self.laddr}:{self.lport}"


def open_session(
    filter: Filter, *, events: bool, stacks: bool = False, ring_bytes: int, debug: bool = False
) -> Session:
    """The probe `listeners`, with the numbers of the kernel's counters filled in."""
    kernel = Kernel()
    constants: dict[str, Any] = {"send_events": events, "send_stacks": stacks}
    skip = []
    for name, enumerator in MIB.items():
        value = kernel.enumerator(enumerator)
        if value is None:  # without their numbers the counters cannot be read, and the hooks are of no use
            skip = ["syn_enter", "syn_exit", "ack4_enter", "ack4_exit", "ack6_enter", "ack6_exit"]
        constants[name] = value or 0
    return Session("listeners", "overflow", filter, constants=constants, skip=skip, ring_bytes=ring_bytes,
                   kernel=kernel, debug=debug)  # fmt: skip


def sees_refusals(session: Session) -> bool:
    """Whether every refusal is seen as it happens; otherwise they can only be sampled."""
    return why_sampled(session) is None


def why_sampled(session: Session) -> str | None:
    """Why refusals are not seen as they happen; None if they are."""
    hooks = session.loaded.hooks
    for name in ("syn_enter", "syn_exit", "ack4_enter", "ack4_exit", "ack6_enter", "ack6_exit"):
        if name not in hooks:
            return "the kernel's BTF does not number its counters"
        if hooks[name].program is None:
            return list(hooks[name].refused.values())[-1]
    return None


def snapshot(session: Session, all_: bool = False) -> list[Listener]:
    """Every listener that the filter wants, with every process that holds it; with `all_` the others too."""
    layout = session.spec.layout("listener", internal=True)
    decode = layout.decoder(raw=True).rows
    records = [row for piece in session.loaded.iterate("snapshot") for row in decode(piece)]
    exact = sees_refusals(session)
    accepts = session.loaded.hooks["accept"].program is not None
    return [own for own in _join(records, exact, accepts, session.residual) if own.wanted or all_]


def _join(records: Iterable[Any], exact: bool, accepts: bool, residual: Filter) -> Iterator[Listener]:
    listeners: dict[int, tuple[Any, list[Holder]]] = {}
    wanted = set()
    for record in records:
        holder = Holder(record.pid, comm_text(record.comm), record.uid, record.fd)
        listeners.setdefault(record.socket, (record, []))[1].append(holder)
        if record.wanted and filtering.matches(residual, record):
            wanted.add(record.socket)
    for socket, (record, holders) in listeners.items():
        yield _listener(record, tuple(sorted(set(holders))), exact, accepts, socket in wanted)


def _listener(record: Any, holders: tuple[Holder, ...], exact: bool, accepts: bool, wanted: bool) -> Listener:
    counts = struct.unpack("<18Q", record.refused)
    refused = {
        (step, cause): counts[s * 6 + c]
        for s, step in enumerate(STEPS, 1)
        for c, cause in enumerate(CAUSES, 1)
    }
    since = (record.now_ns - record.last_accept_ns) // 1000 if record.last_accept_ns else None
    waiting = record.accept_queue and record.oldest_synack_us
    return Listener(
        socket=record.socket,
        cookie=record.cookie or None,
        netns=record.netns,
        family=record.family,
        laddr=address_text(record.laddr),
        lport=record.lport,
        holders=holders,
        accept_queue=record.accept_queue,
        accept_limit=record.accept_limit,
        syn_queue=record.syn_queue,
        somaxconn=record.somaxconn,
        max_syn_backlog=record.max_syn_backlog,
        syncookies=record.syncookies,
        abort_on_overflow=bool(record.abort_on_overflow),
        drops=record.drops,
        accepts=record.accepts if accepts else None,
        since_accept_us=since if accepts else None,
        oldest_wait_us=max(0, record.now_ns // 1000 - record.oldest_synack_us) if waiting else None,
        refused=refused if exact else None,
        counters=None if record.net_drops == UNREAD else NetCounters(
            record.net_drops, record.net_overflows, record.net_full
        ),
        wanted=wanted,
    )


COLUMNS = (
    Column("time", "time", doc="when the snapshot was taken"),
    Column("netns", doc="network namespace, as inode number"),
    Column("family", doc="IP version of the address"),
    Column("laddr", "address", doc="address it listens on"),
    Column("lport", doc="port it listens on"),
    Column("pid", doc="first process that holds it"),
    Column("comm", "comm", doc="name of that process"),
    Column("accept_queue", doc="connections that wait for accept()"),
    Column("accept_limit", doc="limit of the accept queue, and of the SYN queue; the accept queue holds one more"),
    Column("limit_from", "text", doc="where that limit comes from: listen()'s backlog or somaxconn (derived)"),
    Column("syn_queue", doc="handshakes that wait for the final ACK"),
    Column("overflows", doc="refused because the accept queue was full, since the tool sees it"),
    Column("overflows_at_syn", doc="... of them SYNs"),
    Column("overflows_at_ack", doc="... of them final ACKs: the client believes it is connected"),
    Column("syn_drops", doc="SYNs refused because the SYN queue was full, or its last quarter reserved"),
    Column("cookies", doc="SYNs answered by a SYN cookie"),
    Column("drops", doc="the socket's own count since listen() (sk_drops): a refused SYN is one, a final ACK two"),
    Column("accepts", doc="accept() calls that returned a connection, since the tool sees it"),
    Column("accepts_per_s", "float", doc="the same per second, since the snapshot before"),
    Column("since_accept_ms", doc="time since the last accept()", unit="ms"),
    Column("oldest_wait_ms", doc="how long the head of the accept queue waits, since its SYN-ACK", unit="ms"),
    Column("somaxconn", doc="net.core.somaxconn of the namespace"),
    Column("max_syn_backlog", doc="net.ipv4.tcp_max_syn_backlog of the namespace"),
    Column("syncookies", doc="net.ipv4.tcp_syncookies of the namespace"),
    Column("abort_on_overflow", "bool", doc="net.ipv4.tcp_abort_on_overflow of the namespace"),
    Column("cookie", doc="socket cookie, what ss -e prints as sk:"),
    Column("holders", "list", doc="every process that holds it"),
)

Row = msgspec.defstruct(
    "ListenerRow", [(column.name, Any) for column in COLUMNS], namespace={"__doc__": "A row of `queue`."}
)


class Rates:
    """Accepts per second between two snapshots of the same listener."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, int | None], tuple[float, int]] = {}

    def rate(self, listener: Listener) -> float | None:
        if listener.accepts is None:
            return None
        now = time.monotonic()
        before = self._before.get(listener.key)
        self._before[listener.key] = (now, listener.accepts)
        if before is None or now <= before[0] or listener.accepts < before[1]:
            return None
        return round((listener.accepts - before[1]) / (now - before[0]), 1)


def row(listener: Listener, when: str | float | None, rate: float | None) -> Any:
    """The row of `queue` for a listener."""
    syn_drops = None
    if listener.refused is not None:
        syn_drops = (listener.count("SYN_QUEUE_FULL") or 0) + (listener.count("SYN_QUEUE_RESERVED") or 0)
    return Row(
        time=when, netns=listener.netns, family=listener.family, laddr=listener.laddr, lport=listener.lport,
        pid=listener.owner.pid if listener.owner else None, comm=listener.owner.comm if listener.owner else None,
        accept_queue=listener.accept_queue, accept_limit=listener.accept_limit, limit_from=listener.limit_from,
        syn_queue=listener.syn_queue, overflows=listener.count("ACCEPT_QUEUE_FULL"),
        overflows_at_syn=listener.count("ACCEPT_QUEUE_FULL", "syn"),
        overflows_at_ack=listener.count("ACCEPT_QUEUE_FULL", "ack"), syn_drops=syn_drops,
        cookies=listener.count("COOKIE_SENT"), drops=listener.drops, accepts=listener.accepts, accepts_per_s=rate,
        since_accept_ms=_ms(listener.since_accept_us), oldest_wait_ms=_ms(listener.oldest_wait_us),
        somaxconn=listener.somaxconn, max_syn_backlog=listener.max_syn_backlog, syncookies=listener.syncookies,
        abort_on_overflow=listener.abort_on_overflow, cookie=listener.cookie, holders=list(listener.holders),
    )  # fmt: skip


def _ms(us: int | None) -> int | None:
    return None if us is None else us // 1000


def by_urgency(listeners: Iterable[Listener]) -> list[Listener]:
    """Those that refuse or are full first."""
    return sorted(
        listeners,
        key=lambda own: (
            -(own.count("ACCEPT_QUEUE_FULL") or 0), -own.accept_queue / (own.accept_limit + 1), own.lport, own.laddr
        ),
    )


