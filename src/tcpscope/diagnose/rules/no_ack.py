"""A remote end acknowledges nothing any more: it has gone, or something between has forgotten the connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from tcpscope.diagnose import Finding, Rule, listener, paths, peer, silence_remedies
from tcpscope.diagnose.answers import EVERYDAY, MANY, TELL_S, Answers, Port, answers, is_here, is_undecided, silence
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Again, Peer
from tcpscope.diagnose.silence import (
    Lives,
    are_fins,
    cannot_send,
    closed,
    first_s,
    is_full,
    is_one_way,
    is_silent,
    is_stuck,
    sent_again,
    span,
    stalled_s,
    stalled_us,
    took_full,
    unanswered,
    unmoved,
    waits,
)
from tcpscope.diagnose.sockets import Track

# Nothing was acknowledged for so long before the data that got no answer. Middleboxes forget after 60 s at the least
# (RFC 5382: two hours). After a shorter pause another cause is as likely, as a backend that has gone.
IDLE_US = 60_000_000
PAUSE_US = 3_000_000  # from here on it is told
# One client that vanishes, out of thousands, is a telephone in a tunnel. From so many of one address it is a fault.
CLIENTS = 3
# Where only full segments wait, a path that loses these alone looks the same (mtu_hole). For so long something smaller
# may still show that the address lives.
TELL_US = 10_000_000
HOLE = 3  # so many connections of one address that wait for a full segment are mtu_hole's

WHY_GONE = (
    "No packet of it has come since. Its host or a link is down, or packets are dropped on the way. The kernel sends "
    "again after twice the time each time, up to net.ipv4.tcp_retries2 times: about a quarter of an hour, in which "
    "the application waits."
)
# tcp_orphan_retries(): 0, the default, means 8 while the RTO is below its maximum.
WHY_CLOSED = (
    "No packet of it has come since. Its host or a link is down, or packets are dropped on the way. The application "
    "has closed these connections, so it does not wait: the kernel sends again up to net.ipv4.tcp_orphan_retries times "
    "(0: 8), about two minutes, and ends them."
)
WHY_CUT = (
    "The path works: new connections are answered meanwhile. A firewall, NAT or load balancer on the way forgets a "
    "connection that is idle for longer than its limit, and then drops its packets without a RST."
)
WHY_LOST = (
    "The path works for other connections meanwhile. Something on the way drops the packets of these: one of several "
    "parallel paths, a firewall that lost its table, or a load balancer whose backend is gone."
)
WHY_NAT = " Or several hosts share this address (NAT, a proxy, a VPN), and some of them have gone."
WHY_FINS = (
    "All data of these connections has arrived, and only the segment with the FIN gets no ACK. Something on the way "
    "drops FINs: a firewall that has ended the connection in its table already, or a rule of it about TCP flags. The "
    "remote end does not learn that the connection ends, and waits."
)
WHY_HERE = (
    "What the kernel tried to send has not left this host: it has no route to {}, or the link is down. It "
    "tries again every half second or more rarely."
)
WHY_ONE_WAY = (
    "Packets of this address still come in, so it is alive. What this host sends to it is lost on the way there, or is "
    "dropped there before TCP."
)
WHY_FULL = (
    "No packet of it has come since. But all that was sent meanwhile were full segments: either its host is gone, or a "
    "link on the way loses large packets only (an MTU hole). What answers something small tells."
)
WHY_CLIENTS = (
    "Probably their hosts have gone without closing, as a telephone does out of reach, or a machine without power: "
    "single ones do. The kernel gives up after net.ipv4.tcp_retries2 timeouts."
)
WHY_SOME = (
    "Hosts go without closing, as telephones do out of reach, but seldom so many at a time. If nobody else is answered "
    "either, the way to them is broken. The kernel gives up after net.ipv4.tcp_retries2 timeouts."
)
WHY_NOBODY = (
    "So many hosts do not go at the same time. What their packets or those of this host have in common is broken: the "
    "uplink or a router of this host, its route or a rule of it, a tunnel, a firewall or a load balancer."
)
WHY_NOBODY_FULL = (
    "All that waits are full segments. A link that many clients share loses large packets only, and the ICMP message "
    "that says so does not come (an MTU hole, as after a new tunnel), or it loses all packets. What answers something "
    "small tells."
)


def refused_here(seen: Evidence) -> set[tuple[int, str]]:
    """Ports of listeners on this machine, and addresses whose handshakes they have refused.

    Where the final ACK was ignored the client believes that it is connected.
    """
    queues = getattr(seen, "queues", None)
    troubled = queues.troubled if queues is not None else ()
    return {(history.last.lport, address) for history in troubled for _, address in history.peers}


class NoAck(Rule):
    needs = ("sockets", "attempts", "retrans")
    marks: ClassVar = {"no_ack": unanswered, "unmoved": unmoved}
    explains = (
        "loss",
        "spurious_retrans",
        "queue_on_path",
        "zero_window",
        "window_limited",
        "nagle",
        "orphans",
        "ends_by_timeout",
        "connects_fail",
        "synack_unanswered",
        "drops",
    )

    def check(self, seen: Evidence) -> Iterator[Finding]:
        known, lives, refused = answers(seen), Lives(seen), refused_here(seen)
        peers = paths.by_peer(seen.sockets.now)
        silent: dict[Peer, list[Track]] = {}
        for where, tracks in peers.items():
            if found := [
                track for track in tracks if is_silent(track) and (track.last.rport, track.last.laddr) not in refused
            ]:
                silent[where] = found
        yield from self._here(seen, silent)
        yield from self._ports(seen, silent, known)
        for where, stalled in silent.items():
            meanwhile = lives.since(where, peers[where], stalled)
            full = not any(meanwhile) and all(is_full(track) and not took_full(track) for track in stalled)
            if full and not seen.ended and max(map(stalled_us, stalled)) < TELL_US:
                continue  # it may be an MTU hole
            yield self._finding(seen, where, stalled, meanwhile, full)

    def _here(self, seen: Evidence, silent: dict[Peer, list[Track]]) -> Iterator[Finding]:
        """Where this host cannot send. It takes these out of `silent`."""
        found: dict[int, list[Peer]] = {}
        for where, stalled in silent.items():
            if all(map(is_stuck, stalled)) and any(cannot_send(track.last) for track in stalled):
                found.setdefault(where[0], []).append(where)
        for netns, peers in found.items():
            if len(peers) > 1:  # what was on its way to others when the link went down was not sent again either
                known = set(peers)
                stuck = (where for where in silent if where[0] == netns and all(map(is_stuck, silent[where])))
                peers += [where for where in stuck if where not in known]
            yield self._cannot_send(seen, netns, {where: silent.pop(where) for where in peers})

    def _cannot_send(self, seen: Evidence, netns: int, peers: Mapping[Peer, list[Track]]) -> Finding:
        silent = [track for stalled in peers.values() for track in stalled]
        where = max(peers, key=lambda each: len(peers[each]))
        whom, which = where[1], "this address"
        if len(peers) > 1:
            whom, which = f"{len(peers):,} addresses", "these addresses"
        # A single client may have gone with its route, as of a VPN.
        clients = len(silent) < CLIENTS and all(track.last.role == "PASSIVE" for track in silent)
        observed = list(waits(silent))
        if len(peers) > 1:
            observed += _addresses(peers)
        else:
            observed += sent_again(paths.again(seen).get(where), silent)
        return Finding(
            rule=self.name,
            severity="info" if clients else "critical",
            title=f"this host cannot send to {whom}: {paths.number(len(silent), 'connection')} stalled",
            observed=observed,
            why=WHY_HERE.format(which),
            remedies=list(silence_remedies.when_here(where, silent)),
            **paths.of(where, paths.owners(silent), "retrans", "list")
            | {"about": _about(netns, peers, silent), "subject": ("here", netns)},
            first_s=first_s(seen, silent),
            facts=_facts(where, silent, case="here", peers=len(peers)),
        )

    def _ports(self, seen: Evidence, silent: dict[Peer, list[Track]], known: Answers) -> Iterator[Finding]:
        """The clients of each port, together: nearly all of them, or single ones. It takes these out of `silent`."""
        ports: dict[Port, dict[str, list[Track]]] = {}
        for (netns, raddr), stalled in silent.items():
            if all(track.last.role == "PASSIVE" for track in stalled):
                for track in stalled:
                    ports.setdefault((netns, track.last.lport), {}).setdefault(raddr, []).append(track)
        for (netns, lport), clients in ports.items():
            told = {
                raddr: each
                for raddr, each in clients.items()
                if is_everyday(known, (netns, raddr), silent[netns, raddr])
            }
            if whole := nobody(seen, known, (netns, lport), clients):
                at_once = {raddr: each for raddr, each in clients.items() if _stalled_s(each) >= whole.since_s}
                yield self._nobody(seen, (netns, lport), at_once, whole)
                told |= at_once
            else:
                if told:
                    yield self._some(seen, (netns, lport), told, known)
                told |= _may_be_answered(seen, clients)
            for raddr in told:
                others = [track for track in silent[netns, raddr] if track.last.lport != lport]
                silent[netns, raddr] = others
        for where in [where for where, stalled in silent.items() if not stalled]:
            del silent[where]

    def _nobody(self, seen: Evidence, port: Port, clients: Mapping[str, list[Track]], whole: Nobody) -> Finding:
        """Many clients of a port, and nearly no other has an answer."""
        netns, lport = port
        silent = [track for each in clients.values() for track in each]
        where = netns, max(clients, key=lambda raddr: len(clients[raddr]))
        one_way = sum(map(is_one_way, silent))
        number = paths.number(len(clients), "client")
        stalled = f"{paths.number(len(silent), 'connection')} stalled"
        if whole.full and whole.others:
            title = f"full segments to {number} of port {lport} do not arrive, small ones do: {stalled}"
        elif whole.others:
            others = f"{whole.others:,} {'does' if whole.others == 1 else 'do'}"
            title = f"{number} of port {lport} do not answer, {others}: {stalled}"
        else:
            title = f"no client of port {lport} answers any more: {number}, {stalled}"
        observed = [*waits(silent), *_addresses({(netns, raddr): each for raddr, each in clients.items()})]
        if one_way:
            observed.append(
                f"packets of {one_way:,} of these connections still come in: what this host sends on them is lost"
            )
        if whole.full:
            observed.append("each waits for the ACK of a full segment")
        if whole.others:
            none = ", none on a full segment" if whole.full else ""
            observed.append(f"meanwhile {paths.number(whole.others, 'other client')} of this port had an answer{none}")
        if again := _sum(paths.again(seen), netns, clients):
            observed += sent_again(again, silent)
        # mtu_hole is about an address with so many: it tells of that one, this of all.
        about = [(netns, raddr) for raddr, each in clients.items() if not whole.full or len(each) < HOLE]
        return Finding(
            rule=self.name,
            severity="critical",
            title=title,
            observed=observed,
            why=WHY_NOBODY_FULL if whole.full else WHY_NOBODY,
            remedies=list(silence_remedies.when_nobody(where, silent, whole.full)),
            who=paths.who(paths.owners(silent)),
            look=(f"retrans -L {lport}", f"list -L {lport}"),
            about=_about(netns, about, silent) | {("clients", netns, lport)},
            first_s=first_s(seen, silent),
            subject=("clients", netns, lport),
            facts=_facts(where, silent, case="nobody", lport=lport, clients=len(clients), only_full=whole.full)
            | {"answered_meanwhile": whole.others, "one_way": one_way},
        )

    def _some(self, seen: Evidence, port: Port, clients: Mapping[str, list[Track]], known: Answers) -> Finding:
        """Single clients, of which some always vanish."""
        netns, lport = port
        silent = [track for each in clients.values() for track in each]
        number = paths.number(len(clients), "client")
        title = f"{number} of port {lport} {'does' if len(clients) == 1 else 'do'} not answer any more"
        shared = any(len(each) >= CLIENTS for each in clients.values())
        if shared:
            title = f"{paths.number(len(silent), 'connection')} of clients of port {lport} get no answer any more"
        since_s = min(map(stalled_s, silent))
        others = sum(at_s > since_s for raddr, at_s in known.clients(port).items() if raddr not in clients)
        observed = [*waits(silent), *_addresses({(netns, raddr): each for raddr, each in clients.items()})]
        if others:
            observed.append(f"meanwhile {paths.number(others, 'other client')} of this port had an answer")
        if shared:
            answered = sum(known.connections(netns, raddr, since_s, (lport,)) for raddr in clients)
            observed.append(f"meanwhile {paths.number(answered, 'other connection')} of these addresses had an answer")
        few = len(clients) < MANY or others >= EVERYDAY * len(clients)
        return Finding(
            rule=self.name,
            severity="info",
            title=title,
            observed=observed,
            why=(WHY_CLIENTS if few else WHY_SOME) + (WHY_NAT if shared else ""),
            remedies=[],
            who=paths.who(paths.owners(silent)),
            look=(f"retrans -L {lport}", f"list -L {lport}"),
            about=frozenset({("clients", netns, lport)}),
            subject=("clients", netns, lport),
            facts={
                "netns": netns,
                "lport": lport,
                "count": len(silent),
                "clients": len(clients),
                "case": "clients",
                "answered_meanwhile": others,
            },
        )

    def _finding(
        self, seen: Evidence, where: Peer, silent: list[Track], meanwhile: tuple[int, int], full: bool
    ) -> Finding:
        others, opened = meanwhile
        idle_us = [max(0.0, track.last.since_ack_us - stalled_us(track)) for track in silent if not is_one_way(track)]
        lives = bool(others or opened)
        one_way = not lives and not idle_us
        paused = lives and bool(idle_us) and min(idle_us) >= PAUSE_US
        idle = paused and min(idle_us) >= IDLE_US
        number = paths.number(len(silent), "connection")
        living = [track for track in silent if track.last.has_file]
        case, title = "gone", f"{where[1]} does not answer: {number} stalled"
        why, remedies = WHY_GONE if living else WHY_CLOSED, silence_remedies.when_gone(where, silent)
        if full and not one_way:
            why, remedies = WHY_FULL, silence_remedies.when_full(where, silent)
        elif one_way and not are_fins(silent):
            case, title, why = "one_way", f"nothing that is sent to {where[1]} arrives: {number} stalled", WHY_ONE_WAY
        elif idle:
            case, title = "idle", f"{number} to {where[1]} cut while idle; new ones work"
            why, remedies = WHY_CUT, silence_remedies.when_idle(where, silent, min(idle_us))
        elif not paused and (lives or one_way) and are_fins(silent):
            case, title, why = "fins", f"{number} to {where[1]} get no answer to their FIN", WHY_FINS
            remedies = silence_remedies.when_fins(where, silent)
        elif lives:
            case, title = "others", f"{number} to {where[1]} get no answer; others do"
            why = WHY_LOST + (WHY_NAT if all(track.last.role == "PASSIVE" for track in silent) else "")
            remedies = silence_remedies.when_lost(where, silent)
        observed = [*waits(silent)]
        if paused:
            observed.append(f"they were idle before that for {span(idle_us)}")
        if lives:
            observed.append(paths.meanwhile(opened, others))
        if full:
            observed.append("each waits for the ACK of a full segment, and nothing smaller was sent since")
        observed += sent_again(paths.again(seen).get(where), silent)
        return Finding(
            rule=self.name,
            severity="critical",
            title=title,
            observed=observed,
            why=why,
            remedies=list(remedies),
            **paths.of(where, paths.owners(living), "retrans", "list"),
            first_s=first_s(seen, silent),
            facts=_facts(
                where,
                silent,
                case=case,
                only_full=full,
                idle_s=round(min(idle_us) / 1e6, 1) if idle_us else None,
                opened_meanwhile=opened,
                answered_meanwhile=others,
            ),
        )


class Nobody(NamedTuple):
    """Nearly no client of a port is answered. others: how many are; full: all wait for a full segment."""

    since_s: float
    others: int
    full: bool


def nobody(seen: Evidence, known: Answers, port: Port, clients: Mapping[str, list[Track]]) -> Nobody | None:
    """Whether so many clients of a port are silent at a time that it is one fault, since when, and of what."""
    stalled = {raddr: _stalled_s(each) for raddr, each in clients.items() if not is_here(raddr)}
    if len(stalled) < MANY:
        return None
    large = {raddr for raddr in stalled if all(is_full(track) and not took_full(track) for track in clients[raddr])}
    answered = known.clients(port)
    for raddr, each in clients.items():
        for track in each:
            at_s = track.last_s - track.last.since_ack_us / 1e6
            if at_s < stalled_s(track):  # later packets acknowledge nothing of it
                answered[raddr] = max(at_s, answered.get(raddr, at_s))
    if whole := silence(stalled, answered, seen.now_s, seen.began_s):
        told = {raddr for raddr, at_s in stalled.items() if at_s >= whole.since_s}
        took = any(at_s > whole.since_s for at_s in known.clients(port, full=True).values())
        return Nobody(whole.since_s, whole.others, told <= large and not took)
    waiting = {raddr: stalled[raddr] for raddr in large}
    whole = silence(waiting, known.clients(port, full=True), seen.now_s, seen.began_s)
    if whole is None or any(at_s >= whole.since_s for raddr, at_s in stalled.items() if raddr not in large):
        return None
    others = sum(at_s > whole.since_s for raddr, at_s in answered.items() if raddr not in large)
    return Nobody(whole.since_s, others, True)


def is_everyday(known: Answers, where: Peer, silent: list[Track]) -> bool:
    """One or two, or, of many behind one address, a few: some always vanish."""
    if len(silent) < CLIENTS:
        return True
    since_s = min(map(stalled_s, silent))
    answered = known.connections(*where, since_s, {track.last.lport for track in silent})
    return answered >= EVERYDAY * len(silent)


def _may_be_answered(seen: Evidence, clients: Mapping[str, list[Track]]) -> dict[str, list[Track]]:
    """Those of which it may soon be certain that nobody is answered, or that others of the same address are."""
    if seen.ended:
        return {}
    if seen.watched_s < TELL_S:
        return dict(clients)
    stalled = {raddr: _stalled_s(each) for raddr, each in clients.items()}
    if not is_undecided(stalled.values(), seen.now_s, seen.began_s):
        return {}
    return {raddr: clients[raddr] for raddr, at_s in stalled.items() if seen.now_s - at_s < 2 * TELL_S}


def _stalled_s(tracks: Iterable[Track]) -> float:
    """When the last of them stalled."""
    return max(map(stalled_s, tracks))


def _addresses(peers: Mapping[Peer, list[Track]]) -> Iterator[str]:
    """`addresses: 192.0.2.7 (2), 192.0.2.8 (1)`."""
    found = Counter({where[1]: len(each) for where, each in peers.items()})
    yield f"addresses: {paths.listed(found)}"


def _about(netns: int, peers: Iterable[Peer], silent: list[Track]) -> frozenset[tuple[Any, ...]]:
    """These addresses, and the ports to which they have connected: handshakes fail there, too."""
    ports = {track.last.lport for track in silent if track.last.role == "PASSIVE"}
    return frozenset({*(peer(*where) for where in peers), *(listener(netns, lport) for lport in ports)})


def _sum(again: Mapping[Peer, Again], netns: int, clients: Iterable[str]) -> Again | None:
    """What was sent again to all of them."""
    found = [again[netns, raddr] for raddr in clients if (netns, raddr) in again]
    if not found:
        return None
    return Again(
        kinds=sum((each.kinds for each in found), Counter()), failed=sum((each.failed for each in found), Counter())
    )


def _facts(where: Peer, silent: list[Track], **numbers: Any) -> dict[str, Any]:
    return paths.facts(
        where,
        paths.owners(silent),
        len(silent),
        stalled_s=round(max(map(stalled_us, silent)) / 1e6, 1),
        timeouts=max(paths.timeouts(track.last) for track in silent),
        unacked_bytes=sum(track.last.unacked for track in silent),
        orphans=closed(silent),
        **numbers,
    )


rule = NoAck()
