"""Refusals from samples, for kernels whose functions cannot be hooked.

Two counts are there to be sampled. A namespace's ListenDrops grows by one for each refusal, but does not say whose
listener it was. A socket's sk_drops does, but it counts packets: a refused SYN once, a refused final ACK twice (as a
refusal, and when the packet is thrown away), and a repeated SYN or a RST for a request too, which were not refused.
Together they tell: ListenDrops says how many, sk_drops says whose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tcpscope.listeners import Listener, NetCounters

SECONDS = 0.2  # between two looks
LIMITS = (
    "refusals are sampled five times a second, without peers and often without cause and step; "
    "SYNs answered with a SYN cookie are not seen"
)
Key = tuple[int, int | None]


@dataclass(frozen=True)
class Sample:
    """`count` refusals of one listener since the last look. `cause` and `step` are None unless they are certain."""

    listener: Listener
    count: int
    cause: str | None = None
    step: str | None = None


@dataclass
class Sampler:
    """Compares each snapshot of all listeners with the one before.

    A kernel that cannot give the namespace's counters leaves sk_drops alone, which then stands for the refusals. What
    a listener was refused in the last moment before it was closed is not seen, nor what is refused while a namespace
    that had no listener before is looked at for the first time.
    """

    _drops: dict[Key, int] = field(default_factory=dict)
    _counters: dict[int, NetCounters] = field(default_factory=dict)
    # A refusal that was under way during a look is in one of the two counts only. It waits for the other, for one look.
    _packets: dict[Key, int] = field(default_factory=dict)
    _refusals: dict[int, NetCounters] = field(default_factory=dict)
    _started: bool = False

    def look(self, listeners: Iterable[Listener]) -> list[Sample]:
        """What has been refused since the last call; the first one sets the start."""
        groups: dict[int, list[Listener]] = defaultdict(list)
        for own in listeners:
            groups[own.netns].append(own)
        samples = [sample for netns, group in groups.items() for sample in self._of_namespace(netns, group)]
        self._drops = {own.key: own.drops for group in groups.values() for own in group}
        started, self._started = self._started, True
        return samples if started else []

    def _of_namespace(self, netns: int, group: list[Listener]) -> Iterator[Sample]:
        grown = {own.key: _grown(self._drops.get(own.key, 0), own.drops) for own in group}
        now = max((own.counters for own in group if own.counters), default=None)
        if now is None:
            yield from (Sample(own, grown[own.key]) for own in group if grown[own.key])
            return
        shares = {key: count + self._packets.pop(key, 0) for key, count in grown.items()}
        packets = sum(shares.values())
        # In a namespace without a listener until now, what was refused was refused by these.
        older = NetCounters(0, 0, 0) if now.drops <= packets else now._replace(drops=now.drops - packets)
        before = self._counters.get(netns, older)
        waiting = self._refusals.pop(netns, NetCounters(0, 0, 0))
        if any(n < b for n, b in zip(now, before, strict=True)):  # the number was that of a namespace that is gone
            before, waiting = older, NetCounters(0, 0, 0)
        self._counters[netns] = now
        new = NetCounters(*(n - b + w for n, b, w in zip(now, before, waiting, strict=True)))
        count = min(new.drops, packets)
        full = "ACCEPT_QUEUE_FULL" if new.overflows == new.drops else None
        full = "SYN_QUEUE_FULL" if new.full == new.drops else full
        if rest := min(new.drops - count, now.drops - before.drops):
            self._refusals[netns] = NetCounters(
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
    """The count has 32 bits and wraps; one that has become smaller is that of another listener at the same address."""
    grown = (now - before) % (1 << 32)
    return grown if grown < 1 << 31 else now


def _divide(total: int, shares: list[int]) -> list[int]:
    """`total` in proportion to `shares`, in whole numbers, with the largest remainders rounded up."""
    whole = sum(shares)
    parts = [total * share // whole for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: -(total * shares[i] % whole))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
