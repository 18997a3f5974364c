"""This host's own queue before the link is full, or does not move: segments wait or are discarded before they leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, connection, paths, peer
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Owners
from tcpscope.kernel.features import Kernel

# As for losses (FIELD.md, fault 14). fq_codel and fq discard a packet now and then to slow down a sender: that is far
# below 1 % of the segments. Segments that wait when their timeout runs out are counted with them.
SHARE = 0.01
SEGMENTS = 20
WAITS = 3  # so many timeouts of one address at which nothing could be sent, and nothing was: the queue stands still

_ERRORS = ("EBUSY", "ENOBUFS")
"""Of timeouts. A loss probe comes after two round trips: on a busy processor its original often still waits."""

_EXPLAINED_BY_WAITING = (
    "no_ack",
    "mtu_hole",
    "spurious_retrans",
    "queue_on_path",
    "drops",
    "ends_by_timeout",
    "orphans",
)
"""Rules. What waits is not lost: only what this host discards explains a loss."""

_FREED_IN = ("kfree_skb_list", "__dev_queue_xmit", "__dev_xmit_skb")
"""Functions in which a queue discards, where discards have no reason."""

WHY_FULL = (
    "Each device has a queue (qdisc) for what it cannot send yet. When it is full the kernel discards further "
    "packets, and "
    "TCP has to send them again: the processes of this host send more than the device, or its shaping, lets through."
)
WHY_WAITS = (
    "When the timeout of these segments ran out they had not left this host yet, so the kernel did not send them "
    "again. They "
    "wait in the queue of the device (qdisc), in the device, or for the link address of the next host (ARP)."
)
WHY_UNRESOLVED = (
    "Before a packet leaves, the kernel asks for the link address of the next hop: of the host itself, if it is on the "
    "same network, else of the router. Nobody answers, so segments wait, and are discarded after three questions: that "
    "host is down, or is on another network (VLAN)."
)


@dataclass
class _Own:
    """What one network namespace could not send.

    unresolved  raddr -> packets discarded since no next hop has given its link address
    discarded   raddr -> packets that a queue discarded
    waited      raddr -> retransmissions that were not sent, since the original still waits
    refused     raddr -> retransmissions for which a queue had no room; they are among the discarded ones
    """

    unresolved: Counter[str] = field(default_factory=Counter)
    discarded: Counter[str] = field(default_factory=Counter)
    waited: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    owners: Owners = field(default_factory=Counter)
    connections: set[tuple[Any, ...]] = field(default_factory=set)
    first_s: float = float("inf")
    last_s: float = 0.0

    def add(self, group: Any, tally: Any, to: Counter[str]) -> None:
        to[group.raddr] += tally.count
        self.connections.add((group.laddr, group.lport, group.raddr, group.rport))
        if group.pid is not None:
            self.owners[group.pid, group.comm] += tally.count
        self.first_s, self.last_s = min(self.first_s, tally.first_s), max(self.last_s, tally.last_s)


def is_of_queue(group: Any) -> bool:
    """A discard by a queue of this host, of what it sends."""
    if group.direction != "SENT":
        return False
    return str(group.reason).startswith("QDISC") if group.reason else str(group.location).startswith(_FREED_IN)


class HostQueueFull(Rule):
    needs = ("retrans", "drops", "sockets", "counters")
    explains = (*_EXPLAINED_BY_WAITING, "loss")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        found: dict[int, _Own] = {}
        unresolved: dict[int, Counter[str]] = {}
        for group, tally in seen.drops.tallies.items():
            if is_of_queue(group):
                own = found.setdefault(group.netns, _Own())
                own.add(group, tally, own.discarded)
            elif paths.is_unresolved(group):
                unresolved.setdefault(group.netns, Counter())[group.raddr] += tally.count
        for group, tally in seen.retrans.tallies.items():
            if group.errno in _ERRORS and group.kind != "LOSS_PROBE":
                own = found.setdefault(group.netns, _Own())
                own.add(group, tally, own.waited if group.errno == "EBUSY" else own.refused)
        for netns, own in found.items():
            own.unresolved = unresolved.get(netns, own.unresolved)
            stands = [track for track in seen.sockets.now if track.last.netns == netns and _stands(track.last, own)]
            lost = max(own.discarded.total(), own.refused.total()) + own.waited.total()
            sent = paths.transmitted(seen, netns, lost)  # None: not known, and so is the share
            if stands or (sent and lost >= SEGMENTS and lost >= SHARE * sent):
                yield self._finding(seen, netns, own, len(stands), sent)

    def _finding(self, seen: Evidence, netns: int, own: _Own, stands: int, sent: int | None) -> Finding:
        addresses = own.discarded + own.waited + own.refused
        discarded = max(own.discarded.total(), own.refused.total())
        full = discarded >= own.waited.total()
        title = (
            f"this host discards what it sends: {paths.number(discarded, 'segment')} found its queue full"
            if full
            else f"what this host sends does not leave it: {paths.number(len(own.connections), 'connection')} held up"
        )
        observed = []
        asked = max(own.waited, key=lambda address: own.waited[address], default="")
        arp = paths.resolution(asked) if own.unresolved[asked] and not full else None
        if arp:
            title += f", for nobody answers {arp}"
            packets = paths.number(own.unresolved[asked], "packet")
            observed.append(f"{packets} to {asked} discarded: no next hop gave its link address")
        if discarded:
            observed.append(f"{paths.number(discarded, 'packet')} discarded by a queue (qdisc) of this host")
        if own.waited:
            observed.append(
                f"{paths.number(own.waited.total(), 'timeout')} at which the segment still waited in this host (EBUSY)"
            )
        if stands:
            observed.append(f"{paths.number(stands, 'connection')} cannot send at all now")
        if sent:
            observed.append(f"{sent:,} segments were sent in this network namespace meanwhile")
        observed.append(f"to {paths.listed(addresses, 'more addresses')}")
        return Finding(
            rule=self.name,
            severity="critical" if stands else "warning",
            title=title,
            observed=observed,
            why=WHY_FULL if full else WHY_UNRESOLVED if arp else WHY_WAITS,
            remedies=[
                Remedy(
                    "See which next hop does not answer (FAILED), and whether it is up and on this network.",
                    command=paths.command(netns, own.owners, f"sh -c 'ip route get {asked}; ip neigh'"),
                )
                if arp
                else Remedy(
                    "See which queue it is, its limit and its drops. A shaper (tbf, htb) may be set to less than the "
                    "link "
                    "takes; a queue may be too short; 'FAILED' in ip neigh is a next host that does not answer.",
                    command=paths.command(netns, own.owners, "sh -c 'tc -s qdisc; ip -s link; ip neigh'"),
                )
            ],
            who=paths.who(own.owners),
            look=(f"drop --netns {netns}", f"retrans --netns {netns}"),
            about=frozenset(
                {
                    ("queue", netns),
                    *(peer(netns, address) for address in addresses),
                    *(connection(netns, *ends) for ends in own.connections if None not in ends),
                }
            ),
            subject=("queue", netns),
            explains=None if discarded or own.unresolved.total() else _EXPLAINED_BY_WAITING,
            first_s=own.first_s,
            last_s=None if stands else own.last_s,
            facts={
                "netns": netns,
                "count": len(own.connections),
                "discarded": own.discarded.total(),
                "waited": own.waited.total(),
                "refused": own.refused.total(),
                "unresolved": sum(own.unresolved[address] for address in own.waited),
                "standing": stands,
                "sent": sent,
                "raddrs": dict(addresses.most_common(10)),
                "pids": paths.pids(own.owners),
                "comm": paths.program(own.owners) if own.owners else None,
            },
        )

    def unseen(self, seen: Evidence) -> Iterator[str]:
        if not Kernel().has_type("trace_event_raw_tcp_retransmit_skb"):
            yield "host_queue_full: this kernel (before 6.17) does not show retransmissions that could not be sent"


def _stands(row: Any, own: _Own) -> bool:
    """Its timeouts run out, and nothing was sent at any of them."""
    waits = own.waited[row.raddr] + own.refused[row.raddr] + own.discarded[row.raddr]
    return bool(
        row.out_segs and paths.timeouts(row) >= WAITS <= waits and row.state in paths.SENDING and not row.retrans_segs
    )


rule = HostQueueFull()
