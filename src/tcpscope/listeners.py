"""Snapshots of listeners: queues, limits and their origin, holders, activity. For `queue` and `diagnose`."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from tcpscope.filters import Filter, address_text
from tcpscope.kernel import pidns
from tcpscope.kernel.features import Kernel
from tcpscope.output import endpoint
from tcpscope.schema import CounterArray, comm_text
from tcpscope.session import RING_BYTES, Session

UNREAD = 2**64 - 1
LISTENERS_AT_MOST = 8192  # MAX_LISTENERS of the probe, and the size of its map `activities`
SYSTEMD = "systemd"  # name of the process, of the system's (PID 1) and of a user's
WALK_SHARE = 100  # walks over all open files take at most this part of one processor
MIB = {
    "mib_listen_overflows": "LINUX_MIB_LISTENOVERFLOWS",
    "mib_listen_drops": "LINUX_MIB_LISTENDROPS",
    "mib_reqq_full_cookies": "LINUX_MIB_TCPREQQFULLDOCOOKIES",
    "mib_reqq_full_drop": "LINUX_MIB_TCPREQQFULLDROP",
    "mib_cookies_sent": "LINUX_MIB_SYNCOOKIESSENT",
    "mib_embryonic_rsts": "LINUX_MIB_EMBRYONICRSTS",
    "mib_fast_open_fails": "LINUX_MIB_TCPFASTOPENPASSIVEFAIL",
}
"""Constant of the probe -> the kernel's enumerator whose value it has."""


class Holder(msgspec.Struct, frozen=True, order=True):
    """A process that has the listener open as file descriptor `fd`. `fd` is None if only its listen() was seen."""

    pid: int
    comm: str
    uid: int
    fd: int | None = None

    def __str__(self) -> str:
        return f"{self.comm}({self.pid})"


_FUNCTIONS = ("syn_enter", "syn_exit", "ack4_enter", "ack4_exit", "ack6_enter", "ack6_exit")
_TRACEPOINTS = ("syn_exit", "syn_exit_again", "ack4_exit", "ack4_exit_again", "older")
"""Hooks that show each refusal, where functions can be hooked and where they cannot."""

_LENGTHS = ("made", "made_again", "made_woken", "made_woken_again")
"""Hooks that show the queues' lengths at each handshake."""

LENGTHS = 2048
"""Most queues of listeners whose lengths are counted between two readings."""

Key = tuple[int, int | None]  # address of a socket, and its cookie or when listen() was called
NamespaceKey = tuple[int, int | None]  # inode number of a namespace, and its cookie
_Key = tuple[int, int]  # address of the socket, and when listen() was called; not all kernels give cookies


class NetCounters(NamedTuple):
    """ListenDrops, ListenOverflows, TCPReqQFullDrop and SyncookiesSent of a namespace.

    Read only if refusals are sampled.
    """

    drops: int
    overflows: int
    full: int
    cookies: int = 0


@dataclass(frozen=True)
class Listener:
    """One listening socket at one moment.

    refused         refusals by (step, cause) since the tool first saw the listener; None if they are sampled
    unnamed         refusals by cause, by this listener or by another one of its address: it is not known which
    drops           the socket's own count since listen(): one per refused SYN, two per refused final ACK, because the
                    kernel counts the refusal and the dropped packet
    accepts         accept() calls that returned a connection; None if accept() cannot be hooked
    oldest_wait_us  time since the SYN-ACK of the connection at the head of the accept queue; None if it is empty
    head            identifies that connection, as long as nothing was accepted; None if the queue is empty
    since_ns        when it called listen(); 0: before the tool
    accepter        PID of the process that called accept() last, as far as that was seen
    parents         PIDs of holders that are the parent of another holder
    inside          PIDs of holders that are in the listener's network namespace; others have left it since
    has_cookie      whether every socket of this kernel has a cookie
    net_cookie      of its namespace; None where the kernel gives none (before 5.12)
    counters        of its namespace; None if they were not read
    wanted          whether it passes the filter
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
    unnamed: dict[str, int] = field(default_factory=dict, repr=False)
    since_ns: int = field(default=0, repr=False)
    accepter: int | None = field(default=None, repr=False)
    parents: frozenset[int] = field(default=frozenset(), repr=False)
    inside: frozenset[int] = field(default=frozenset(), repr=False)
    has_cookie: bool = field(default=True, repr=False)
    net_cookie: int | None = field(default=None, repr=False)
    counters: NetCounters | None = field(default=None, repr=False)
    wanted: bool = True
    head: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def key(self) -> Key:
        """Identifies the socket: the kernel gives the address of one that is gone to a later one.

        Where not every socket has a cookie, one may get it late (`ss -e` asks for it). So it identifies none there, and
        the time of listen() does.
        """
        return self.socket, self.cookie if self.has_cookie else self.since_ns

    @property
    def namespace(self) -> NamespaceKey:
        """Identifies the namespace: the kernel gives the inode number of one that is gone to a later one."""
        return self.netns, self.net_cookie

    @property
    def limit_from(self) -> str:
        """Where the limit of the accept queue comes from. Derived: listen() cuts its backlog to somaxconn."""
        return self._limit[0]

    @property
    def about_limit(self) -> str:
        """The limit and its origin, as a clause for a finding."""
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
        """The process that accepted last. If that is not known, the first that should; None if nobody holds it."""
        accepters = [holder for holder in self.holders if holder.pid == self.accepter]
        return next(iter(accepters or self.workers or self.holders), None)

    @property
    def workers(self) -> list[Holder]:
        """The holders that should accept.

        A process that has children which hold the listener too leaves it to them (gunicorn, nginx, uwsgi), and so does
        systemd to the service that it starts.
        """
        return [own for own in self.holders if own.pid not in self.parents and own.comm != SYSTEMD]

    @property
    def by_systemd(self) -> bool:
        """Whether systemd called listen(): the socket belongs to a .socket unit (systemd.socket(5))."""
        return any(own.comm == SYSTEMD for own in self.holders)

    def count(self, *causes: str, step: str | None = None) -> int | None:
        """The number of refusals for these causes, at `step` or at both steps; None if not known."""
        if self.refused is None or any(self.unnamed.get(cause) for cause in causes):
            return None
        return sum(n for (s, cause), n in self.refused.items() if cause in causes and step in (None, s))

    @property
    def name(self) -> str:
        """Address and port as ss writes them."""
        return endpoint(self.laddr, self.lport)


def open_session(
    filter: Filter,
    *,
    events: bool = False,
    stacks: bool = False,
    lengths: bool = False,
    ring_bytes: int = RING_BYTES,
    rate_per_s: int = 0,
    debug: bool = False,
) -> Session:
    """A session of the probe `listeners`.

    events      whether it sends an event for each refusal
    stacks      whether an event has the kernel stack
    lengths     whether it counts how long the queues were at each handshake
    rate_per_s  most events in a second; 0: no limit
    """
    kernel = Kernel()
    # If refusals must be sampled, the sampler divides them among all listeners of a namespace.
    constants: dict[str, Any] = {"send_events": events, "send_stacks": stacks, "both_families": events}
    constants |= {"rate_per_s": rate_per_s, "want_lengths": lengths}
    skip = ["accept"] if lengths else [*_LENGTHS]
    for name, enumerator in MIB.items():
        value = kernel.enumerator(enumerator)
        if value is None:  # the programs of these hooks cannot read a counter without its number
            skip += [*_FUNCTIONS, *_TRACEPOINTS]
        constants[name] = value or 0
    return Session(
        "listeners",
        "overflow" if events else None,
        filter,
        constants=constants,
        entries={"connections": LISTENERS_AT_MOST, "found": 1 if lengths else LISTENERS_AT_MOST}
        | dict.fromkeys(("lengths_even", "lengths_odd"), LENGTHS if lengths else 1),
        skip=skip,
        ring_bytes=ring_bytes,
        kernel=kernel,
        debug=debug,
    )


def sees_lengths(session: Session) -> bool:
    """Whether the probe can tell the listener of a handshake that completes."""
    hooks = session.loaded.hooks
    return any(name in hooks and hooks[name].program is not None for name in ("ack4_enter", "made_woken"))


def sees_refusals(session: Session) -> bool:
    """Whether the probe sees every refusal; otherwise refusals can only be sampled."""
    return why_sampled(session) is None


def why_sampled(session: Session) -> str | None:
    """Why the probe does not see every refusal; None if it does."""
    hooks = session.loaded.hooks
    if "syn_exit" not in hooks:
        return "the kernel's BTF does not number its counters"
    for name in _TRACEPOINTS if by_tracepoints(session) else _FUNCTIONS:
        if name in hooks and hooks[name].program is None:
            return list(hooks[name].refused.values())[-1]
    return None


def by_tracepoints(session: Session) -> bool:
    """Whether tracepoints alone show the refusals, because functions cannot be hooked."""
    return "syn_exit_again" in session.loaded.hooks


class Snapshots:
    """Takes snapshots of all listeners of the machine.

    A look visits the probe's table of listeners. A walk over all open files finds the processes that hold them, and
    takes much longer. A look includes a walk only as long as walks take less than 1 % of one processor.
    Otherwise it shows the holders of the last walk, and of a newer listener the process that called listen().

    Most listeners of a machine with many are idle. One at which nothing has changed since the look before, and of which
    no time is told, is the same object.

    walked_s  processor seconds that walks have taken
    """

    def __init__(self, session: Session) -> None:
        self.walked_s = 0.0
        loaded, spec = session.loaded, session.spec
        self._session = session
        self._layout = spec.layout("listener", internal=True)
        self._decode = self._layout.decoder(raw=True).rows
        self._decode_holders = spec.layout("listener_holder", internal=True).decoder(raw=True).rows
        self._found = loaded.values("found", LISTENERS_AT_MOST * self._layout.size)
        self._count = loaded.memory("found_count").cast("I")
        causes = spec.labels("cause")
        self._refused, self._unnamed = CounterArray(spec.labels("step"), causes), CounterArray(causes)
        self._exact = sees_refusals(session)
        self._accepts = loaded.hooks["accept"].program is not None
        self._now_at = self._layout.field("now_ns").offset
        self._idle: dict[bytes, Listener] = {}  # by their record without `now_ns`
        self._holders: dict[_Key, _Holders] = {}
        self._next_walk = 0.0

    def look(self, all_: bool = False, fresh: bool = False) -> list[Listener]:
        """The listeners that pass the filter and that a process holds.

        all_   also those that do not pass the filter
        fresh  walk over all open files in any case, so that the holders are the present ones
        """
        records = self._visit()
        if fresh or time.monotonic() >= self._next_walk:
            self._walk(self._decode(records))
            records = self._visit()  # with the listeners that the walk has added to the table
        return [own for own in self._listeners(bytes(records)) if own.holders and (own.wanted or all_)]

    def _visit(self) -> memoryview:
        self._count[0] = 0
        self._session.loaded.run("look")
        return self._found[: self._count[0] * self._layout.size]

    def _listeners(self, records: bytes) -> list[Listener]:
        begins = range(0, len(records), self._layout.size)
        now_at, now_end, end = self._now_at, self._now_at + 8, self._layout.size
        keys = [records[at : at + now_at] + records[at + now_end : at + end] for at in begins]
        changed = b"".join(
            records[at : at + end] for at, key in zip(begins, keys, strict=True) if key not in self._idle
        )
        made = map(self._listener, self._decode(changed))
        found = [self._idle.get(key) or next(made) for key in keys]
        self._idle = {
            key: own
            for key, own in zip(keys, found, strict=True)
            if own.since_accept_us is None and own.oldest_wait_us is None
        }
        return found

    def _walk(self, records: list[Any]) -> None:
        """Find all holders. After that a listener of `records` without holders is known to have none.

        In a PID namespace a process outside may hold it.
        """
        began = time.thread_time()
        holders: dict[_Key, set[Holder]] = defaultdict(set)
        parents: dict[_Key, set[int]] = defaultdict(set)
        inside: dict[_Key, set[int]] = defaultdict(set)
        wanted = set()
        seeded, self._session.seeded = self._session.seeded, None  # just now, with others
        for piece in [seeded.output] if seeded else self._session.loaded.iterate("seed"):
            for row in self._decode_holders(piece):
                key = row.socket, row.since_ns
                holders[key].add(Holder(row.pid, comm_text(row.comm), row.uid, row.fd))
                parents[key].add(row.parent)
                if row.inside:
                    inside[key].add(row.pid)
                if row.wanted:
                    wanted.add(key)
        known = set(holders)
        if not pidns.inner() and not seeded:
            known |= {(record.socket, record.since_ns) for record in records}
        before, self._holders = (
            self._holders,
            {
                key: _Holders(
                    tuple(sorted(holders[key])), key in wanted, frozenset(parents[key]), frozenset(inside[key])
                )
                for key in known
            },
        )
        if self._holders != before:
            self._idle.clear()
        took_s = seeded.took_s if seeded else time.thread_time() - began
        self.walked_s += took_s
        self._next_walk = time.monotonic() + WALK_SHARE * took_s

    def _listener(self, record: Any) -> Listener:
        held = self._holders.get((record.socket, record.since_ns)) or _Holders.opener(record)
        wanted = record.wanted and held.wanted
        refused = self._refused.read(record.refused) if self._exact else None
        unnamed = {cause: n for (cause,), n in self._unnamed.read(record.unnamed).items()}
        return _listener(record, held, refused, unnamed, self._accepts, wanted)


class _Holders(NamedTuple):
    """The processes that hold a listener, and whether the filter wants one of them."""

    holders: tuple[Holder, ...]
    wanted: bool
    parents: frozenset[int] = frozenset()
    inside: frozenset[int] = frozenset()

    @classmethod
    def opener(cls, record: Any) -> _Holders:
        """The process that called listen(), for a listener that no walk has seen. No holder if that was not seen."""
        one = Holder(record.pid, comm_text(record.comm), record.uid)
        return cls((one,) if record.pid else (), record.owner_wanted)


def _listener(
    record: Any,
    held: _Holders,
    refused: dict[tuple[str, ...], int] | None,
    unnamed: dict[str, int],
    accepts: bool,
    wanted: bool,
) -> Listener:
    # Another processor may have accepted since the program read the time.
    since = max(0, record.now_ns - record.last_accept_ns) // 1000 if record.last_accept_ns else None
    waiting = record.accept_queue and record.oldest_synack_us
    return Listener(
        socket=record.socket,
        cookie=record.cookie or None,
        netns=record.netns,
        family=record.family,
        laddr=address_text(record.laddr),
        lport=record.lport,
        holders=held.holders,
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
        unnamed=unnamed,
        since_ns=record.since_ns,
        accepter=record.accepter or None,
        parents=held.parents,
        inside=held.inside,
        has_cookie=record.has_cookie,
        net_cookie=record.net_cookie or None,
        counters=None
        if record.net_drops == UNREAD
        else NetCounters(record.net_drops, record.net_overflows, record.net_full, record.net_cookies),
        wanted=wanted,
        head=(record.head, record.oldest_synack_us) if record.head else None,
    )
