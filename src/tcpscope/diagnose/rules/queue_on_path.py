"""Packets wait in a queue on the way to an address: round trips take many times what they take without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from tcpscope.diagnose import Finding, Remedy, Rule, paths
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Peer
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.wording import seconds

# FIELD.md, fault 16: 241 ms beside a smallest of 0.026. Users feel 100 ms; ten times the smallest is beyond what a path
# does without a queue; one connection alone may have a slow process at its other end.
SLOW_US = 100_000
TIMES = 10
CONNECTIONS = 3
# Who gets one small segment may acknowledge it up to 500 ms later, and should not with two full ones (RFC 5681,
# 4.2). So slow round trips are a queue only beside a connection with two full segments on their way, or with ten moved
# since the look before.
FULL_SEGS, MOVED_SEGS = 2, 10
ANSWERED_US = 3_000_000  # an older round-trip time says nothing of now
BULK = 0.5  # a connection with this part of what is sent, or received, is the one that fills the queue

WHY = (
    "A link on the way, or the device of this host, gets more than it takes, and its queue is long: every packet waits "
    "behind those of the others, small requests too. TCP fills a queue until it loses packets."
)


def is_slow(row: Any, before: Any) -> bool:
    """Its round trips take long. How long they may take depends on others with the same address."""
    return bool((row.srtt_us or 0) >= SLOW_US and row.since_ack_us < ANSWERED_US and row.state in paths.SENDING)


def fills(row: Any, before: Any) -> bool:
    """It sends much, and its round trips take long; or it receives much."""
    sent, received = (
        getattr(row, name) - getattr(before, name) if before is not None else 0
        for name in ("sent_bytes", "received_bytes")
    )
    sends = row.unacked >= FULL_SEGS * row.mss or sent >= MOVED_SEGS * row.mss
    return bool((sends and is_slow(row, before)) or received >= MOVED_SEGS * row.mss)


def has_been_faster(track: Track) -> bool:
    """Its own round trips once took a small part of what they take. Otherwise it may just be far away."""
    least_us = track.last.min_rtt_us
    return least_us is not None and bool(track.last.srtt_us >= TIMES * least_us)


def waits(track: Track, least_us: int) -> bool:
    """`least_us`: the smallest round trip of any connection with its address.

    Behind the address of a client there may be many hosts, near and far (NAT, a proxy, a VPN): of these each is
    compared with itself. A server is one place, and connections that have begun in the queue count.
    """
    if track.last.role == "PASSIVE":
        return has_been_faster(track)
    return bool(track.last.srtt_us >= TIMES * least_us)


class QueueOnPath(Rule):
    needs = ("sockets",)
    marks: ClassVar = {"queue_on_path": is_slow, "fills_a_queue": fills}
    explains = ("spurious_retrans", "loss")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        for where, tracks in paths.by_peer(seen.sockets.now).items():
            slow = [track for track in tracks if track.holds("queue_on_path")]
            if len(slow) < CONNECTIONS or not any(track.holds("fills_a_queue") for track in tracks):
                continue
            least_us = _least_us(tracks)
            slow = [track for track in slow if least_us is not None and waits(track, least_us)]
            if len(slow) < CONNECTIONS or not any(map(has_been_faster, slow)):
                continue
            if _are_clients(slow):
                least_us = _least_us(slow)  # others may be nearer
            if least_us is not None:
                yield self._finding(where, tracks, slow, least_us)

    def _finding(self, where: Peer, tracks: list[Track], slow: list[Track], least_us: int) -> Finding:
        srtt_us = sorted(track.last.srtt_us for track in slow)
        middle_us, owners, bulk = srtt_us[len(srtt_us) // 2], paths.owners(slow), _bulk(tracks)
        observed = [
            f"{paths.number(len(slow), 'connection')} ({paths.ports(slow)}) with round trips of {seconds(srtt_us[0])} "
            "to "
            f"{seconds(srtt_us[-1])}; the smallest {'of these' if _are_clients(slow) else 'to this address'} was "
            f"{least_us / 1000:.3g} ms",
        ]
        if bulk:
            observed.append(
                f"{paths.who(Counter([bulk.owner]))} {bulk.way} {bulk.bytes_per_s / 1e6:.2g} MB/s, {bulk.share:.0%} of "
                "all with this address"
            )
        who = {"who": paths.who(Counter([bulk.owner]))} if bulk else {}  # who fills the queue can act, not who waits
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"round trips to {where[1]} take {seconds(middle_us)}, {middle_us // max(least_us, 1):,} times the "
            "smallest: a queue on the way",
            observed=observed,
            why=WHY,
            remedies=list(_remedies(bulk)),
            **paths.of(where, owners, "rtt", "top") | who,
            facts=paths.facts(
                where,
                owners,
                len(slow),
                srtt_us=middle_us,
                most_us=srtt_us[-1],
                min_rtt_us=least_us,
                bulk_pid=bulk.owner[0] if bulk else None,
                bulk_comm=bulk.owner[1] if bulk else None,
                bulk_bytes_per_s=round(bulk.bytes_per_s) if bulk else None,
            ),
        )


def _are_clients(tracks: list[Track]) -> bool:
    return all(track.last.role == "PASSIVE" for track in tracks)


def _least_us(tracks: list[Track]) -> int | None:
    return min((track.last.min_rtt_us for track in tracks if track.last.min_rtt_us is not None), default=None)


class _Bulk(NamedTuple):
    """The process that moves most of what is moved with an address."""

    owner: tuple[int, str]
    way: str
    bytes_per_s: float
    share: float


def _bulk(tracks: list[Track]) -> _Bulk | None:
    found = []
    for column, way in (("sent_bytes", "sends"), ("received_bytes", "receives")):
        rates: Counter[tuple[int, str]] = Counter()
        for track in tracks:
            if track.watched_s and track.last.pid is not None:
                rates[track.last.pid, track.last.comm] += round(track.grown(column) / track.watched_s)
        if total := rates.total():
            ((owner, rate),) = rates.most_common(1)
            found.append(_Bulk(owner, way, rate, rate / total))
    most = max(found, key=lambda bulk: bulk.bytes_per_s, default=None)
    return most if most and most.share >= BULK else None


def _remedies(bulk: _Bulk | None) -> Iterator[Remedy]:
    if bulk:
        yield Remedy(
            f"Limit what {bulk.owner[1]} moves (SO_MAX_PACING_RATE, or a limit of its own), or let it run when nobody "
            "waits."
        )
    yield Remedy(
        "Give the queue a discipline that keeps it short (fq_codel, cake) at the slowest link, where the packets "
        "wait: a "
        "router, or this host's own device. More buffer there makes it worse."
    )


rule = QueueOnPath()
