"""rp_filter drops handshakes: they come in by another device than answers would leave by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, endpoint, listener, paths, peer, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.tallies import Tally

LEAST = 3
"""SYNs or SYN-ACKs. One alone may be forged, which is what rp_filter is there for."""

MANY = 5
REASON, COUNTER = "IP_RPFILTER", "TcpExtIPReversePathFilter"
_FUNCTION = "ip_rcv_finish"
"""It frees the packet, where the kernel gives no reason."""

_WITHOUT_REASON = (None, "NOT_SPECIFIED")
_PORTS_SHOWN = 3
_WHY = (
    "With rp_filter=1 the kernel takes a packet only from the device through which it would answer the sender. These "
    "came by another one, or there is no route to their sender at all: the two ways differ (several uplinks, a VPN, "
    "policy routing), or the sender's address is forged. TCP never sees them, and nobody gets an answer."
)


class RpFilter(Rule):
    needs = ("drops", "counters")
    explains = ("connects_fail", "synack_unanswered", "drops")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        found: dict[tuple[int, bool], list[tuple[Any, Tally]]] = {}
        for group, tally in seen.drops.where(direction="RECEIVED", kind={"LOST", None}):
            if group.netns is not None and "SYN" in (group.flags or "") and _is_filtered(seen, group):
                found.setdefault((group.netns, "ACK" in group.flags), []).append((group, tally))
        for (netns, answers), groups in found.items():
            total = Tally()
            for _, tally in groups:
                total.merge(tally)
            if total.count >= LEAST:
                yield self._finding(seen, netns, answers, groups, total)

    def _finding(
        self, seen: Evidence, netns: int, answers: bool, groups: list[tuple[Any, Tally]], total: Tally
    ) -> Finding:
        peers, ports = Counter[str](), Counter[int]()
        owners: Counter[tuple[int, str]] = Counter()
        for group, tally in groups:
            peers[group.raddr] += tally.count
            ports[group.rport if answers else group.lport] += tally.count
            if group.pid is not None:
                owners[group.pid, group.comm] += tally.count
        what = "SYN-ACKs" if answers else "SYNs"
        about = {peer(netns, group.raddr) for group, _ in groups}
        for group, _ in groups:
            if answers:
                about |= {service(netns, group.raddr, group.rport), endpoint(netns, group.raddr, group.rport)}
            else:
                about |= {listener(netns, group.lport), endpoint(netns, group.laddr, group.lport)}
        grown = seen.counters.grown(netns, COUNTER)
        common = Counter(dict(peers.most_common(_PORTS_SHOWN)))
        whom = next(iter(peers)) if len(peers) == 1 else f"{len(peers)} addresses"
        return Finding(
            rule=self.name,
            severity="critical" if total.count >= MANY else "warning",
            title=f"rp_filter of this host drops {what} of {whom}: {total.count}",
            observed=[
                f"{total.count} {what} dropped, those that were sent again included; of {paths.listed(peers)}",
                f"{'ports of the services' if answers else 'for local ports'}: {paths.listed(ports)}",
                *([f"the kernel counts in {COUNTER} +{grown}, packets of whatever protocol"] if grown else []),
            ],
            why=_WHY,
            remedies=[
                Remedy(
                    "If the ways may differ, check only that the sender is reached at all (2). Or see by which device "
                    f"`ip route get {next(iter(common))}` would answer, and add the route that is missing.",
                    command=paths.command(netns, owners, "sysctl -w net.ipv4.conf.all.rp_filter=2"),
                    name="net.ipv4.conf.all.rp_filter",
                    present="1, there or at the device",
                    proposed=2,
                    risk="It is for all devices of this network namespace, and takes packets with a forged source, if "
                    "any route leads there. net.ipv4.conf.DEVICE.rp_filter is for one; the higher of the two counts.",
                )
            ],
            facts={
                "netns": netns,
                "count": total.count,
                "what": what,
                "peers": dict(common),
                "ports": dict(ports.most_common(_PORTS_SHOWN)),
                "counted": grown,
                "pids": paths.pids(owners),
                "comm": paths.program(owners) if owners else None,
            },
            who=paths.who(owners),
            look=(f"drop --reason {REASON} --netns {netns}",),
            about=frozenset(about),
            first_s=total.first_s,
            last_s=total.last_s,
            subject=(netns, answers),
        )


def _is_filtered(seen: Evidence, group: Any) -> bool:
    """By its reason; where there is none (before 5.18), by its function, if the counter has grown."""
    if group.reason not in _WITHOUT_REASON:
        return bool(group.reason == REASON)
    return str(group.location).startswith(_FUNCTION) and (seen.counters.grown(group.netns, COUNTER) or 0) >= LEAST


rule = RpFilter()
