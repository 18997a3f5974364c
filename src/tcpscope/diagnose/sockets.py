"""The connections that wait for something or move data, as their sockets are: a look at all of them each second.

A look finds each connection that waits: for an ACK, for room to send, for its application to read or to close, for the
remote end's FIN, for accept(), for the answer to a SYN that was sent again. It also finds some that only move data.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tcpscope.diagnose.tallies import Tally
from tcpscope.errors import ResourceError
from tcpscope.kernel.spec import Spec
from tcpscope.request import Request
from tcpscope.run import Streaming
from tcpscope.schema import Clock
from tcpscope.session import Session, closed_on_error

Mark = Callable[[Any, Any], Any]
"""What a rule wants to know of a connection: a function of its row now and its row in the look before, or None."""

_PAUSE_SECONDS = 1.0
_SHARE = 50  # looks take at most this part of one processor
_MOVING_AT_MOST = 2000
_PEERS_AT_MOST = 4096
_RING_BYTES = 16 << 20
_LOOKS_KEPT = 60
_WRAPS_AT = 1 << 32
_STALE_SECONDS = 5.0  # without a look for so long, nothing is known of a connection any more
_RARE_SECONDS = 3.0  # a rule that needs three looks needs ten seconds then


@dataclass
class Track:
    """One connection: its rows in the looks in which it was found. Columns: `struct health` of bpf/health.bpf.c.

    first, before, last  its first row, the last but one (None if there is only one), and the last
    first_s, last_s      when these looks were, in seconds of the monotonic clock
    looks                in how many looks it was
    """

    first: Any
    last: Any
    first_s: float
    last_s: float
    before: Any = None
    looks: int = 1
    _since: dict[str, float] = field(default_factory=dict)
    _times: Counter[str] = field(default_factory=Counter)

    def held_s(self, mark: str) -> float:
        """For how long this mark has been there in each look; 0: not in the last one."""
        return self.last_s - self._since[mark] if mark in self._since else 0.0

    def holds(self, mark: str) -> bool:
        """Whether the mark was there in the last look."""
        return mark in self._since

    @property
    def marks(self) -> Iterable[str]:
        """Those of the last look."""
        return self._since

    def share(self, mark: str) -> float:
        """In which part of its looks the mark was there."""
        return self._times[mark] / self.looks

    def grown(self, column: str) -> int:
        """By how much a number has grown since the first look that found it."""
        return grown(column, self.first, self.last)

    @property
    def watched_s(self) -> float:
        """From its first to its last look."""
        return self.last_s - self.first_s

    def _look(self, row: Any, now_s: float, marks: Mapping[str, Mark]) -> None:
        if row is not self.first:
            self.before, self.last, self.last_s = self.last, row, now_s
            self.looks += 1
        for name, mark in marks.items():
            if mark(row, self.before):
                self._since.setdefault(name, now_s)
                self._times[name] += 1
            else:
                self._since.pop(name, None)


class Sockets:
    """A source. `marks`: what its readers want to know of each connection in each look.

    sent     (netns, raddr) -> segments of data sent, their retransmissions included; sum: segments retransmitted
    twice    (netns, raddr) -> segments that the remote end had got twice; sum: how often reordering was seen
    numbers  (mark, netns, pid) -> (time, connections of this process with the mark) in the last looks, the oldest first

    served   (netns, lport) -> remote address -> when the last connection that it made to this port began, of those that
             a look has found and whose begin was seen, in seconds of the monotonic clock
    left_out  how many connections at the most found no room in a look

    The first two are summed from look to look: what has ended since is in them, and nothing that ended before a look.
    """

    is_full = False
    """A remote address found no room."""

    def __init__(self, request: Request, marks: Mapping[str, Mark]) -> None:
        session = Session(
            "health",
            "health",
            request.filter,
            constants={"moving_at_most": _MOVING_AT_MOST, "moving_us": round(1.5e6 * _PAUSE_SECONDS)},
            ring_bytes=_RING_BYTES,
            debug=request.debug,
        )
        with closed_on_error(session):
            layout = session.spec.layout("health", internal=True).named(session.kernel.enumerators)
            self.run = Streaming(session, layout.decoder(Clock("none")))
            session.kernel.release()
            self._session, self._marks = session, marks
            self._looked_at = session.loaded.memory("looked_at").cast("Q")
            self._moving = session.loaded.memory("moving").cast("Q")
            self.tracks: dict[tuple[int, int], Track] = {}
            self.sent: dict[tuple[int, str], Tally] = {}
            self.twice: dict[tuple[int, str], Tally] = {}
            self.numbers: dict[tuple[str, int, int | None], deque[tuple[float, int]]] = {}
            self.served: dict[tuple[int, int], dict[str, float]] = {}
            self._served = 0
            self.looks = self.connections = 0
            self.left_out = self._lost = 0
            self._last_s, self._next_s = time.monotonic(), 0.0
            self._first_s = 0.0

    def begin(self) -> None:
        """The first look is still to come. What was sent before counts of connections that are opened from now on."""
        self._last_s = time.monotonic()

    def poll(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        try:
            self._look()
        except ResourceError:
            self._next_s = now_s + _PAUSE_SECONDS
            if now_s >= self._last_s + _STALE_SECONDS:
                self.tracks = {}
            raise

    def end(self) -> None:
        """The state at the end is that of the last look: connections end while the watch does."""
        for _ in self.run.end():
            pass

    def forget(self, before_s: float) -> None:
        """What is not in the last look is forgotten anyway, but for the sums."""
        for tallies in (self.sent, self.twice):
            for peer, tally in list(tallies.items()):
                tally.forget(before_s)
                if not (tally.count or tally.sum):
                    del tallies[peer]
        for port, peers in list(self.served.items()):
            for raddr in [raddr for raddr, at_s in peers.items() if at_s < before_s]:
                del peers[raddr]
                self._served -= 1
            if not peers:
                del self.served[port]

    @property
    def now(self) -> Iterator[Track]:
        """The connections of the last look."""
        return iter(self.tracks.values())

    def blind_spots(self) -> Iterator[str]:
        """What the looks could not see, a line each."""
        if self.left_out:
            yield f"a look had no room for {self.left_out} connections: numbers of connections are the least"
        if self.is_full:
            yield f"only the first {_PEERS_AT_MOST:,} remote addresses were counted"
        apart_s = self._next_s - self._last_s
        if self.looks > 1:
            apart_s = max(apart_s, (self._last_s - self._first_s) / (self.looks - 1))
        if apart_s >= _RARE_SECONDS:
            yield (
                f"{self.connections:,} connections were looked at only every {apart_s:.0f} s, for a look takes long: "
                "what lasted less may be missed, and what is certain after several looks comes later"
            )

    def _look(self) -> None:
        began, spent = time.monotonic(), time.thread_time()
        self._looked_at[0] = self._moving[0] = 0
        self._session.loaded.run("look")
        lost, self._lost = self._lost, self._session.counters()["lost"]
        self.left_out = max(self.left_out, self._lost - lost)
        rows = self._rows()
        now_s = time.monotonic()
        found: dict[tuple[int, int], Track] = {}
        for row in rows:
            key = row.socket, row.opened_ns
            track = self.tracks.get(key) or Track(row, row, now_s, now_s)
            track._look(row, now_s, self._marks)
            found[key] = track
            self._add_up(track, now_s)
            if track.looks == 1 and row.role == "PASSIVE" and row.opened_ns and row.state != "SYN_RECV":
                self._serve(row)
        self.tracks = found
        self._count(now_s)
        self._first_s = self._first_s or began
        self.looks += 1
        self._last_s = began
        self.connections = self._looked_at[0]
        self._next_s = began + max(_PAUSE_SECONDS, _SHARE * (time.thread_time() - spent))

    def _add_up(self, track: Track, now_s: float) -> None:
        """What this connection has sent since the look before: all of it, if it is not older."""
        row, before = track.last, track.before
        if before is None and row.opened_ns < self._last_s * 1e9:
            return  # it may have been in an earlier look
        sent, again, twice, reordered = (
            grown(name, before, row) for name in ("data_segs_out", "total_retrans", "dsack_dups", "reord_seen")
        )
        peer = row.netns, row.raddr
        for tallies, count, number in ((self.sent, sent, again), (self.twice, twice, reordered)):
            if not (count or number):
                continue
            if peer in tallies or len(tallies) < _PEERS_AT_MOST:
                tallies.setdefault(peer, Tally()).add(now_s, count, number)
            else:
                self.is_full = True

    def _serve(self, row: Any) -> None:
        peers = self.served.get((row.netns, row.lport), {})
        if row.raddr not in peers:
            if self._served == _PEERS_AT_MOST:
                self.is_full = True
                return
            self._served += 1
            peers = self.served.setdefault((row.netns, row.lport), peers)
        peers[row.raddr] = max(row.opened_ns / 1e9, peers.get(row.raddr, 0.0))

    def _count(self, now_s: float) -> None:
        before = self.numbers
        self.numbers = {}
        marked = Counter((mark, t.last.netns, t.last.pid) for t in self.tracks.values() for mark in t.marks)
        for key, number in marked.items():
            self.numbers[key] = before.get(key) or deque(maxlen=_LOOKS_KEPT)
            self.numbers[key].append((now_s, number))

    def _rows(self) -> list[Any]:
        found: list[Any] = []
        while new := [row for batch in self.run.poll() for row in batch.rows]:
            found += new
        return found


def grown(column: str, before: Any, row: Any) -> int:
    """By how much a number has grown; `before` None: since zero.

    The kernel counts segments in 32 bits: then it begins again at zero. So does a socket that connects again, or
    another one at its address.
    """
    now, then = int(getattr(row, column)), int(getattr(before, column)) if before is not None else 0
    if now >= then:
        return now - then
    return now - then + _WRAPS_AT if then - now > _WRAPS_AT // 2 else now


def columns() -> tuple[str, ...]:
    """The columns of a connection."""
    return tuple(field.name for field in Spec.of("health").layout("health", internal=True).fields)
