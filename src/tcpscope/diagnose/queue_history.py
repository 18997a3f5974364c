"""What happens to listeners: how their queues fill, and which handshakes are refused."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

from tcpscope import listeners
from tcpscope.diagnose.listener_history import PEERS, History
from tcpscope.diagnose.witness import Witness
from tcpscope.kernel.walk import Walk
from tcpscope.listeners import Key, Listener, Snapshots
from tcpscope.request import Request
from tcpscope.run import Batch, Streaming
from tcpscope.sampling import LIMITS, Sampler
from tcpscope.session import RING_BYTES, closed_on_error

_PAUSE_SECONDS = 0.2
_SHARE = 100  # looks take at most this part of one processor, and the walks in them as much again,
_PAUSE_AT_MOST_SECONDS = 2.0  # unless the pause between two were longer


class QueueHistory:
    """The source of all rules about listeners."""

    def __init__(self, request: Request) -> None:
        opened = listeners.open_session(request.filter, events=True, ring_bytes=RING_BYTES, debug=request.debug)
        names = ("netns", "lport", "laddr", "cookie", "raddr", "rport", "cause", "step", "accept_queue", "syn_queue")
        with closed_on_error(opened) as session:
            self.why_sampled = listeners.why_sampled(session)
            self.exact = self.why_sampled is None
            self._snapshots, self._sampler = Snapshots(session), Sampler()
            assert session.layout is not None
            self.run = Streaming(session, session.layout.select(names).decoder())
            self.histories: dict[Key, History] = {}
            self._by_address: dict[tuple[int, int, str], list[History]] = {}
            self._witness = Witness()
            self._unnamed = 0
            self._refused_before = 0  # of the time that the rules look at no more
            self._forgotten = 0  # listeners that are gone and about which there is nothing to report
            Walk.after(self._look)

    def begin(self) -> None:
        """The first look was a moment ago, and events are there since the programs were attached."""
        for _ in self.run.poll():
            pass
        self._look()
        for history in self.histories.values():
            history.begin_anew()
        self._changed = ()
        self._witness.begin()
        self._sampler.unnamed_cookies = 0

    def poll(self) -> None:
        """The look comes first: an event of a listener without a history belongs to nothing."""
        began, spent, walked = time.monotonic(), time.thread_time(), self._snapshots.walked_s
        looks = began >= self._next_s
        if looks:
            self._look()
        self._drain(self.run.poll())
        if looks:
            self._note_times()
            pause = _SHARE * (time.thread_time() - spent - (self._snapshots.walked_s - walked))
            self._next_s = began + (min(pause, _PAUSE_AT_MOST_SECONDS) if pause > _PAUSE_SECONDS else 0.0)

    def end(self) -> None:
        self._look(fresh=True)
        self._drain(self.run.poll())
        self._drain(self.run.end())
        self._note_times()

    def _note_times(self) -> None:
        """Of the listeners at which a look has found a change."""
        for history in self._changed:
            history.happened(history.ended)
        self._changed = ()

    def forget(self, before_s: float) -> None:
        """Count anew for listeners at which nothing has happened since."""
        for history in self.histories.values():
            if history.last_s is not None and history.last_s < before_s:
                self._refused_before += history.refusals
                history.begin_anew()
            if history.ended_stall and history.ended_stall.last_s < before_s:
                history.ended_stall = None

    def counts(self) -> dict[str, int]:
        """Since the watch began."""
        refused = sum(history.refusals for history in self.histories.values())
        return {
            "listeners": len(self.histories) + self._forgotten,
            "refusals": self._refused_before + refused,
        }

    def blind_spots(self) -> list[str]:
        if self.exact:
            several = "by one of several listeners of its address, and it is not known by which"
            return [f"{self._unnamed} handshakes were refused, or answered with a SYN cookie, {several}"] * bool(
                self._unnamed
            )
        notes = [f"{self.why_sampled}: {LIMITS}"]
        if number := self._sampler.unnamed_cookies:
            notes.append(f"{number} SYNs were answered with a SYN cookie, and it is not known by which listener")
        return notes

    @property
    def troubled(self) -> list[History]:
        """The listeners that refused something, or whose accept queue was full."""
        return [history for history in self.histories.values() if not history.quiet]

    _matched: Sequence[tuple[Listener, History]] = ()  # of the last look: those that pass the filter
    _changed: Sequence[History] = ()  # their times are not noted yet
    _found: Sequence[Listener] = ()
    _next_s = 0.0

    def _look(self, fresh: bool = False) -> None:
        found = self._snapshots.look(all_=not self.exact, fresh=fresh)
        now = time.monotonic()
        same = len(found) == len(self._found) and all(map(is_, found, self._found))
        if not same or len(self.histories) != len(self._matched):
            self._match(found, now)
        changed = [history for listener, history in self._matched if history.look(listener, now)]
        if not same:
            self._index()
        if not self.exact:
            for sample in self._sampler.look(found):
                if sample.listener.wanted:
                    step, cause = sample.step or "UNKNOWN", sample.cause or "UNKNOWN"
                    history = self.histories[sample.listener.key]
                    history.sampled[step, cause] += sample.count
                    changed.append(history)
                    if burst := history.burst(cause):
                        burst.add_sampled(sample.count)
        self._changed = [*self._changed, *changed]

    def _match(self, found: Sequence[Listener], now: float) -> None:
        """Find the histories of these listeners."""
        keys = [listener.key for listener in found]
        self._forget(set(keys))
        matched = []
        for key, listener in zip(keys, found, strict=True):
            if not listener.wanted:
                continue
            history = self.histories.get(key)
            if history is None:
                first = _unborn(listener) if listener.since_ns else listener
                history = self.histories[key] = History(first, listener, began=now)
            matched.append((listener, history))
        self._found, self._matched = found, matched
        self._witness.look(own for own, _ in matched)

    def _index(self) -> None:
        """By address, for events that have no cookie of their listener."""
        self._by_address.clear()
        for history in self.histories.values():
            own = history.last
            self._by_address.setdefault((own.netns, own.lport, own.laddr), []).append(history)

    def _drain(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            for event in batch.rows:
                if event.accept_queue is None:  # of several listeners of the address it is not known which refused
                    self._unnamed += 1
                    continue
                history = self._history_of(event)
                if history is None:
                    continue
                history.longest_accept_queue = max(history.longest_accept_queue, event.accept_queue)
                history.longest_syn_queue = max(history.longest_syn_queue, event.syn_queue)
                if burst := history.burst(event.cause):
                    burst.add((event.raddr, event.rport))
                history.events[event.step or "UNKNOWN", event.cause] += 1
                peer = (event.cause, event.raddr)
                if peer in history.peers or len(history.peers) < PEERS:
                    history.peers[peer] += 1

    def _history_of(self, event: Any) -> History | None:
        """The one with its cookie. Without a cookie: one at its address that still listens, else the newest."""
        there = self._by_address.get((event.netns, event.lport, event.laddr), ())
        if event.cookie is not None:
            same = [history for history in there if history.last.cookie == event.cookie]
            there = same or [history for history in there if history.last.cookie is None]
        return max(there, key=lambda history: (not history.gone, history.last.since_ns), default=None)

    def counters(self, listener: Listener) -> dict[str, int]:
        """By how much the kernel's counters (TcpExt...) of its namespace have grown; without those not known."""
        return self._witness.grown(listener)

    def _forget(self, found: set[Key]) -> None:
        """Drop listeners that are gone, once their last events have come, unless there is something to report."""
        for key, history in list(self.histories.items()):
            if key in found:
                continue
            if history.gone and history.quiet:
                del self.histories[key]
                self._forgotten += 1
            history.gone = True


def _unborn(listener: Listener) -> Listener:
    """The same listener with all counts at zero: the state with which one that appears later is compared."""
    return replace(
        listener,
        drops=0,
        accepts=None if listener.accepts is None else 0,
        refused=None if listener.refused is None else {},
    )
