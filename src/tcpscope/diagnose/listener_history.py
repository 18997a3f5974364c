"""What a listener did while it was watched: how its queues filled, who was refused, how fast it accepted."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from tcpscope.listeners import Listener

_CHANGES_KEPT = 100  # looks in which something had been accepted: 20 s or more
PEERS = 4096  # distinct remote addresses remembered per listener
_BURST_LOOKS = 5  # a second: after it a refused client sends its SYN again
_SLOW_LOOKS = 8  # fewer do not tell a slow server from a burst
_MOVED_LOOKS = 3  # an application that accepts all at once, after a pause, is not too slow
_CALM_LOOKS = 15  # three seconds: clients that were refused have come again
NEAR = 0.75
"""An accept queue is nearly full from this part of its limit on. A busy healthy server's held an eighth (16 of 128)."""

_ALWAYS = 0.9  # of the time
_SLOW_SECONDS = 5.0  # within it a burst has been accepted

STALL_SECONDS = 2.0
"""From then on it is a stall that nothing is accepted while a connection waits. On a busy healthy server the slowest
hundredth waited 10 ms."""

STALL_INTERVALS = 5
"""A stall is so many times as long as accepts are apart while connections wait. Else the application is slow."""

SLOW_WAIT_SECONDS = 1.0
"""It is too slow, too, if a connection waits so long for accept(): as long as for a SYN that was lost."""


_NOTHING = Counter[tuple[str, ...]]()


@dataclass
class Burst:
    """The clients that a queue refused in one burst: in looks that follow each other, within a second.

    A client that is refused comes again and again. So the sum of all refusals grows with the time watched, and says
    nothing about the number of places that were missing.
    """

    most: int = 0
    _clients: set[tuple[str, int]] = field(default_factory=set)
    _looks: int = 0
    _refused: bool = False

    def add(self, client: tuple[str, int]) -> None:
        self._refused = True
        if len(self._clients) < PEERS:
            self._clients.add(client)
        self.most = max(self.most, len(self._clients))

    def add_sampled(self, number: int) -> None:
        """So many refusals in one look, whose clients are not known."""
        self.most = max(self.most, number)

    @property
    def calm(self) -> bool:
        """Whether it has nobody."""
        return not (self._refused or self._clients)

    def look(self) -> None:
        """After each snapshot."""
        self._looks += 1
        if not self._refused or self._looks >= _BURST_LOOKS:
            self._clients.clear()
            self._looks = 0
        self._refused = False


@dataclass
class Stall:
    """Nothing was accepted, though a connection waited: each look found the same one at the head of the accept queue.

    began_s, last_s  the first and the last of these looks
    accepts          what the listener had accepted before
    waiting          the longest that the queue was
    wait_us          how long the connection at the head has waited
    looks, full      the looks, and those in which the queue was full
    recovered_s      how long it took afterwards until the queue was empty, or STALL_INTERVALS were accepted
    """

    head: tuple[int, int]
    accepts: int | None
    began_s: float
    last_s: float
    waiting: int = 0
    wait_us: int | None = None
    looks: int = 0
    full: int = 0
    recovered_s: float | None = None

    @property
    def seconds(self) -> float:
        return self.last_s - self.began_s

    def look(self, own: Listener, now_s: float) -> None:
        self.last_s = now_s
        self.waiting = max(self.waiting, own.accept_queue)
        self.wait_us = own.oldest_wait_us
        self.looks += 1
        self.full += own.accept_queue > own.accept_limit


@dataclass
class Pressure:
    """A time in which an accept queue was nearly full again and again. It ends after _CALM_LOOKS without.

    before, accepted   connections that were accepted before, and in it; None: not known
    looks, near, full  the looks, and those in which the queue was nearly full, and in which it was full or has refused
    moved        looks in which it was nearly full although something had been accepted since the look before
    queued       the sum of the queue's lengths in these looks
    """

    began_s: float
    last_s: float
    before: int | None
    accepted: int | None = None
    looks: int = 0
    near: int = 0
    full: int = 0
    moved: int = 0
    queued: int = 0
    calm: int = 0
    _drops: int | None = None

    def look(self, own: Listener, now_s: float) -> None:
        near = is_near(own)
        self.calm = 0 if near else self.calm + 1
        self.last_s = now_s
        self.looks += 1
        self.near += near
        self.full += own.accept_queue > own.accept_limit or (self._drops is not None and own.drops != self._drops)
        self._drops = own.drops
        self.queued += own.accept_queue
        accepted = None if own.accepts is None or self.before is None else own.accepts - self.before
        self.moved += near and (accepted or 0) > (self.accepted or 0)
        self.accepted = accepted

    @property
    def lasts(self) -> bool:
        """Whether the application accepts, and the queue is nearly full all the same, in half of the looks or more."""
        enough = self.full and self.moved >= _MOVED_LOOKS and self.looks >= _SLOW_LOOKS
        return bool(enough) and 2 * self.near >= self.looks


def is_near(own: Listener) -> bool:
    """Whether the accept queue is nearly full."""
    return own.accept_queue >= max(NEAR * own.accept_limit, 1)


@dataclass
class History:
    """One listener while it was watched.

    sampled     (step, cause) -> refusals, where they are sampled; UNKNOWN: not certain
    drops       packets dropped at this listener: one for a refused SYN, two for a refused final ACK
                (tcp_listendrop(), and again when the kernel frees the packet)
    looks       how many snapshots were taken; full_seen: in how many of them the accept queue was full; near_seen: in
                how many nearly
    peers       (cause, remote address) -> refusals, of the first PEERS
    events      (step, cause) -> refusals whose events came
    accept_burst, syn_burst  clients that the accept queue and the SYN queue refused
    began       time of the first snapshot, and `ended` of the last, in seconds of the monotonic clock
    gone        it was not in the last snapshot
    queued      the sum of the accept queue's lengths in all looks
    waited_s    for how long connections waited for accept(), as looks show it
    stall       since when nothing is accepted; ended_stall: the longest that has ended
    pressure    since when the accept queue is nearly full; overload: the last that lasts, or did
    first_s, last_s  when something was refused, or the accept queue was nearly full, first and last: the times of
                snapshots
    """

    first: Listener
    last: Listener
    full_seen: int = 0
    near_seen: int = 0
    looks: int = 0
    longest_accept_queue: int = 0
    longest_syn_queue: int = 0
    sampled: Counter[tuple[str, ...]] = field(default_factory=Counter)
    peers: Counter[tuple[str, ...]] = field(default_factory=Counter)
    events: Counter[tuple[str, ...]] = field(default_factory=Counter)
    accept_burst: Burst = field(default_factory=Burst)
    syn_burst: Burst = field(default_factory=Burst)
    began: float = 0.0
    ended: float = 0.0
    gone: bool = False
    first_s: float | None = None
    last_s: float | None = None
    queued: int = 0
    waited_s: float = 0.0
    stall: Stall | None = None
    ended_stall: Stall | None = None
    pressure: Pressure | None = None
    overload: Pressure | None = None
    _waits: bool = False
    _told: tuple[int, int] = (0, 0)
    _accepted: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_CHANGES_KEPT))

    def happened(self, now_s: float) -> None:
        """After a snapshot and its events: note whether something was refused since, or the queue was full."""
        told = self.near_seen, sum((self.last.refused or self.sampled).values())
        if told != self._told:
            self._told, self.last_s = told, now_s
            self.first_s = self.first_s or now_s

    def look(self, listener: Listener, now_s: float) -> bool:
        """A snapshot. Whether it is more than one in which nothing has changed."""
        if listener.accepts is not None and (not self._accepted or self._accepted[-1][1] != listener.accepts):
            self._accepted.append((now_s, listener.accepts))
        if listener is self.last and self._is_calm:
            self.ended, self.gone = now_s, False
            self.looks += 1
            return False
        self._follow_stall(listener, now_s)
        self._follow_pressure(listener, now_s)
        self.waited_s += (now_s - self.ended) if self._waits and listener.accept_queue else 0.0
        self._waits = bool(listener.accept_queue)
        self.last, self.ended, self.gone = listener, now_s, False
        self.accept_burst.look()
        self.syn_burst.look()
        self.looks += 1
        self.queued += listener.accept_queue
        self.full_seen += listener.accept_queue > listener.accept_limit
        self.near_seen += is_near(listener)
        self.longest_syn_queue = max(self.longest_syn_queue, listener.syn_queue)
        self.longest_accept_queue = max(self.longest_accept_queue, listener.accept_queue)
        return True

    @property
    def _is_calm(self) -> bool:
        """Whether a snapshot in which nothing has changed is one more look, and nothing else."""
        busy = self.last.accept_queue or self.last.syn_queue or self._waits or self.stall or self.pressure
        recovers = self.ended_stall and self.ended_stall.recovered_s is None
        return not busy and not recovers and self.accept_burst.calm and self.syn_burst.calm

    def _follow_stall(self, own: Listener, now_s: float) -> None:
        stall, ended = self.stall, self.ended_stall
        if stall and (own.head, own.accepts) != (stall.head, stall.accepts):
            if stall.seconds >= STALL_SECONDS and (ended is None or stall.seconds > ended.seconds):
                self.ended_stall = ended = stall
            stall = None
        if own.accept_queue and own.head and not stall:
            stall = Stall(own.head, own.accepts, now_s, now_s)
        if stall:
            stall.look(own, now_s)
        self.stall = stall
        if ended and ended.recovered_s is None:
            since = (own.accepts or 0) - (ended.accepts or 0)
            if not own.accept_queue or since >= STALL_INTERVALS:
                ended.recovered_s = now_s - ended.last_s

    def _follow_pressure(self, own: Listener, now_s: float) -> None:
        if self.pressure is None and is_near(own):
            self.pressure = Pressure(now_s, now_s, own.accepts)
        if self.pressure:
            self.pressure.look(own, now_s)
            if self.pressure.lasts:
                self.overload = self.pressure
            if self.pressure.calm >= _CALM_LOOKS:
                self.pressure = None

    @property
    def stalled(self) -> Stall | None:
        """The stall that goes on, else the longest one before; None: there is none, or none is certain."""
        now, ended = self.stall, self.ended_stall
        if now and now.seconds >= STALL_SECONDS:
            apart_s = (self.waited_s - now.seconds) / self.accepts if self.accepts else 0.0
            if now.seconds >= STALL_INTERVALS * apart_s:
                return now
        if ended and ended.recovered_s is not None and ended.seconds >= ended.recovered_s:
            return ended
        return None

    def begin_anew(self) -> None:
        """Count from now on."""
        self.first, self.began = self.last, self.ended
        self.full_seen = self.near_seen = self.looks = self.longest_accept_queue = self.longest_syn_queue = 0
        self.sampled, self.peers, self.events = Counter(), Counter(), Counter()
        self.accept_burst, self.syn_burst = Burst(), Burst()
        self.first_s, self.last_s, self._told = None, None, (0, 0)
        self.queued, self.waited_s, self.ended_stall, self.overload = 0, 0.0, None, None

    @property
    def drops(self) -> int:
        return (self.last.drops - self.first.drops) % (1 << 32)

    @property
    def accepts(self) -> int | None:
        if self.first.accepts is None or self.last.accepts is None:
            return None
        return self.last.accepts - self.first.accepts

    def accepted_since(self, after_s: float) -> int:
        """How many were accepted after this time, at the least."""
        before = [accepts for at_s, accepts in self._accepted if at_s <= after_s]
        begin = before[-1] if before else self._accepted[0][1] if self._accepted else 0
        return self._accepted[-1][1] - begin if self._accepted else 0

    @property
    def accepts_per_s(self) -> float | None:
        """None if it is not known, or the listener was not watched long enough."""
        elapsed = self.ended - self.began
        return None if self.accepts is None or elapsed <= 0 else self.accepts / elapsed

    @property
    def wait_s(self) -> float | None:
        """How long a connection waits for accept() on average: what waits, by how many are accepted in a second."""
        rate = self.accepts_per_s
        return self.queued / self.looks / rate if rate and self.looks else None

    @property
    def too_slow(self) -> bool:
        """Whether connections come faster than the application accepts them, and not only in a burst."""
        if not self.accepts or (self.stall and self.stalled is self.stall):
            return False
        watched_s = self.ended - self.began
        stalled_s = max((stall.seconds for stall in (self.stall, self.ended_stall) if stall), default=0.0)
        always = watched_s >= _SLOW_SECONDS and self.waited_s - stalled_s >= _ALWAYS * watched_s
        return self.overload is not None or (always and (self.wait_s or 0.0) >= SLOW_WAIT_SECONDS)

    def burst(self, cause: str) -> Burst | None:
        """Of the queue that refuses for this cause; None if no queue is known to."""
        if cause in ("OTHER", "UNKNOWN"):
            return None
        return self.accept_burst if cause == "ACCEPT_QUEUE_FULL" else self.syn_burst

    @property
    def refused(self) -> Counter[tuple[str, ...]]:
        """(step, cause) -> count.

        Exact counts come from the kernel's table, because events may be lost. But what was refused between the last
        snapshot of a listener and its end, only events tell. They count for one that began during the run: its events
        are complete unless some were lost, or it began between a look and the events that are read after it. Then the
        larger number is the least that was refused.
        """
        if self.last.refused is None:
            return self.sampled
        if not self.last.refused and not self.events:
            return _NOTHING
        before = self.first.refused or {}
        counted = Counter({key: n - before.get(key, 0) for key, n in self.last.refused.items()})
        return counted | self.events if self.first.since_ns else counted

    @property
    def refusals(self) -> int:
        """Of whatever cause; a SYN cookie is none."""
        return sum(n for (_, cause), n in self.refused.items() if cause != "COOKIE_SENT")

    @property
    def quiet(self) -> bool:
        """Whether there is nothing to report."""
        return not (self.full_seen or self.stalled or any(self.refused.values()))

    def count(self, cause: str, step: str | None = None) -> int:
        return sum(n for (s, c), n in self.refused.items() if c == cause and step in (None, s))
