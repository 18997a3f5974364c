"""Clients come to an address at which nothing listens, while the same port listens at another one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, endpoint
from tcpscope.diagnose.attempts import falls_back, has_answered, is_steady
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.tallies import Tally
from tcpscope.diagnose.wording import of, whose
from tcpscope.output import endpoint as text_of

LEAST, LOCAL_LEAST = 10, 3
"""SYNs of one peer. A port scan has one or two for each port; a client of this host is no scanner."""

_STARTS_SECONDS = 1.0
"""A listener that is younger has not been there when a SYN came."""

_PEERS_SHOWN = 3
_RISK = "Whoever reaches any address of this host can connect then, unless a firewall forbids it."


class WrongAddress(Rule):
    needs = ("resets", "queues")
    explains = ("connects_fail",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        refused: dict[tuple[int, int], list[tuple[Any, Tally]]] = defaultdict(list)
        for group, tally in seen.resets.tallies.items():
            if group.cause == "NO_LISTENER":
                refused[group.netns, group.lport].append((group, tally))
        if not refused:
            return
        listening: dict[tuple[int, int], list[History]] = defaultdict(list)
        for history in seen.queues.histories.values():
            own = history.last
            if not history.gone and (own.netns, own.lport) in refused:
                listening[own.netns, own.lport].append(history)
        for key, histories in listening.items():
            yield from self._judge(seen, histories, refused[key])

    def _judge(self, seen: Evidence, histories: list[History], refused: list[tuple[Any, Tally]]) -> Iterator[Finding]:
        """One finding for a port: the listener that is there for longest, and who came to other addresses."""
        history = min(histories, key=lambda each: each.began)
        addresses = {each.last.laddr for each in histories}
        since = history.began + _STARTS_SECONDS if history.last.since_ns else 0.0
        peers: dict[tuple[str, str], list[Tally]] = defaultdict(list)
        for group, tally in refused:
            if group.laddr not in addresses and tally.last_s > since:
                peers[group.laddr, group.raddr].append(tally)
        wrong: dict[tuple[str, str], Tally] = {}
        for (laddr, raddr), tallies in peers.items():
            if sum(tally.count for tally in tallies) >= (LOCAL_LEAST if is_local(laddr, raddr) else LEAST):
                wrong[laddr, raddr] = total = Tally()
                for tally in tallies:
                    total.merge(tally)
        if wrong:
            yield self._finding(seen, history, addresses, wrong)

    def _finding(
        self, seen: Evidence, history: History, addresses: set[str], wrong: dict[tuple[str, str], Tally]
    ) -> Finding:
        own = history.last
        came: Counter[str] = Counter()
        clients: Counter[str] = Counter()
        total = Tally()
        for (laddr, raddr), tally in wrong.items():
            came[laddr] += tally.count
            clients[raddr] += tally.count
            total.merge(tally)
        wanted = came.most_common(1)[0][0]
        is_check = all(
            is_steady(tally.count, tally.first_s, tally.last_s, tally.between_ns) for tally in wrong.values()
        )
        loopback = all(ip_address(address).is_loopback for address in came)
        both_versions = loopback and all(_falls_back(seen, own.netns, own.lport, address) for address in came)
        severity = "info" if both_versions or is_check else "critical"
        if not both_versions and is_check and any(has_answered(seen, own.netns, each, own.lport) for each in came):
            severity = "warning"
        common = of(history)
        shown = [f"{address} ({number})" for address, number in clients.most_common(_PEERS_SHOWN)]
        more = f" and {len(clients) - _PEERS_SHOWN} more addresses" if len(clients) > _PEERS_SHOWN else ""
        where = ", ".join(text_of(address, own.lport) for address in sorted(addresses))
        return Finding(
            rule=self.name,
            severity=severity,
            title=f"clients connect to {text_of(wanted, own.lport)}, but {whose(history)} listens at {where} only",
            observed=[
                f"{came.total()} SYNs refused with a RST: {', '.join(f'{n} to {each}' for each, n in came.items())}",
                f"port {own.lport} listens at {', '.join(sorted(addresses))}",
                f"clients: {', '.join(shown)}{more}",
                *(
                    [f"they connect to port {own.lport} at a loopback address of the other IP version as often"]
                    * both_versions
                ),
            ],
            why=(
                "A listener takes connections only at the address that bind() was given. For all other addresses of "
                "the host the kernel answers a SYN with a RST, as if nothing listened at this port."
                + " A name such as localhost has addresses of both IP versions: each connect comes a little later."
                * both_versions
            ),
            remedies=[
                Remedy(
                    f"Let {own.owner.comm if own.owner else 'the server'} listen at {wanted} too, "
                    + ("" if loopback else "or at all addresses, ")
                    + f"and restart it; or send the clients to {', '.join(sorted(addresses))}.",
                    name="listen address",
                    present=", ".join(sorted(addresses)),
                    proposed=wanted if loopback else "::" if ":" in wanted else "0.0.0.0",
                    risk=None if loopback else _RISK,
                )
            ],
            facts={
                "netns": own.netns,
                "lport": own.lport,
                "laddr": wanted,
                "listens": sorted(addresses),
                "pids": [holder.pid for holder in own.holders],
                "comm": own.owner.comm if own.owner else None,
                "clients": dict(clients.most_common(_PEERS_SHOWN)),
                "count": came.total(),
            },
            who=common["who"],
            look=(f"reset -L {own.lport}", f"connect --failed -R {own.lport}"),
            about=common["about"] | {endpoint(own.netns, address, own.lport) for address in came},
            first_s=total.first_s,
            last_s=total.last_s,
            subject=(own.netns, own.lport),
        )


def _falls_back(seen: Evidence, netns: int, port: int, address: str) -> bool:
    """Whether those who are refused at this loopback address get through at one of the other IP version. False also if
    that is not known."""
    attempts, failed = getattr(seen, "attempts", None), Counter[str | None]()
    if attempts is None:
        return False
    for group, tally in attempts.where(netns=netns, raddr=address, rport=port, outcome="REFUSED"):
        failed[group.comm] += tally.count
    return bool(failed) and falls_back(seen, (netns, address), {port}, failed)


def is_local(laddr: str, raddr: str) -> bool:
    """Whether a client of the same host has come."""
    return laddr == raddr or ip_address(raddr).is_loopback


rule = WrongAddress()
