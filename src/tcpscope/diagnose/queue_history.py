"""What happens to listeners: how their queues fill, and which handshakes are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tcpscope import listeners
from tcpscope.kernel import netns
from tcpscope.listeners import Listener, Snapshots
from tcpscope.request import Request
from tcpscope.run import Batch, Streaming
from tcpscope.sampling import LIMITS, Sampler
from tcpscope.session import RING_BYTES, Session

COUNTERS = ("ListenOverflows", "ListenDrops", "TCPReqQFullDoCookies", "TCPReqQFullDrop")
_PEERS = 4096  # distinct remote addresses remembered per listener


@dataclass
class History:
    """One listener while it was watched.

    sampled     (step, cause) -> refusals, where they are sampled; UNKNOWN: not certain
    drops       packets dropped at this listener: one for a refused SYN, two for a refused final ACK
                (tcp_listendrop(), and again when the kernel frees the packet)
    looks       how many snapshots were taken; full_seen: in how many of them the accept queue was full
    peers       (cause, remote address) -> refusals, of the first _PEERS
    """

    first: Listener
    last: Listener
    full_seen: int = 0
    looks: int = 0
    longest_accept_queue: int = 0
    longest_syn_queue: int = 0
    sampled: Counter[tuple[str, ...]] = field(default_factory=Counter)
    peers: Counter[tuple[str, ...]] = field(default_factory=Counter)

    @property
    def drops(self) -> int:
        return (self.last.drops - self.first.drops) % (1 << 32)

    @property
    def accepts(self) -> int | None:
        if self.first.accepts is None or self.last.accepts is None:
            return None
        return self.last.accepts - self.first.accepts

    @property
    def refused(self) -> Counter[tuple[str, ...]]:
        """(step, cause) -> count. Exact counts come from the kernel's table: events may be lost."""
        if self.last.refused is None:
            return self.sampled
        before = self.first.refused or {}
        return Counter({key: n - before.get(key, 0) for key, n in self.last.refused.items()})

    def count(self, cause: str, step: str | None = None) -> int:
        return sum(n for (s, c), n in self.refused.items() if c == cause and step in (None, s))


class QueueHistory:
    """The source of all rules about listeners."""

    def __init__(self, request: Request) -> None:
        self.session: Session = listeners.open_session(
            request.filter, events=True, ring_bytes=RING_BYTES, debug=request.debug
        )
        self.why_sampled = listeners.why_sampled(self.session)
        self.exact = self.why_sampled is None
        self._snapshots, self._sampler = Snapshots(self.session), Sampler()
        assert self.session.layout is not None
        names = ("netns", "lport", "laddr", "cookie", "raddr", "cause", "step", "accept_queue", "syn_queue")
        self.run = Streaming(self.session, self.session.layout.select(names).decoder())
        self.histories: dict[int, History] = {}
        self._by_address: dict[tuple[int, int, str], list[History]] = {}
        self._counters_before: dict[int, dict[str, int]] = {}
        self._counters_now: dict[int, dict[str, int]] = {}
        self.counters: dict[int, dict[str, int]] = {}
        self._look(newborn=False)

    def poll(self) -> None:
        self._drain(self.run.poll())
        self._look()

    def end(self) -> None:
        self._drain(self.run.poll())
        self._look(fresh=True)
        self._drain(self.run.end())
        self._settle()

    def live(self) -> str:
        number = len(self.histories)
        shown = f"{number} listener{'' if number == 1 else 's'}"
        refused = sum((history.refused for history in self.histories.values()), Counter[tuple[str, ...]]())
        return f"{shown}, {sum(n for (_, cause), n in refused.items() if cause != 'COOKIE_SENT')} refusals"

    def blind_spots(self) -> list[str]:
        return [] if self.exact else [f"{self.why_sampled}: {LIMITS}"]

    def _look(self, newborn: bool = True, fresh: bool = False) -> None:
        found = self._snapshots.look(all_=not self.exact, fresh=fresh)
        counters: dict[int, dict[str, int]] = {}
        for listener in found:
            if not listener.wanted:
                continue
            history = self.histories.get(listener.socket)
            if history is None or history.first.cookie != listener.cookie:
                history = self.histories[listener.socket] = History(
                    _unborn(listener) if newborn else listener, listener
                )
            history.last = listener
            history.looks += 1
            history.full_seen += listener.accept_queue > listener.accept_limit
            history.longest_syn_queue = max(history.longest_syn_queue, listener.syn_queue)
            history.longest_accept_queue = max(history.longest_accept_queue, listener.accept_queue)
            if not counters.get(listener.netns):
                counters[listener.netns] = namespace_counters(listener)
        for inode, read in counters.items():
            self._counters_before.setdefault(inode, read)
            if read:
                self._counters_now[inode] = read
        self._by_address.clear()
        for history in self.histories.values():
            own = history.last
            self._by_address.setdefault((own.netns, own.lport, own.laddr), []).append(history)
        if not self.exact:
            for sample in self._sampler.look(found):
                if sample.listener.wanted:
                    step, cause = sample.step or "UNKNOWN", sample.cause or "UNKNOWN"
                    self.histories[sample.listener.socket].sampled[step, cause] += sample.count

    def _drain(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            for event in batch.rows:
                history = self._history_of(event)
                if history is None:
                    continue
                history.longest_accept_queue = max(history.longest_accept_queue, event.accept_queue)
                history.longest_syn_queue = max(history.longest_syn_queue, event.syn_queue)
                peer = (event.cause, event.raddr)
                if peer in history.peers or len(history.peers) < _PEERS:
                    history.peers[peer] += 1

    def _history_of(self, event: Any) -> History | None:
        for history in self._by_address.get((event.netns, event.lport, event.laddr), ()):
            if event.cookie == history.last.cookie or None in (event.cookie, history.last.cookie):
                return history
        return None

    def _settle(self) -> None:
        for inode, now in self._counters_now.items():
            before = self._counters_before.get(inode, {})
            self.counters[inode] = {name: now[name] - before[name] for name in now if name in before}


def _unborn(listener: Listener) -> Listener:
    """The same listener with all counts at zero: the state with which one that appears later is compared."""
    return replace(
        listener,
        drops=0,
        accepts=None if listener.accepts is None else 0,
        refused=None if listener.refused is None else {},
    )


def namespace_counters(listener: Listener) -> dict[str, int]:
    """The kernel's counters (TcpExt...) of the listener's network namespace; empty if they cannot be read."""
    for holder in listener.holders:
        try:
            if _has_left(holder.pid, listener.netns):
                continue
            lines = Path(f"/proc/{holder.pid}/net/netstat").read_text().splitlines()
        except OSError:
            continue
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            if names.startswith("TcpExt:"):
                pairs = dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
                return {name: pairs[name] for name in COUNTERS if name in pairs}
    return {}


def _has_left(pid: int, inode: int) -> bool:
    """Whether a process has left the network namespace in which it made its socket.

    Without privileges this cannot be seen. The answer is no then: few programs change their namespace.
    """
    try:
        return netns.inode_of(f"/proc/{pid}/ns/net") != inode
    except OSError:
        return False
