"""A firewall of this host drops SYNs: those for a port that listens, or those of a process that connects. Or it drops
ACKs and data that this host sends."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, addresses, endpoint, paths, processes, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.tallies import Tally
from tcpscope.diagnose.wording import in_namespace, in_netns, is_in, of, whose
from tcpscope.kernel import pidns
from tcpscope.listeners import Listener
from tcpscope.output import endpoint as text_of

LEAST = 3
"""SYNs of one peer, or to one service. A scanner sends one."""

MANY = 5

SEGMENTS, SHARE = 20, 0.01
"""Of other segments to one address, and of all that the network namespace sends: as for losses. A firewall that knows
connections drops a late segment now and then."""

_FUNCTION = "nf_hook_slow"  # it frees the packet; before 5.17 there is no other sign
_WILDCARDS = ("0.0.0.0", "::")
_PEERS_SHOWN = 3
_WHY = (
    "A netfilter rule of this network namespace drops or rejects these SYNs. After a rejection connect() fails at once."
    " Without an answer the client's kernel sends the SYN again and again, until it or the application gives up."
)
_WHY_SEGMENTS = (
    "A netfilter rule of this network namespace drops them after TCP has sent them. The remote end gets no ACK, or one "
    "that is late since only a later one arrives: it sends its data again. What this host sends arrives late, or never."
)
_ALL_RULES = "nft list ruleset"
_COUNTERS = (
    "`nft list ruleset` or `iptables-save -c` shows the rules; if a rule has a counter, the one that grows is the one."
)


class FirewallDrops(Rule):
    needs = ("drops", "queues")
    explains = ("connects_fail", "loss", "spurious_retrans", "no_ack", "mtu_hole", "ends_by_timeout")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        received: dict[tuple[int, int], list[tuple[Any, Tally]]] = defaultdict(list)
        sent: dict[tuple[int, str, int], list[tuple[Any, Tally]]] = defaultdict(list)
        segments: dict[tuple[int, str], list[tuple[Any, Tally]]] = defaultdict(list)
        for group, tally in seen.drops.tallies.items():
            if not is_of_firewall(group) or group.netns is None:
                continue
            if not is_syn(group.flags):
                if group.direction == "SENT" and group.laddr and _is_of_connection(group.flags):
                    segments[group.netns, group.raddr].append((group, tally))
            elif group.direction == "RECEIVED":
                received[group.netns, group.lport].append((group, tally))
            elif group.direction == "SENT":
                sent[group.netns, group.raddr, group.rport].append((group, tally))
        if received:
            for history in seen.queues.histories.values():
                found = received.get((history.last.netns, history.last.lport))
                if found and not history.gone:
                    yield from self._received(seen, history, found)
        for key, found in sent.items():
            yield from self._sent(*key, found)
        for (netns, raddr), found in segments.items():
            yield from self._segments(seen, netns, raddr, found)

    def _received(self, seen: Evidence, history: History, found: list[tuple[Any, Tally]]) -> Iterator[Finding]:
        own, total = history.last, Tally()
        here = [(group, tally) for group, tally in found if _takes(own.laddr, group.laddr)]
        if max(_peers(here).values(), default=0) < LEAST:
            return
        if own.laddr in _WILDCARDS:
            # A SYN that this host forwards comes in, too, and may be for the same port of another host.
            local = {address: _is_local(seen, own, address) for address in {group.laddr for group, _ in here}}
            here = [(group, tally) for group, tally in here if local[group.laddr]]
        peers = _peers(here)
        if max(peers.values(), default=0) < LEAST:
            return
        for _, tally in here:
            total.merge(tally)
        laddrs = {group.laddr for group, _ in here}
        shown = ", ".join(f"{address} ({number})" for address, number in peers.most_common(_PEERS_SHOWN))
        more = f" and {len(peers) - _PEERS_SHOWN} more addresses" if len(peers) > _PEERS_SHOWN else ""
        accepts = "" if history.accepts is None else f"; it accepted {history.accepts} connections meanwhile"
        at = text_of(min(laddrs), own.lport) if len(laddrs) == 1 else f"port {own.lport}"  # not 0.0.0.0
        common = of(history)
        yield Finding(
            rule=self.name,
            severity="critical" if total.count >= MANY and history.accepts == 0 else "warning",
            title=f"a firewall of this host drops connections to {at}, {whose(history)}",
            observed=[
                f"{total.count} SYNs dropped, those that were sent again included{accepts}",
                f"clients: {shown}{more}",
            ],
            why=_WHY,
            remedies=[
                Remedy(
                    f"If these clients may connect, let the rule that drops take TCP port {own.lport} from them. "
                    f"{_COUNTERS}",
                    command=in_namespace(history, _ALL_RULES),
                    risk="The rule may be there to keep them out.",
                )
            ],
            facts={
                "netns": own.netns,
                "direction": "RECEIVED",
                "laddr": own.laddr,
                "lport": own.lport,
                "pids": [holder.pid for holder in own.holders],
                "comm": own.owner.comm if own.owner else None,
                "clients": dict(peers.most_common(_PEERS_SHOWN)),
                "accepts": history.accepts,
                "count": total.count,
            },
            who=common["who"],
            look=(f"drop -L {own.lport} --reason 'NETFILTER_*'",),
            about=common["about"] | {endpoint(own.netns, address, own.lport) for address in laddrs},
            first_s=total.first_s,
            last_s=total.last_s,
            subject=("listener", own.key),
        )

    def _sent(self, netns: int, raddr: str, rport: int, found: list[tuple[Any, Tally]]) -> Iterator[Finding]:
        total = Tally()
        owners: Counter[tuple[int | None, str | None]] = Counter()
        for group, tally in found:
            owners[group.pid, group.comm] += tally.count
        if owners.total() < LEAST:
            return
        for _, tally in found:
            total.merge(tally)
        (pid, comm), number = owners.most_common(1)[0]
        inside = [each for each, name in owners if each and is_in(each, netns, name)]
        yield Finding(
            rule=self.name,
            severity="critical" if total.count >= MANY else "warning",
            title=f"a firewall of this host drops what {comm or 'a process'} sends to {text_of(raddr, rport)}",
            observed=[
                f"{total.count} SYNs of this host dropped, those that were sent again included",
                *([f"{number} of them of {comm} (PID {pid})"] if pid else []),
            ],
            why=_WHY,
            remedies=[
                Remedy(
                    f"If {comm or 'the process'} may connect, let the rule that drops take {text_of(raddr, rport)}. "
                    f"{_COUNTERS}",
                    command=in_netns(netns, _ALL_RULES, inside),
                    risk="The rule may be there to keep it in.",
                )
            ],
            facts={
                "netns": netns,
                "direction": "SENT",
                "raddr": raddr,
                "rport": rport,
                "pids": sorted(each for each, _ in owners if each),
                "comm": comm,
                "count": total.count,
            },
            who=None if pid is None or pidns.inner() else processes.read(pid, comm).name,
            look=(f"drop --raddr {raddr} -R {rport} --reason 'NETFILTER_*'",),
            about=frozenset({service(netns, raddr, rport), endpoint(netns, raddr, rport)}),
            first_s=total.first_s,
            last_s=total.last_s,
            subject=("service", netns, raddr, rport),
        )

    def _segments(self, seen: Evidence, netns: int, raddr: str, found: list[tuple[Any, Tally]]) -> Iterator[Finding]:
        total = Tally()
        owners: Counter[tuple[int, str]] = Counter()
        for group, tally in found:
            total.merge(tally)
            if group.pid is not None:
                owners[group.pid, group.comm] += tally.count
        out = paths.transmitted(seen, netns, total.count)
        if total.count < SEGMENTS or out is None or total.count < SHARE * out:
            return
        acks = sum(tally.count for group, tally in found if group.flags == "ACK")
        name = f"{paths.program(owners)}'s connections" if owners else "its connections"
        yield Finding(
            rule=self.name,
            severity="warning",
            title=f"a firewall of this host drops what it sends to {raddr}: {total.count:,} segments",
            observed=[
                f"{total.count:,} segments of {name} dropped before they left; {acks:,} of them without a flag but ACK",
                f"{out:,} segments were sent in this network namespace meanwhile",
            ],
            why=_WHY_SEGMENTS,
            remedies=[
                Remedy(
                    f"Let the rule that drops take segments of open connections with {raddr}. {_COUNTERS}",
                    command=paths.command(netns, owners, _ALL_RULES),
                    risk="The rule may be there on purpose.",
                )
            ],
            facts={
                "netns": netns,
                "direction": "SENT",
                "raddr": raddr,
                "pids": paths.pids(owners),
                "comm": paths.program(owners) if owners else None,
                "acks": acks,
                "count": total.count,
            },
            who=paths.who(owners),
            look=(f"drop --raddr {raddr} --reason 'NETFILTER_*'",),
            about=paths.both((netns, raddr), ((group.laddr, group.lport, raddr, group.rport) for group, _ in found)),
            first_s=total.first_s,
            last_s=total.last_s,
            subject=("segments", netns, raddr),
        )


def _is_of_connection(flags: str | None) -> bool:
    return flags is not None and "ACK" in flags and "SYN" not in flags and "RST" not in flags


def _peers(found: list[tuple[Any, Tally]]) -> Counter[str]:
    peers: Counter[str] = Counter()
    for group, tally in found:
        peers[group.raddr] += tally.count
    return peers


def _takes(listens: str, laddr: str) -> bool:
    """Whether a listener there may take connections to this address. One at :: may take those of IPv4."""
    return listens in (laddr, "::") or (listens == "0.0.0.0" and ":" not in laddr)


def _is_local(seen: Evidence, own: Listener, laddr: str) -> bool:
    """Whether it is an address of this network namespace. If its addresses cannot be read, a connection shows it."""
    known = addresses.is_local(laddr, own)
    if known is not None:
        return known
    there = (own.netns, own.lport, laddr)
    rows = (track.last for track in seen.sockets.now) if hasattr(seen, "sockets") else ()
    return any((row.netns, row.lport, row.laddr) == there for row in rows)


def is_syn(flags: str | None) -> bool:
    return flags is not None and "SYN" in flags and "ACK" not in flags


def is_of_firewall(group: Any) -> bool:
    """Before 5.17 there is no reason, but the function."""
    if group.reason is None:
        return bool(group.location) and group.location.startswith(_FUNCTION)
    return bool(group.reason == "NETFILTER_DROP")


rule = FirewallDrops()
