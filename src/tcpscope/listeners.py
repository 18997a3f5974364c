"""Listeners as they are now: queues, limits and where they come from, holders, activity. For `queue` and `diagnose`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from tcpscope.filters import Filter, address_text
from tcpscope.kernel import filtering
from tcpscope.kernel.features import Kernel
from tcpscope.schema import comm_text, counters_of
from tcpscope.session import Session

UNREAD = 2**64 - 1
LISTENERS_AT_MOST = 8192  # as `activities` of the probe
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
    refused: dict[tuple[str, ...], int] | None = field(default=None, repr=False)
    counters: NetCounters | None = field(default=None, repr=False)
    wanted: bool = True

    @property
    def key(self) -> tuple[int, int | None]:
        """What tells it from others, also from a later one at the same address where the kernel gives cookies."""
        return self.socket, self.cookie

    @property
    def limit_from(self) -> str:
        """Where the limit of the accept queue comes from. Derived: listen() cuts its backlog to somaxconn."""
        return self._limit[0]

    @property
    def about_limit(self) -> str:
        """The same as half a sentence."""
        return self._limit[1]

    @property
    def _limit(self) -> tuple[str, str]:
        limit, most = self.accept_limit, self.somaxconn
        if limit < most:
            return "listen()", f"the limit {limit} is the backlog given to listen(); somaxconn is {most}"
        if limit == most:
            return (
                "somaxconn",
                f"the limit {limit} is somaxconn: listen() asked for at least that, and was cut to it",
            )
        return (
            "listen(), before somaxconn was lowered",
            f"the limit {limit} is older than the present somaxconn of {most}",
        )

    @property
    def owner(self) -> Holder | None:
        """The first of the holders."""
        return self.holders[0] if self.holders else None

    def count(self, *causes: str, step: str | None = None) -> int | None:
        """Refusals for these causes, at one step or at both; None if not known."""
        if self.refused is None:
            return None
        return sum(n for (s, cause), n in self.refused.items() if cause in causes and step in (None, s))

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
    return Session(
        "listeners",
        "overflow" if events else None,
        filter,
        constants=constants,
        entries={"connections": LISTENERS_AT_MOST},
        skip=skip,
        ring_bytes=ring_bytes,
        kernel=kernel,
        debug=debug,
    )


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
    enums = session.spec.labels("step"), session.spec.labels("cause")

    def refused(record: Any) -> dict[tuple[str, ...], int] | None:
        return counters_of(record.refused, *enums) if exact else None

    return [own for own in _join(records, refused, accepts, session.residual) if own.wanted or all_]


def _join(
    records: Iterable[Any], refused: Callable[[Any], dict[tuple[str, ...], int] | None], accepts: bool, residual: Filter
) -> Iterator[Listener]:
    listeners: dict[int, tuple[Any, list[Holder]]] = {}
    wanted = set()
    for record in records:
        holder = Holder(record.pid, comm_text(record.comm), record.uid, record.fd)
        listeners.setdefault(record.socket, (record, []))[1].append(holder)
        if record.wanted and filtering.matches(residual, record):
            wanted.add(record.socket)
    for socket, (record, holders) in listeners.items():
        yield _listener(record, tuple(sorted(set(holders))), refused(record), accepts, socket in wanted)


def _listener(
    record: Any, holders: tuple[Holder, ...], refused: dict[tuple[str, ...], int] | None, accepts: bool, wanted: bool
) -> Listener:
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
        refused=refused,
        counters=None
        if record.net_drops == UNREAD
        else NetCounters(record.net_drops, record.net_overflows, record.net_full),
        wanted=wanted,
    )
