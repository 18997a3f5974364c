"""What the rules look at. Each piece is gathered once, however many rules need it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from tcpscope.diagnose import Rule
from tcpscope.diagnose.counters import Counters
from tcpscope.diagnose.pools import Pools
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.sockets import Mark, Sockets
from tcpscope.diagnose.tallies import Groups
from tcpscope.errors import ResourceError, UnsupportedError, UsageError
from tcpscope.kernel.features import Kernel
from tcpscope.kernel.walk import Walk
from tcpscope.request import Request
from tcpscope.run import Run
from tcpscope.session import Stats

_MEET_SECONDS = 1.0
_OWNER = ("netns", "pid", "comm")
_ENDS = ("laddr", "lport", "raddr", "rport")


class Source(Protocol):
    """A run, and what was learnt from its batches. The engine polls it about five times a second."""

    @property
    def run(self) -> Run:
        """The tool, or the part of one, that is asked."""

    def begin(self) -> None:
        """Leave out what happened until now, where something is counted: now all sources are there."""

    def poll(self) -> None:
        """Take what is new."""

    def end(self) -> None:
        """Stop watching and take the last of it."""

    def forget(self, before_s: float) -> None:
        """Leave out what happened before this time, where something is counted."""


class Evidence:
    """All of it. An attribute that no rule needs, or that `lacking` names, must not be read.

    queues    listeners, their queues, refusals                        (QueueHistory)
    attempts  outcomes of connect(): netns, pid, comm, laddr, raddr, rport, outcome, errno, syn_retrans, syn_sent
                                                                       (Groups)
    retrans   retransmissions: netns, pid, comm, laddr, lport, raddr, rport, kind, errno; sum: segments  (Groups)
    resets    RSTs, and timeouts (direction NONE): netns, pid, comm, laddr, lport, raddr, rport, direction, state,
              cause, unanswered                                                                      (Groups)
    drops     discarded packets of TCP: netns, pid, comm, laddr, lport, raddr, rport, direction, kind, reason, flags,
              counter, location. Not the SYNs that a listener refuses: those are in `queues`        (Groups)
    sockets   connections that wait or move                            (Sockets)
    ports     local ports in use                                       (Pools)
    counters  the kernel's SNMP counters of each network namespace     (Counters)
    lacking   name of a piece that cannot be had -> why
    """

    queues: QueueHistory
    attempts: Groups
    retrans: Groups
    resets: Groups
    drops: Groups
    sockets: Sockets
    ports: Pools
    counters: Counters

    def __init__(self, request: Request, rules: Iterable[Rule]) -> None:
        """Attach what these rules need. Raises the errors of the tools, but for what this kernel or filter excludes."""
        asked = list(rules)
        self.request = request
        self.lacking: dict[str, str] = {}
        self._sources: dict[str, Source] = {}
        marks = {name: mark for rule in asked for name, mark in rule.marks.items()}
        needed = dict.fromkeys(name for rule in asked for name in rule.needs)
        kernel = Kernel()
        try:
            kernel.hold()
            with Walk():
                for name in needed:
                    try:
                        self._sources[name] = _SOURCES[name](request, marks)
                    except (UnsupportedError, UsageError) as error:
                        self.lacking[name] = str(error)
                    else:
                        setattr(self, name, self._sources[name])
            self.rules = [rule for rule in asked if not self.lacking.keys() & set(rule.needs)]
            """Those that have what they need."""
            self.left_out = [rule for rule in asked if rule not in self.rules]
            for source in self._sources.values():  # one after another: on a busy machine that takes seconds
                source.begin()
        except BaseException:
            self.close()
            raise
        finally:
            kernel.release()
        self.began_s = self.now_s = time.monotonic()
        self._met_s = 0.0
        self._failed: dict[str, tuple[int, ResourceError]] = {}
        self.ended = False
        """Nothing more comes: what is not certain yet will not be."""

    @property
    def watched_s(self) -> float:
        """For how long it has been gathered."""
        return self.now_s - self.began_s

    @property
    def runs(self) -> list[Run]:
        return [source.run for source in self._sources.values()]

    def poll(self) -> None:
        self.now_s = time.monotonic()
        for name, source in self._sources.items():
            with self._noted(name):
                source.poll()
        if self.now_s >= self._met_s + _MEET_SECONDS:
            self._met_s = self.now_s
            self._meet()

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """A look for which the machine has too little memory or open files is left out. The next one may have them."""
        try:
            yield
        except ResourceError as error:
            self._failed[name] = self._failed.get(name, (0,))[0] + 1, error

    def _meet(self) -> None:
        """Tell the counters in which network namespaces there are sockets, and whose."""
        counters, sockets, queues = (self._sources.get(name) for name in ("counters", "sockets", "queues"))
        if not isinstance(counters, Counters):
            return
        known, found = set(counters.namespaces), set[tuple[int, int, str]]()
        if isinstance(sockets, Sockets):
            rows = (track.last for track in sockets.now)
            found |= {(row.netns, row.pid, row.comm) for row in rows if row.netns not in known and row.pid is not None}
        if isinstance(queues, QueueHistory):
            for own in (history.last for history in queues.histories.values() if not history.gone):
                if own.netns not in known:
                    found |= {(own.netns, holder.pid, holder.comm) for holder in own.holders}
        counters.meet(found)

    def end(self) -> None:
        for name, source in self._sources.items():
            with self._noted(name):
                source.end()
        self.ended = True
        self.now_s = time.monotonic()

    def forget(self, before_s: float) -> None:
        for source in self._sources.values():
            source.forget(before_s)

    def account(self) -> Stats:
        """The loss contract over all probes."""
        return sum((run.account() for run in self.runs), Stats())

    def blind_spots(self) -> Iterator[str]:
        """What could not be seen, a line each."""
        for name, why in self.lacking.items():
            without = ", ".join(rule.name for rule in self.left_out if name in rule.needs)
            yield f"not checked ({without}): {why}"
        for name, (number, error) in self._failed.items():
            yield f"{number} look{'' if number == 1 else 's'} at {name} failed, so numbers are the least: {error}"
        for rule in self.rules:
            yield from rule.unseen(self)
        if (sockets := self._sources.get("sockets")) and isinstance(sockets, Sockets):
            yield from sockets.blind_spots()
        if (ports := self._sources.get("ports")) and isinstance(ports, Pools):
            yield from ports.blind_spots()
        if (counters := self._sources.get("counters")) and isinstance(counters, Counters):
            yield from counters.blind_spots()
        if (queues := self._sources.get("queues")) and isinstance(queues, QueueHistory):
            yield from queues.blind_spots()

    def close(self) -> None:
        for source in self._sources.values():
            with suppress(OSError):
                source.run.close()


def _queues(request: Request, marks: Mapping[str, Mark]) -> Source:
    request.refuse_peers("a listener has no remote end, and one overflow refuses many peers")
    return QueueHistory(request)


def _groups(
    tool: str, *by: str, number: str | None = None, **options: Any
) -> Callable[[Request, Mapping[str, Mark]], Source]:
    return lambda request, marks: Groups(request, tool, by, number, **options)


_SOURCES: dict[str, Callable[[Request, Mapping[str, Mark]], Any]] = {
    "queues": _queues,
    "attempts": _groups("connect", *_OWNER, "laddr", "raddr", "rport", "outcome", "errno", "syn_retrans", "syn_sent"),
    "retrans": _groups("retrans", *_OWNER, *_ENDS, "kind", "errno", number="segs"),
    "resets": _groups("reset", *_OWNER, *_ENDS, "direction", "state", "cause", "unanswered", timeouts=True),
    "drops": _groups(
        "drop", *_OWNER, *_ENDS, "direction", "kind", "reason", "flags", "counter", "location", reason="!DERIVED:*"
    ),
    "sockets": Sockets,
    "ports": lambda request, marks: Pools(request),
    "counters": lambda request, marks: Counters(request),
}
