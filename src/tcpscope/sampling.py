"""Samples refusals, for kernels before 6.11 whose functions cannot be hooked: there no hook shows each one.

Two counters are sampled. A namespace's ListenDrops grows by one for each refusal, but does not name the listener. A
socket's sk_drops names the listener, but counts packets: one for a refused SYN, and two for a refused final ACK (the
refusal, and the dropped packet). It also counts a retransmitted SYN or a RST for a request, which are no refusals. So
ListenDrops gives the number of refusals, and sk_drops the listener.

A SYN cookie is no drop. SyncookiesSent gives the number. The listener is the sole one of the namespace, if it was the
sole one in the previous snapshot too. Otherwise it is the one whose SYN queue is full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tcpscope.listeners import LISTENERS_AT_MOST, Key, Listener, NamespaceKey, NetCounters

SECONDS = 0.2  # between two samples
LIMITS = "refusals and SYN cookies are sampled five times a second, without peers, and at times without cause and step"


@dataclass(frozen=True)
class Sample:
    """`count` refusals, or SYN cookies, of one listener since the last snapshot.

    `cause` and `step` are None if not certain.
    """

    listener: Listener
    count: int
    cause: str | None = None
    step: str | None = None


class _Waiting(NamedTuple):
    """Refusals of a snapshot for which no listener has dropped a packet yet; `certain`: their causes are known."""

    counters: NetCounters = NetCounters(0, 0, 0)
    certain: bool = True


@dataclass
class Sampler:
    """Compares each snapshot of all listeners with the previous one.

    If the namespace's counters cannot be read, sk_drops alone stands for the refusals. Not seen are refusals just
    before a listener is closed, and refusals during the first snapshot of a namespace that had no listener before.

    unnamed_cookies  SYN cookies for which no listener is certain: the SYN queues of several are full, or of none
    """

    unnamed_cookies: int = 0

    _drops: dict[Key, int] = field(default_factory=dict)
    _counters: dict[NamespaceKey, NetCounters] = field(default_factory=dict)
    # A refusal during a snapshot may be in one of the two counters only. It waits one snapshot for the other counter.
    _packets: dict[Key, int] = field(default_factory=dict)
    _refusals: dict[NamespaceKey, _Waiting] = field(default_factory=dict)
    _sole: set[Key] = field(default_factory=set)  # of a namespace, in the previous snapshot
    _started: bool = False

    def look(self, listeners: Iterable[Listener]) -> list[Sample]:
        """Refusals since the last call. The first call only notes the counters."""
        groups: dict[NamespaceKey, list[Listener]] = defaultdict(list)
        for own in listeners:
            groups[own.namespace].append(own)
        samples = [sample for key, group in groups.items() for sample in self._of_namespace(key, group)]
        self._drops = {own.key: own.drops for group in groups.values() for own in group}
        self._sole = {group[0].key for group in groups.values() if len(group) == 1}
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
        explained = now.drops <= packets
        older = NetCounters(0, 0, 0, now.cookies) if explained else now._replace(drops=now.drops - packets)
        before = self._counters.get(namespace)
        waiting, certain = self._refusals.pop(namespace, _Waiting())
        # Without a cookie another namespace may have had this number.
        if before is None or any(n < b for n, b in zip(now, before, strict=True)):
            before, waiting, certain = older, _Waiting().counters, explained
        new = NetCounters(*(n - b + w for n, b, w in zip(now, before, waiting, strict=True)))
        yield from self._cookies(new.cookies, group)
        # The kernel counts the cause first. If the snapshot was in between, the drop belongs to the next one.
        early = max(0, new.overflows + new.full - new.drops)
        early_overflows = min(early, new.overflows)
        new = new._replace(overflows=new.overflows - early_overflows, full=new.full - (early - early_overflows))
        self._counters[namespace] = now._replace(
            overflows=now.overflows - early_overflows, full=now.full - (early - early_overflows)
        )
        count = min(new.drops, packets)
        causes = _causes(new, group) if certain else dict[str | None, int]({None: new.drops})
        if rest := min(new.drops - count, now.drops - before.drops):
            of = {cause: rest if cause in causes else 0 for cause in ("ACCEPT_QUEUE_FULL", "SYN_QUEUE_FULL")}
            rests = NetCounters(rest, of["ACCEPT_QUEUE_FULL"], of["SYN_QUEUE_FULL"])
            if rest == new.drops:
                rests = new._replace(cookies=0)
            self._refusals[namespace] = _Waiting(rests, certain and (len(causes) == 1 or rest == new.drops))
        if not count:
            self._packets |= {key: packets for key, packets in grown.items() if packets}
            return
        step = "SYN" if count == packets == new.drops else None
        parts = [(own, part) for own, part in zip(group, _divide(count, list(shares.values())), strict=True) if part]
        yield from _samples(parts, causes, count == new.drops, step)

    def _cookies(self, count: int, group: list[Listener]) -> Iterator[Sample]:
        sole = len(group) == 1 and group[0].key in self._sole
        full = group if sole else [own for own in group if own.syn_queue >= own.accept_limit]
        if count and len(full) == 1:
            yield Sample(full[0], count, "COOKIE_SENT", "SYN")
        elif count:
            self.unnamed_cookies += count


def _causes(new: NetCounters, group: list[Listener]) -> dict[str | None, int]:
    """Cause -> refusals. None: the last quarter of the SYN queue may be reserved, which is done without SYN cookies."""
    rest = new.drops - new.overflows - new.full
    rest_cause = "OTHER" if group[0].syncookies else None
    found = {"ACCEPT_QUEUE_FULL": new.overflows, "SYN_QUEUE_FULL": new.full, rest_cause: rest}
    return {cause: n for cause, n in found.items() if n}


def _samples(
    parts: list[tuple[Listener, int]], causes: dict[str | None, int], complete: bool, step: str | None
) -> Iterator[Sample]:
    """The refusals of each listener, with their causes if they are certain.

    complete  whether the parts have all refusals of `causes`
    """
    if len(causes) == 1:
        yield from (Sample(own, part, cause, step) for own, part in parts for cause in causes)
        return
    if complete and len(parts) == 1:
        yield from (Sample(parts[0][0], n, cause, step) for cause, n in causes.items())
        return
    full = {own.key: part for own, part in parts if own.accept_queue > own.accept_limit}
    if complete and len(causes) == 2 and sum(full.values()) == causes.get("ACCEPT_QUEUE_FULL"):
        (other,) = causes.keys() - {"ACCEPT_QUEUE_FULL"}
        yield from (Sample(own, n, "ACCEPT_QUEUE_FULL" if own.key in full else other, step) for own, n in parts)
        return
    yield from (Sample(own, part, None, step) for own, part in parts)


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
