"""Samples refusals, for kernels whose functions cannot be hooked.

Two counters are sampled. A namespace's ListenDrops grows by one for each refusal, but does not name the listener. A
socket's sk_drops names the listener, but counts packets: one for a refused SYN, and two for a refused final ACK (the
refusal, and the dropped packet). It also counts a retransmitted SYN or a RST for a request, which are no refusals. So
ListenDrops gives the number of refusals, and sk_drops the listener.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tcpscope.listeners import LISTENERS_AT_MOST, Key, Listener, NamespaceKey, NetCounters

SECONDS = 0.2  # between two samples
LIMITS = (
    "refusals are sampled five times a second, without peers and often without cause and step; "
    "SYNs answered with a SYN cookie are not seen"
)


@dataclass(frozen=True)
class Sample:
    """`count` refusals of one listener since the last snapshot. `cause` and `step` are None if not certain."""

    listener: Listener
    count: int
    cause: str | None = None
    step: str | None = None


@dataclass
class Sampler:
    """Compares each snapshot of all listeners with the previous one.

    If the namespace's counters cannot be read, sk_drops alone stands for the refusals. Not seen are refusals just
    before a listener is closed, and refusals during the first snapshot of a namespace that had no listener before.
    """

    _drops: dict[Key, int] = field(default_factory=dict)
    _counters: dict[NamespaceKey, NetCounters] = field(default_factory=dict)
    # A refusal during a snapshot may be in one of the two counters only. It waits one snapshot for the other counter.
    _packets: dict[Key, int] = field(default_factory=dict)
    _refusals: dict[NamespaceKey, NetCounters] = field(default_factory=dict)
    _started: bool = False

    def look(self, listeners: Iterable[Listener]) -> list[Sample]:
        """Refusals since the last call. The first call only notes the counters."""
        groups: dict[NamespaceKey, list[Listener]] = defaultdict(list)
        for own in listeners:
            groups[own.namespace].append(own)
        samples = [sample for key, group in groups.items() for sample in self._of_namespace(key, group)]
        self._drops = {own.key: own.drops for group in groups.values() for own in group}
        self._packets = {key: packets for key, packets in self._packets.items() if key in self._drops}
        self._refusals = {key: waiting for key, waiting in self._refusals.items() if key in groups}
        if len(self._counters) > 2 * LISTENERS_AT_MOST:  # a namespace may be between two listeners, or gone
            self._counters = {key: counters for key, counters in self._counters.items() if key in groups}
        started, self._started = self._started, True
        return samples if started else []

    def _of_namespace(self, namespace: NamespaceKey, group: list[Listener]) -> Iterator[Sample]:
        grown = {own.key: _grown(self._drops.get(own.key, 0), own.drops) for own in group}
        now = max((own.counters for own in group if own.counters), default=None)
        if now is None:
            yield from (Sample(own, grown[own.key]) for own in group if grown[own.key])
            return
        shares = {key: count + self._packets.pop(key, 0) for key, count in grown.items()}
        packets = sum(shares.values())
        # If the namespace had no listener before, all its refusals are of these listeners.
        older = NetCounters(0, 0, 0) if now.drops <= packets else now._replace(drops=now.drops - packets)
        before = self._counters.get(namespace, older)
        waiting = self._refusals.pop(namespace, NetCounters(0, 0, 0))
        if any(n < b for n, b in zip(now, before, strict=True)):  # without a cookie: another namespace had this number
            before, waiting = older, NetCounters(0, 0, 0)
        self._counters[namespace] = now
        new = NetCounters(*(n - b + w for n, b, w in zip(now, before, waiting, strict=True)))
        count = min(new.drops, packets)
        full = "ACCEPT_QUEUE_FULL" if new.overflows == new.drops else None
        full = "SYN_QUEUE_FULL" if new.full == new.drops else full
        if rest := min(new.drops - count, now.drops - before.drops):
            self._refusals[namespace] = NetCounters(
                rest, rest if full == "ACCEPT_QUEUE_FULL" else 0, rest if full == "SYN_QUEUE_FULL" else 0
            )
        if not count:
            self._packets |= {key: packets for key, packets in grown.items() if packets}
            return
        step = "SYN" if count == packets == new.drops else None
        for own, part in zip(group, _divide(count, list(shares.values())), strict=True):
            if part:
                yield Sample(own, part, full, step)


def _grown(before: int, now: int) -> int:
    """The difference of two 32-bit counts, which may wrap. A smaller count is that of another listener."""
    grown = (now - before) % (1 << 32)
    return grown if grown < 1 << 31 else now


def _divide(total: int, shares: list[int]) -> list[int]:
    """Divide `total` in proportion to `shares`, in whole numbers. The largest remainders are rounded up."""
    whole = sum(shares)
    parts = [total * share // whole for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: -(total * shares[i] % whole))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
