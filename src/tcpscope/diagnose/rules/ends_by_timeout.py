"""Connections that the kernel ends because the remote end has not answered for too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, peer, processes
from tcpscope.diagnose.answers import EVERYDAY, answers
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.tallies import Tally
from tcpscope.diagnose.wording import in_netns, is_in
from tcpscope.output import endpoint

LEAST = 3
"""Of one remote address: a single client that vanishes is everyday."""

SEVERE = 10

_SHOWN = 3
_WHY_TIMEOUT = (
    "The kernel sent data again and again, or asked for room in the window, and no answer came until its patience "
    "ended (TCP_USER_TIMEOUT, net.ipv4.tcp_retries2). The application gets ETIMEDOUT."
)
_WHY_KEEPALIVE = (
    "An idle connection was probed (SO_KEEPALIVE), and no probe was answered. Then the kernel ends it, and the "
    "application gets ETIMEDOUT."
)
_WHERE = (
    " Either the remote host is gone, or a device between the two hosts (NAT, firewall, load balancer) has forgotten "
    "these connections and drops their packets without a word."
)


_WHERE_SHARED = (
    " The address lives: others of its connections are answered. Probably several hosts share it (NAT, a proxy, a "
    "VPN), and single ones have gone without closing, as telephones do out of reach."
)


class EndsByTimeout(Rule):
    needs = ("resets",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        peers: dict[tuple[int, str], list[tuple[Any, Tally]]] = {}
        for group, tally in seen.resets.where(cause=_CAUSES):
            peers.setdefault((group.netns, group.raddr), []).append((group, tally))
        for (netns, raddr), found in peers.items():
            if sum(tally.count for _, tally in found) >= LEAST:
                yield self._finding(netns, raddr, found, _answered(seen, netns, raddr, found))

    def _finding(self, netns: int, raddr: str, found: list[tuple[Any, Tally]], answered: int | None) -> Finding:
        total = Tally()
        owners, causes, ends = Counter[tuple[Any, Any]](), Counter[str](), Counter[str]()
        closed = 0
        # Of a service many connections have the same remote port, of clients the same local one.
        far = len({group.rport for group, _ in found}) < len({group.lport for group, _ in found})
        for group, tally in found:
            total.merge(tally)
            owners[group.pid, group.comm] += tally.count
            causes[group.cause] += tally.count
            ends[endpoint(raddr, group.rport) if far else f"local port {group.lport}"] += tally.count
            closed += tally.count if group.state in _CLOSED else 0
        (pid, comm), _ = owners.most_common(1)[0]
        pids = [number for (number, _), _ in owners.most_common() if number is not None]
        inside = [number for number, name in owners if number is not None and is_in(number, netns, name)]
        probes, timeouts = causes["KEEPALIVE"], causes["TIMEOUT"]
        observed = [
            f"{total.count} connections ended: {timeouts} by timeout of retransmissions or of probes of the window, "
            f"{probes} by keepalive",
            f"with {_most(ends)}; processes: {_most(_named(owners))}",
        ]
        if closed:
            observed.append(f"in {closed} of them the application had closed its end before")
        why = (_WHY_TIMEOUT if timeouts else "") + (" " if timeouts and probes else "")
        why += _WHY_KEEPALIVE if probes else ""
        lives = answered is not None and answered >= EVERYDAY * total.count
        if lives:
            observed.append(
                f"{answered:,} other connections of this address had an answer since the first of these ended"
            )
        return Finding(
            rule=self.name,
            severity="info" if lives else "critical" if total.count >= SEVERE else "warning",
            title=f"{total.count} connections of clients with {raddr} end without an answer; others are answered"
            if lives
            else f"connections with {raddr} end because it does not answer",
            observed=observed,
            why=why + (_WHERE_SHARED if lives else _WHERE),
            remedies=[]
            if lives
            else [
                Remedy(
                    f"See whether {raddr} can be reached.",
                    command=in_netns(netns, f"ping -c 3 {raddr}", inside),
                ),
                Remedy(
                    "If it can, a device between has forgotten the connections: let the application send something, or "
                    "keepalive probes (TCP_KEEPIDLE), more often than that device forgets.",
                ),
            ],
            who=processes.read(pid, comm).name if pid is not None else None,
            look=(f"reset --timeouts --raddr {raddr}", f"retrans --raddr {raddr}"),
            about=frozenset({peer(netns, raddr)}),
            first_s=total.first_s,
            last_s=total.last_s,
            facts={
                "netns": netns,
                "count": total.count,
                "raddr": raddr,
                "timeouts": timeouts,
                "keepalive": probes,
                "closed": closed,
                "answered_meanwhile": answered,
                "pids": pids,
            },
        )


def _answered(seen: Evidence, netns: int, raddr: str, found: list[tuple[Any, Tally]]) -> int | None:
    """How many connections that this address has made to the same ports had an answer since the first of these ended.

    None: not all of these ports have clients, or connections are not looked at.
    """
    if getattr(seen, "sockets", None) is None:
        return None
    known, lports = answers(seen), {group.lport for group, _ in found}
    if any((netns, lport) not in known.ports for lport in lports):
        return None
    return known.connections(netns, raddr, min(tally.first_s for _, tally in found), lports)


_CAUSES = frozenset({"KEEPALIVE", "TIMEOUT"})
_CLOSED = frozenset({"FIN_WAIT1", "FIN_WAIT2", "CLOSING", "LAST_ACK"})


def _named(owners: Counter[tuple[Any, Any]]) -> Counter[str]:
    return Counter({f"{comm} (PID {pid})" if pid is not None else "not known": n for (pid, comm), n in owners.items()})


def _most(found: Counter[str]) -> str:
    more = len(found) - _SHOWN
    text = ", ".join(f"{name}: {n}" for name, n in found.most_common(_SHOWN))
    return text + (f" and {more} more" if more > 0 else "")


rule = EndsByTimeout()
