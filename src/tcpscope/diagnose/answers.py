"""Which clients of this host's ports have acknowledged something, and when: what the looks have shown until now.

Most connections wait for nothing and are in no look. So what a look shows of those that were answered is kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import SENDING
from tcpscope.diagnose.sockets import Track

EVERYDAY = 10
"""Silent connections are everyday while ten times as many are answered. Chosen: fewer have something in common."""

MANY = 20
"""So many clients that are silent while nobody is answered are a fault of what they have in common."""

TELL_S = 10.0
"""For so long somebody may still answer. Servers that wait for nothing push or probe more often, but for a few."""

_ABOUT_S = 2.0  # when something stalled is known from the looks: as exactly as two of them
_SINCE_S = 4.0  # what comes so long after it stalled came after it, with a round trip on a slow path
_MISSED = 1  # a rule may be asked after two looks: the first one of a connection may be the one that it did not see
_KEPT_S = 1000.0  # a silent connection ends after about a quarter of an hour (tcp_retries2)
_CONNECTIONS_AT_MOST = 16_384

Port = tuple[int, int]
"""Network namespace, as inode, and local port."""

End = tuple[str, int]
"""Remote address and port."""


@dataclass
class Answers:
    """Connections that clients have made to a port -> when they last acknowledged something, in monotonic seconds.

    full  the same, of those on which full segments have arrived
    """

    ports: dict[Port, dict[End, float]] = field(default_factory=dict)
    full: dict[Port, dict[End, float]] = field(default_factory=dict)
    _number: int = 0
    _times: dict[Port, Mapping[str, Sequence[float]]] = field(default_factory=dict)  # until the next look

    def connections(self, netns: int, raddr: str, since_s: float, lports: Iterable[int]) -> int:
        """How many connections of an address to these ports have had an answer since then."""
        found = (self._of_address((netns, lport)).get(raddr, ()) for lport in lports)
        return sum(at_s > since_s for times in found for at_s in times)

    def _of_address(self, port: Port) -> Mapping[str, Sequence[float]]:
        """When each connection of an address to this port had an answer."""
        if port not in self._times:
            times: dict[str, list[float]] = defaultdict(list)
            for (raddr, _), at_s in self.ports.get(port, {}).items():
                times[raddr].append(at_s)
            self._times[port] = dict(times)
        return self._times[port]

    def clients(self, port: Port, full: bool = False) -> dict[str, float]:
        """The addresses of a port's clients, and when each has last answered. Not those on this host."""
        found: dict[str, float] = {}
        for (raddr, _), at_s in (self.full if full else self.ports).get(port, {}).items():
            found[raddr] = max(at_s, found.get(raddr, at_s))
        return {raddr: at_s for raddr, at_s in found.items() if not is_here(raddr)}

    def take(self, tracks: Iterable[Track], began_s: float) -> None:
        """A look. `began_s`: when the watch began."""
        self._times.clear()
        for track in tracks:
            row = track.last
            if row.role != "PASSIVE" or row.state not in SENDING:
                continue
            port, end = (row.netns, row.lport), (row.raddr, row.rport)
            if (at_s := answered_s(track)) is not None:
                self._keep(port, end, at_s)
                if took_full(track, began_s):
                    self.full.setdefault(port, {})[end] = at_s

    def forget(self, before_s: float) -> None:
        self._times.clear()
        for kept in (self.ports, self.full):
            for port, ends in list(kept.items()):
                for end in [end for end, at_s in ends.items() if at_s < before_s]:
                    del ends[end]
                if not ends:
                    del kept[port]
        self._number = sum(map(len, self.ports.values()))

    def _keep(self, port: Port, end: End, at_s: float) -> None:
        ends = self.ports.setdefault(port, {})
        before_s = ends.pop(end, None)
        ends[end] = at_s if before_s is None else max(at_s, before_s)  # the oldest come first
        if before_s is not None:
            return
        self._number += 1
        if self._number > _CONNECTIONS_AT_MOST:
            largest = max(self.ports, key=lambda each: len(self.ports[each]))
            oldest = next(iter(self.ports[largest]))
            del self.ports[largest][oldest]
            self.full.get(largest, {}).pop(oldest, None)
            self._number -= 1


def is_here(raddr: str) -> bool:
    """A loopback address: what shows that it lives tells nothing of others."""
    return raddr.startswith("127.") or raddr == "::1"


def answered_s(track: Track) -> float | None:
    """When the remote end has acknowledged something last, or a moment before; None: not known."""
    row, before = track.last, track.before
    if before is not None and before.acked_seq != row.acked_seq:
        return float(track.last_s - row.since_ack_us / 1e6)
    if row.data_segs_out and not row.out_segs and not row.unsent:
        return float(track.last_s - row.since_sent_us / 1e6)  # what was sent then has arrived
    return row.opened_ns / 1e9 if row.opened_ns and before is None else None  # the final ACK of its handshake


def took_full(track: Track, began_s: float) -> bool:
    """Segments that arrived since the look before, or since it was opened, were full, but for the last one."""
    row = track.last
    before = None if track.looks <= _MISSED + 1 and row.opened_ns / 1e9 > began_s else track.before
    if before is None and not row.opened_ns / 1e9 > began_s:
        return False  # nobody knows when they arrived
    sent, segments = _arrived(row)
    if before is not None:
        sent_before, segments_before = _arrived(before)
        sent, segments = sent - sent_before, segments - segments_before
    return bool(sent >= row.mss and sent > (segments - 1) * row.mss)


def _arrived(row: Any) -> tuple[int, int]:
    """Bytes and segments."""
    return (
        row.sent_bytes - row.retrans_bytes - row.unacked,
        row.data_segs_out - row.total_retrans - row.out_segs,
    )


@dataclass(frozen=True)
class Silence:
    """Of many clients at once. since_s: when the first of them stalled; others: how many have answered since."""

    since_s: float
    others: int


def silence(
    stalled: Mapping[str, float], answered: Mapping[str, float], now_s: float, began_s: float
) -> Silence | None:
    """Whether many clients are silent since some time, and nearly nobody has had an answer after it.

    stalled   address -> when the last of its connections that are silent stalled, at the latest
    answered  address -> when it last answered. A silent client has answered, too, before it stalled: hosts that vanish
              one by one show by this that the path works
    began_s   when the watch began: of what was answered before that little is known
    """
    order = sorted(stalled.values())
    times = sorted(answered.values())
    for number, since_s in enumerate(order):
        clients = len(order) - number
        if clients < MANY:
            return None
        if now_s - max(since_s, began_s) < TELL_S:
            return None
        after = len(times) - bisect_left(times, since_s + _SINCE_S)
        about = len(times) - bisect_left(times, since_s - _ABOUT_S)
        # A server that sends to all clients at once, and rarely, is answered by nearly all a moment after.
        if after * EVERYDAY <= clients and about <= EVERYDAY * clients:
            return Silence(since_s, after)
    return None


def is_undecided(stalled: Iterable[float], now_s: float, began_s: float) -> bool:
    """Whether so many are silent that it may be a fault, and somebody may still answer."""
    order = sorted(stalled)
    return len(order) >= MANY and now_s - max(order[-MANY], began_s) < TELL_S


def answers(seen: Evidence) -> Answers:
    """What was seen until now. Several rules ask in the same check: each look is taken once."""
    if _kept.get("of") is not seen.sockets:
        _kept.update(of=seen.sockets, at_s=-math.inf, answers=Answers())
    found: Answers = _kept["answers"]
    if _kept["at_s"] != seen.now_s:
        _kept["at_s"] = seen.now_s
        found.forget(seen.now_s - _KEPT_S)
        found.take(seen.sockets.now, seen.began_s)
    return found


_kept: dict[str, Any] = {}
