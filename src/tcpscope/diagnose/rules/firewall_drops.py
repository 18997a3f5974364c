"""A firewall of this host drops handshakes: SYNs or SYN-ACKs, those of a port that listens, or those of a process that
connects. Or it drops ACKs and data, which this host sends or is to receive. Or its connection tracking is full."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from tcpscope.diagnose import (
    Finding,
    Remedy,
    Rule,
    addresses,
    connection,
    endpoint,
    listener,
    paths,
    peer,
    processes,
    service,
)
from tcpscope.diagnose.conntrack import Tables
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.firewall import (
    ACKS,
    ANSWERS,
    SYNS,
    Connecting,
    Dropped,
    Forwarded,
    Owner,
    dropped_of,
    ends_of,
    is_answer,
    is_of_connection,
    is_of_firewall,
    is_syn,
    listeners_in,
    takes,
    tracks_of,
)
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules.no_ack import CLIENTS
from tcpscope.diagnose.silence import is_silent
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.tallies import Tally
from tcpscope.diagnose.wording import in_namespace, in_netns, is_in, namespace, of, whose
from tcpscope.kernel import pidns
from tcpscope.listeners import Listener
from tcpscope.output import endpoint as text_of

LEAST = 3
"""Connections of one peer whose handshake is dropped; SYNs of this host to one service; packets of connections that
stall. A scanner makes one, and one bot that calls connect() sends the SYN of it five times in 15 s."""

MANY = 5

MANY_PEERS = 10
"""So many addresses whose SYNs were sent again, and nobody is accepted: they are the clients of this service."""

SEGMENTS, SHARE = 20, 0.01
"""Of other segments of one address, and of all that the network namespace sends, or that comes to it: as for losses. A
firewall that knows connections drops a late segment now and then."""


_WILDCARDS = ("0.0.0.0", "::")
_PEERS_SHOWN = 3
_WHY = (
    "{} of this network namespace drops or rejects these SYNs. After a rejection connect() fails at once."
    " Without an answer the client's kernel sends the SYN again and again, until it or the application gives up."
)
_A_RULE = "A netfilter rule"
_RULE_OR_TABLE = "A netfilter rule, or connection tracking whose table is full (the kernel's log says so, if it is),"
_WHY_FULL = (
    "Each connection needs an entry in the table of connections that netfilter tracks. When it is full, and no entry "
    "can be spared, the first packet of a new connection is dropped, as by a rule. Connections that have an entry go "
    "on. Many short connections, a flood, or long timeouts (nf_conntrack_tcp_timeout_*) fill it."
)
_ENTRY_BYTES = 320
"""Of struct nf_conn with its usual extensions, about."""

_WHY_STRANGERS = (
    " An address of the Internet of which nothing else is known may be a bot that looks for services. The rule may be "
    "there to keep it out."
)
_WHY_ANSWERS_COME = (
    "The SYNs leave this host, and SYN-ACKs answer them. A netfilter rule of this network namespace drops these, so "
    "connect() waits until it gives up. Often the rule that takes packets of known connections (ct state established) "
    "is missing, or comes too late."
)
_WHY_ANSWERS_LEAVE = (
    "The SYNs of these clients come in, and the kernel answers them. A netfilter rule of this network namespace drops "
    "the SYN-ACKs before they leave. Often the rule for packets of known connections (ct state established) is missing."
)
_WHY_ACKS = (
    "These clients have got the SYN-ACK, and believe that they are connected. A netfilter rule of this network "
    "namespace drops what they send then, so the handshake is never completed: often a rule about packets without a "
    "known connection (ct state invalid), or the one for those of known connections is missing."
)
_WHY_SEGMENTS = (
    "A netfilter rule of this network namespace drops them after TCP has sent them. The remote end gets no ACK, or one "
    "that is late since only a later one arrives: it sends its data again. What this host sends arrives late, or never."
)
_WHY_COMES = (
    "A netfilter rule of this network namespace drops them before TCP gets them. Data that is dropped is sent again "
    "and again; where ACKs are, this host sends again what has arrived. A firewall that has lost its table takes such "
    "packets for invalid (ct state invalid): after its rules were loaded anew, or its connections were flushed."
)
_ALL_RULES = "nft list ruleset"
_COUNTERS = (
    "`nft list ruleset` or `iptables-save -c` shows the rules; if a rule has a counter, the one that grows is the one."
)
_KNOWN = (
    "Let the rules take packets of known connections (`ct state established,related accept`, or `-m conntrack "
    "--ctstate ESTABLISHED,RELATED -j ACCEPT`) before they drop any."
)

_AT_LISTENER = {
    SYNS: ("connections to", _WHY),
    ANSWERS: ("the SYN-ACKs of", _WHY_ANSWERS_LEAVE),
    ACKS: ("what completes handshakes with", _WHY_ACKS),
}
"""What is dropped -> for the title, and behind it."""


class FirewallDrops(Rule):
    needs = ("drops", "queues")
    explains = (
        "connects_fail",
        "synack_unanswered",
        "no_ack",
        "loss",
        "spurious_retrans",
        "mtu_hole",
        "ends_by_timeout",
    )

    def __init__(self) -> None:
        self._tables = Tables()

    def check(self, seen: Evidence) -> Iterator[Finding]:
        of_listeners: dict[tuple[int, int], dict[str, list[Dropped]]] = defaultdict(lambda: defaultdict(list))
        of_clients: dict[tuple[int, int, str, int, str], list[Dropped]] = defaultdict(list)
        coming: list[tuple[str, Dropped]] = []
        segments: dict[tuple[int, str, str], list[tuple[Any, Tally]]] = defaultdict(list)
        untracked: dict[int, list[tuple[Any, Tally]]] = defaultdict(list)
        is_full: dict[int, bool] = {}
        waiting: set[tuple[int, int, str, int]] | None = None
        for group, tally in seen.drops.tallies.items():
            if not is_of_firewall(group) or group.netns is None or group.direction not in ("RECEIVED", "SENT"):
                continue
            comes = group.direction == "RECEIVED"
            what = SYNS if is_syn(group.flags) else ANSWERS if is_answer(group.flags) else None
            if what is None:
                if not group.laddr or not is_of_connection(group.flags):
                    continue
                if waiting is None:
                    waiting = _waiting_for_ack(seen)
                if not comes or (group.netns, group.lport, group.raddr, group.rport) not in waiting:
                    segments[group.netns, group.raddr, group.direction].append((group, tally))
                    continue
                what = ACKS
            dropped = dropped_of(group, tally, here=comes == (what != ANSWERS))
            if what == SYNS and not dropped.by_rule:
                if group.netns not in is_full:
                    table = self._tables.of(group.netns)
                    is_full[group.netns] = table is not None and table.is_full
                if is_full[group.netns]:
                    untracked[group.netns].append((group, tally))
                    continue
            if comes and what != ACKS:
                coming.append((what, dropped))
            elif what == SYNS:
                of_clients[group.netns, group.netns, group.raddr, group.rport, what].append(dropped)
            else:
                of_listeners[group.netns, group.lport][what].append(dropped)
        for netns, of_none in untracked.items():
            yield from self._table_full(netns, of_none)
        connecting = Connecting(seen) if of_listeners or of_clients or coming else None
        if coming and connecting:
            forwarded = Forwarded(seen, connecting)
            to_listeners: dict[tuple[int, Any, str], tuple[History, list[Dropped]]] = {}
            for what, dropped in coming:
                if history := forwarded.listener(what, dropped):
                    to_listeners.setdefault((dropped.netns, history.last.key, what), (history, []))[1].append(dropped)
                    continue
                clients = forwarded.client(what, dropped)
                if what == ANSWERS or clients is not None:
                    there = dropped.netns if clients is None else clients
                    of_clients[dropped.netns, there, dropped.laddr, dropped.lport, what].append(dropped)
                else:
                    of_listeners[dropped.netns, dropped.lport][what].append(dropped)
            for (netns, _, what), (history, here) in to_listeners.items():
                yield from self._at_listener(seen, connecting, history, what, here, netns)
        if of_listeners and connecting:
            for history in seen.queues.histories.values():
                found = of_listeners.get((history.last.netns, history.last.lport))
                if found and not history.gone:
                    for what, here in found.items():
                        yield from self._at_listener(seen, connecting, history, what, here)
        if of_clients and connecting:
            for (netns, there, raddr, rport, what), here in of_clients.items():
                yield from self._at_client(seen, connecting, netns, there, raddr, rport, what, here)
        if segments:
            silent: dict[Any, list[Track]] = defaultdict(list)
            for track in tracks_of(seen):
                if track.last.state in paths.SENDING and is_silent(track):
                    silent[_connection(track)].append(track)
            known = {ends_of(track.last) for tracks in silent.values() for track in tracks}
            # What comes in must be for a socket that is there: the packet has its owner, or it stalls. A firewall may
            # well drop the rest.
            for (netns, raddr, direction), packets in segments.items():
                for_us = packets
                if direction == "RECEIVED":
                    for_us = [each for each in packets if each[0].pid is not None or ends_of(each[0]) in known]
                if for_us:
                    yield from self._segments(seen, netns, raddr, direction, for_us, silent)

    def _at_listener(
        self,
        seen: Evidence,
        connecting: Connecting,
        history: History,
        what: str,
        found: list[Dropped],
        forwards: int | None = None,
    ) -> Iterator[Finding]:
        """`forwards`: the network namespace that drops them, if it is not the listener's.

        Of an address that is not known otherwise a firewall may well drop the SYNs: that is for information. Of one
        that belongs here, one connect() that waits is enough: its SYN is sent again.

        One that takes SYNs, and drops what follows, is wrong, whosever these are.
        """
        own, total = history.last, Tally()
        here = [each for each in found if takes(own.laddr, each.laddr)]
        if max(_peers(here).values(), default=0) < LEAST and not _are_many(here):
            return
        if own.laddr in _WILDCARDS and forwards is None and what == SYNS:
            # A SYN that this host forwards comes in, too, and may be for the same port of another host.
            local = {address: _is_local(seen, own, address) for address in {each.laddr for each in here}}
            here = [each for each in here if local[each.laddr]]
        for each in here:
            total.merge(each.tally)
        tries, peers = _tries(here), _peers(here)
        laddrs = {each.laddr for each in here}
        often = [raddr for raddr, number in tries.items() if number >= LEAST]
        many = _are_many(here) and _stopped(history, total.first_s)
        ours = often
        if what == SYNS:
            again = (raddr for raddr, number in peers.items() if number >= LEAST)
            ours = [raddr for raddr in again if _belongs(seen, connecting, own, laddrs, raddr)]
        if not often and not ours and not many:
            return
        if ours:
            none = sum(tries[raddr] for raddr in ours) >= MANY and _stopped(history, total.first_s)
            severity = "critical" if none else "warning"
        else:
            severity = "critical" if many else "info"
        shown = ", ".join(f"{address} ({number})" for address, number in peers.most_common(_PEERS_SHOWN))
        more = f" and {len(peers) - _PEERS_SHOWN} more addresses" if len(peers) > _PEERS_SHOWN else ""
        accepts = "" if history.accepts is None else f"; it accepted {history.accepts} connections meanwhile"
        at = text_of(min(laddrs), own.lport) if len(laddrs) == 1 else f"port {own.lport}"  # not 0.0.0.0
        dropped, why = _AT_LISTENER[what]
        why = why.format(self._culprit(here))
        common = of(history)
        yield Finding(
            rule=self.name,
            severity=severity,
            title=f"a firewall of this host drops {dropped} {at}, {whose(history)}",
            observed=[
                f"{total.count} {what} of {paths.number(tries.total(), 'connection')} dropped, those that were sent "
                f"again included{accepts}",
                f"clients: {shown}{more}",
                *(["nothing else was seen of those that come again"] if severity == "info" else []),
                *([_forwarded_for(own.netns)] if forwards else []),
            ],
            why=why + (_WHY_STRANGERS if severity == "info" else ""),
            remedies=[
                Remedy(
                    f"If these clients may connect, let the rule that drops take TCP port {own.lport} from them. "
                    f"{_COUNTERS}"
                    if what == SYNS
                    else f"{_KNOWN} {_COUNTERS}",
                    command=_rules_of(seen, forwards) if forwards else in_namespace(history, _ALL_RULES),
                    risk="The rule may be there to keep them out.",
                )
            ],
            facts={
                "netns": forwards or own.netns,
                "direction": "SENT" if what == ANSWERS and not forwards else "RECEIVED",
                "forwarded": forwards is not None,
                "what": what,
                "laddr": own.laddr,
                "lport": own.lport,
                "pids": [holder.pid for holder in own.holders],
                "comm": own.owner.comm if own.owner else None,
                "clients": dict(peers.most_common(_PEERS_SHOWN)),
                "accepts": history.accepts,
                "connections": tries.total(),
                "count": total.count,
            },
            who=common["who"],
            look=(f"drop -L {own.lport} --reason 'NETFILTER_*'",),
            about=common["about"] | {endpoint(own.netns, address, own.lport) for address in laddrs},
            first_s=total.first_s,
            last_s=total.last_s,
            subject=("listener", own.key, what, forwards),
        )

    def _at_client(
        self,
        seen: Evidence,
        connecting: Connecting,
        netns: int,
        there: int,
        raddr: str,
        rport: int,
        what: str,
        found: list[Dropped],
    ) -> Iterator[Finding]:
        """`there`: the network namespace of the process, if it is not the one that drops them.

        SYNs that a process of this host sends, or the SYN-ACKs that answer them.

        Others may send SYN-ACKs that nobody has asked for, and a firewall drops those. So somebody must wait for them.
        """
        total, culprit = Tally(), self._culprit(found)
        owners: Counter[Owner] = Counter()
        for each in found:
            waits = connecting.failing.get((each.raddr, raddr, rport), Counter())
            here = {(pid, comm): number for (inode, pid, comm), number in waits.items() if inode == there}
            sent = what == SYNS and there == netns
            if sent or here:
                total.merge(each.tally)
                owner = each.owner if sent or each.owner[0] else max(here, key=lambda one: here[one])
                owners[owner] += each.tally.count
        if total.count < LEAST:
            return
        (pid, comm), number = owners.most_common(1)[0]
        inside = [each for each, name in owners if each and is_in(each, netns, name)]
        name, at = comm or "a process", text_of(raddr, rport)
        forwarded = there != netns
        succeeded = connecting.answered[there, raddr, rport] if what == ANSWERS or forwarded else 0
        yield Finding(
            rule=self.name,
            severity="critical" if total.count >= MANY and not succeeded else "warning",
            title=f"a firewall of this host drops what {name} sends to {at}"
            if what == SYNS
            else f"a firewall of this host drops the answers of {at} to {name}",
            observed=[
                f"{total.count} {what} {'of' if what == SYNS else 'for'} this host dropped, those that were sent again "
                "included",
                *([f"{number} of them {'of' if what == SYNS else 'for'} {comm} (PID {pid})"] if pid else []),
                *([f"{succeeded} connects succeeded meanwhile"] if succeeded else []),
                *([_forwarded_for(there)] if forwarded else []),
            ],
            why=_WHY.format(culprit) if what == SYNS else _WHY_ANSWERS_COME,
            remedies=[
                Remedy(
                    f"If {comm or 'the process'} may connect, let the rule that drops take {at}. {_COUNTERS}"
                    if what == SYNS
                    else f"{_KNOWN} {_COUNTERS}",
                    command=_rules_of(seen, netns) if forwarded else in_netns(netns, _ALL_RULES, inside),
                    risk="The rule may be there to keep it in.",
                )
            ],
            facts={
                "netns": netns,
                "direction": "SENT" if what == SYNS and not forwarded else "RECEIVED",
                "forwarded": forwarded,
                "what": what,
                "raddr": raddr,
                "rport": rport,
                "pids": sorted(each for each, _ in owners if each),
                "comm": comm,
                "count": total.count,
            },
            who=None if pid is None or pidns.inner() else processes.read(pid, comm).name,
            look=(f"drop --raddr {raddr} -R {rport} --reason 'NETFILTER_*'",),
            about=frozenset({service(there, raddr, rport), endpoint(there, raddr, rport)}),
            first_s=total.first_s,
            last_s=total.last_s,
            subject=("service", netns, there, raddr, rport, what),
        )

    def _culprit(self, found: list[Dropped]) -> str:
        """What has dropped these. A table that can be read is not full: that is another finding."""
        is_rule = all(map(self._tables.of, {each.netns for each in found if not each.by_rule}))
        return _A_RULE if is_rule else _RULE_OR_TABLE

    def _table_full(self, netns: int, found: list[tuple[Any, Tally]]) -> Iterator[Finding]:
        table, total = self._tables.of(netns), Tally()
        peers, about = Counter[str](), set[tuple[Any, ...]]()
        owners: Counter[tuple[int, str]] = Counter()
        for group, tally in found:
            total.merge(tally)
            peers[group.raddr] += tally.count
            if group.direction == "SENT":
                about |= {service(netns, group.raddr, group.rport), endpoint(netns, group.raddr, group.rport)}
            else:
                about |= {listener(netns, group.lport), endpoint(netns, group.laddr, group.lport)}
            if group.pid is not None:
                owners[group.pid, group.comm] += tally.count
        if table is None or total.count < LEAST:
            return
        proposed = 2 * table.limit
        yield Finding(
            rule=self.name,
            severity="critical" if total.count >= MANY else "warning",
            title=f"connection tracking of this host is full: {table.entries:,} of {table.limit:,} entries",
            observed=[
                f"net.netfilter.nf_conntrack_count {table.entries}, nf_conntrack_max {table.limit}",
                f"{total.count} SYNs dropped by netfilter, those that were sent again included; remote ends: "
                f"{paths.listed(peers, 'more addresses')}",
            ],
            why=_WHY_FULL,
            remedies=[
                Remedy(
                    "Let the table have more entries, and its hash table as many buckets (nf_conntrack_buckets). "
                    "`conntrack -L` shows who has them: connections of a service that needs no tracking may do without "
                    "(notrack).",
                    command=in_netns(netns, f"sysctl -w net.netfilter.nf_conntrack_max={proposed}"),
                    name="net.netfilter.nf_conntrack_max",
                    present=table.limit,
                    proposed=proposed,
                    risk=f"Memory: about {_ENTRY_BYTES} bytes for an entry, {proposed * _ENTRY_BYTES / 1e6:,.0f} MB "
                    "for all of them. In a container only its host may be able to set it.",
                )
            ],
            facts={
                "netns": netns,
                "entries": table.entries,
                "limit": table.limit,
                "peers": dict(peers.most_common(_PEERS_SHOWN)),
                "pids": paths.pids(owners),
                "comm": paths.program(owners) if owners else None,
                "count": total.count,
            },
            who=None,
            look=(f"drop --netns {netns} --reason 'NETFILTER_*'",),
            about=frozenset(about),
            first_s=total.first_s,
            last_s=total.last_s,
            subject=("table", netns),
        )

    def _segments(
        self,
        seen: Evidence,
        netns: int,
        raddr: str,
        direction: str,
        found: list[tuple[Any, Tally]],
        silent: Mapping[Any, list[Track]],
    ) -> Iterator[Finding]:
        """Many, or a few of connections that stall for it."""
        comes = direction == "RECEIVED"
        by_connection: Counter[tuple[Any, ...]] = Counter()
        total = Tally()
        owners: Counter[tuple[int, str]] = Counter()
        for group, tally in found:
            total.merge(tally)
            by_connection[connection(netns, *ends_of(group))] += tally.count
            if group.pid is not None:
                owners[group.pid, group.comm] += tally.count
        stalled = [track for each in by_connection for track in silent.get(each, ())]
        for track in stalled if not owners else ():
            if track.last.netns == netns and track.last.pid is not None:
                owners[track.last.pid, track.last.comm] += 1
        of_stalled = sum(by_connection[each] for each in {_connection(track) for track in stalled})
        harm = of_stalled >= LEAST and (
            len(stalled) >= CLIENTS or any(track.last.role != "PASSIVE" for track in stalled)
        )
        number = _arrived(seen, netns, total.count) if comes else paths.transmitted(seen, netns, total.count)
        often = total.count >= SEGMENTS and number is not None and total.count >= SHARE * number
        if not harm and not often:
            return
        acks = sum(tally.count for group, tally in found if group.flags == "ACK")
        name = f"{paths.program(owners)}'s connections" if owners else "its connections"
        what = f"{paths.number(total.count, 'segment')}"
        stall = f"; {paths.number(len(stalled), 'connection')} of this machine stalled" if harm else ""
        all_ = "not known" if number is None else f"{number:,}"
        way = "came to" if comes else "were sent in"
        yield Finding(
            rule=self.name,
            severity="critical" if harm else "warning",
            title=(
                f"a firewall of this host drops what {raddr} sends: {what}"
                if comes
                else f"a firewall of this host drops what it sends to {raddr}: {what}"
            ),
            observed=[
                f"{total.count:,} segments of {name} dropped before "
                f"{'TCP got them' if comes else 'they left'}; {acks:,} of them without a flag but ACK{stall}",
                f"segments that {way} this network namespace meanwhile: {all_}",
            ],
            why=_WHY_COMES if comes else _WHY_SEGMENTS,
            remedies=[
                Remedy(
                    f"Let the rule that drops take segments of open connections with {raddr}. {_COUNTERS}",
                    command=paths.command(netns, owners, _ALL_RULES),
                    risk="The rule may be there on purpose.",
                )
            ],
            facts={
                "netns": netns,
                "direction": direction,
                "raddr": raddr,
                "pids": paths.pids(owners),
                "comm": paths.program(owners) if owners else None,
                "acks": acks,
                "stalled": len(stalled),
                "count": total.count,
            },
            who=paths.who(owners),
            look=(f"drop --raddr {raddr} --reason 'NETFILTER_*'",),
            about=paths.both((netns, raddr), (ends_of(group) for group, _ in found))
            | {peer(track.last.netns, track.last.raddr) for track in stalled},
            first_s=total.first_s,
            last_s=total.last_s,
            subject=("segments", netns, raddr, direction),
        )


def _forwarded_for(inode: int) -> str:
    """Whose they are, where another network namespace drops them."""
    return f"this host forwards them, for {namespace(inode) or 'its own network namespace'}"


def _rules_of(seen: Evidence, inode: int) -> str | None:
    return in_netns(inode, _ALL_RULES, {pid for own in listeners_in(seen, inode) for pid in own.inside})


def _waiting_for_ack(seen: Evidence) -> set[tuple[int, int, str, int]]:
    """Network namespace, local port, and remote end of handshakes whose SYN-ACK was sent again."""
    retrans = getattr(seen, "retrans", None)
    if retrans is None:
        return set()
    return {
        (group.netns, group.lport, group.raddr, group.rport) for group, _ in retrans.where(kind="SYNACK", errno="none")
    }


def _connection(track: Track) -> tuple[Any, ...]:
    return connection(track.last.netns, *ends_of(track.last))


def _arrived(seen: Evidence, netns: int, dropped: int) -> int | None:
    """How many segments have come to a network namespace, those that were dropped before TCP included. None: it is not
    known."""
    counters = getattr(seen, "counters", None)
    came = None if counters is None else counters.grown(netns, "TcpInSegs")
    return (
        None if counters is None or came is None else came + (counters.grown(netns, "IpForwDatagrams") or 0) + dropped
    )


def _tries(found: list[Dropped]) -> Counter[str]:
    """How many connections each peer has tried: a SYN that is sent again comes from the same port."""
    return Counter(raddr for raddr, _, _ in {(each.raddr, each.rport, each.laddr) for each in found})


def _are_many(found: list[Dropped]) -> bool:
    return len({each.raddr for each in found if each.tally.count > 1}) >= MANY_PEERS


def _stopped(history: History, since_s: float) -> bool:
    """Whether nothing was accepted since then."""
    return history.accepts == 0 or (history.accepts is not None and not history.accepted_since(since_s))


def _belongs(seen: Evidence, connecting: Connecting, own: Listener, laddrs: set[str], raddr: str) -> bool:
    """Whether more is known of a peer than that it tries to connect to this port.

    It is no address of the Internet, a client on this machine, it has a connection with this host, or had one.
    """
    if not ip_address(raddr).is_global:
        return True
    if any((raddr, laddr, own.lport) in connecting.tried for laddr in laddrs):
        return True
    served = seen.sockets.served.get((own.netns, own.lport), {}) if hasattr(seen, "sockets") else {}
    return raddr in served or (own.netns, raddr) in connecting.connected


def _peers(found: list[Dropped]) -> Counter[str]:
    peers: Counter[str] = Counter()
    for each in found:
        peers[each.raddr] += each.tally.count
    return peers


def _is_local(seen: Evidence, own: Listener, laddr: str) -> bool:
    """Whether it is an address of this network namespace. If its addresses cannot be read, a connection shows it."""
    known = addresses.is_local(laddr, own)
    if known is not None:
        return known
    there = (own.netns, own.lport, laddr)
    rows = (track.last for track in seen.sockets.now) if hasattr(seen, "sockets") else ()
    return any((row.netns, row.lport, row.laddr) == there for row in rows)


rule = FirewallDrops()
