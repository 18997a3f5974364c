"""SYN-ACKs that a peer never answers: its answers, or these, are lost; or it is a flood of SYNs."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, listener, processes, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules.syn_queue import enable_cookies, syns_refused
from tcpscope.diagnose.tallies import Tally
from tcpscope.diagnose.wording import counters_agree, in_netns
from tcpscope.kernel import pidns
from tcpscope.output import endpoint

TIMEOUTS = 2
"""So often the SYN-ACK's timer ran out: after a second, and two seconds later. The client sends its SYN again after a
second, too, and that has the SYN-ACK sent again. So twice is enough only if it was not at the same time."""

APART_SECONDS = 1.5
"""Two SYN-ACKs for one SYN, and one more after a second, are no two timeouts."""

HANDSHAKES = 5
"""Unanswered ones of one peer, of which none is completed. In the trial 42."""

FLOOD_PEERS = 5
"""Peers with one or two handshakes each, if the SYN queue has overflowed; it keeps so few when its limit is small."""

FLOOD_PEERS_ALONE = 50
"""The same without an overflow: any address of the Internet gets some of these."""

_PEERS_SHOWN = 3

WHY_LOST = (
    "SYNs of this peer arrive, and its answer to the SYN-ACK does not. Either the SYN-ACK takes a way on which it is "
    "lost (another route or interface, a firewall that has not seen the SYN), or the peer sends SYNs without wanting "
    "a connection."
)
WHY_SOME = (
    " Connections were accepted meanwhile, and it is not known of whom: if several hosts share this address, it may be "
    "one of them."
)
WHY_FLOOD = (
    "Many addresses have sent one SYN each, and none answers the SYN-ACK. So the addresses are forged, or the way back "
    "to all of them is cut. Each such handshake keeps its place in the SYN queue until the SYN-ACK was sent "
    "tcp_synack_retries times more."
)


@dataclass
class _Port:
    """Handshakes at one local port that nobody has completed: remote address -> the tallies of its ports."""

    netns: int
    lport: int
    laddr: str
    pid: int | None
    comm: str | None
    peers: dict[str, list[Tally]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return endpoint(self.laddr, self.lport)


class SynackUnanswered(Rule):
    needs = ("retrans", "sockets")
    explains = ("syn_queue", "connects_fail")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        ports: dict[tuple[int, int], _Port] = {}
        for group, tally in seen.retrans.where(kind="SYNACK", errno="none"):
            if tally.count > TIMEOUTS or (tally.count == TIMEOUTS and tally.is_apart(APART_SECONDS)):
                own = _Port(group.netns, group.lport, group.laddr, group.pid, group.comm)
                own = ports.setdefault((group.netns, group.lport), own)
                own.peers.setdefault(group.raddr, []).append(tally)
        for own in ports.values():
            history = _history(seen, own)
            alive = _alive(seen, own, history)
            if alive is None:
                continue
            served = seen.sockets.served.get((own.netns, own.lport), {})
            silent = {
                raddr: tallies
                for raddr, tallies in own.peers.items()
                if raddr not in alive and served.get(raddr, 0.0) < min(tally.first_s for tally in tallies)
            }
            lost = {raddr: tallies for raddr, tallies in silent.items() if len(tallies) >= HANDSHAKES}
            single = {raddr: tallies for raddr, tallies in silent.items() if raddr not in lost}
            overflows = _overflows(history)
            if lost:
                severity = "warning" if history and history.accepts else "critical"
                yield _finding(self.name, seen, own, history, lost, "lost", severity)
            elif overflows and len(single) >= FLOOD_PEERS:
                severity = "critical" if sum(overflows[:3]) else "warning"
                yield _finding(self.name, seen, own, history, single, "flood", severity)
            elif len(single) >= FLOOD_PEERS_ALONE:
                yield _finding(self.name, seen, own, history, single, "flood", "info")


def _history(seen: Evidence, own: _Port) -> History | None:
    """Of the listener, if listeners are watched: they are not with a filter for peers."""
    queues = getattr(seen, "queues", None)
    if queues is None:
        return None
    found = [
        history
        for history in queues.histories.values()
        if (history.last.netns, history.last.lport) == (own.netns, own.lport)
    ]
    return max(found, key=lambda history: (not history.gone, history.last.laddr == own.laddr), default=None)


def _alive(seen: Evidence, own: _Port, history: History | None) -> set[str] | None:
    """Peers that do answer: they have connections to this port, or a full accept queue has refused their final ACK.

    None: it cannot be told from such refusals.
    """
    found = {
        track.last.raddr
        for track in seen.sockets.now
        if track.last.netns == own.netns and track.last.lport == own.lport and track.last.state != "SYN_SENT"
    }
    if history and (history.count("ACCEPT_QUEUE_FULL") or history.full_seen):
        if not seen.queues.exact:
            return None
        found |= {raddr for cause, raddr in history.peers if cause == "ACCEPT_QUEUE_FULL"}
    return found


def _overflows(history: History | None) -> tuple[int, int, int, int] | None:
    """SYNs that the SYN queue had no room for: full, reserved, not certain, answered with a cookie. None: none."""
    if history is None:
        return None
    possible = not history.full_seen and history.last.syncookies == 0
    found = (
        history.count("SYN_QUEUE_FULL"),
        history.count("SYN_QUEUE_RESERVED"),
        history.count("UNKNOWN") if possible else 0,
        history.count("COOKIE_SENT") if history.last.syncookies != 2 else 0,
    )
    return found if any(found) else None


def _finding(
    rule: str,
    seen: Evidence,
    own: _Port,
    history: History | None,
    peers: dict[str, list[Tally]],
    kind: str,
    severity: str,
) -> Finding:
    tallies = [tally for each in peers.values() for tally in each]
    most = sorted(peers, key=lambda raddr: -len(peers[raddr]))
    shown = ", ".join(f"{raddr} ({len(peers[raddr])})" for raddr in most[:_PEERS_SHOWN])
    more = len(peers) - _PEERS_SHOWN
    overflows = _overflows(history) or (0, 0, 0, 0)
    full, reserved, unsure, cookies = overflows
    sent = sum(tally.count for tally in tallies)
    accepts = history.accepts if history else None
    whom = f"{most[0]} and {len(peers) - 1} more" if len(peers) > 1 else most[0]
    some, never = ("some ", "not") if accepts else ("", "never")
    rate = round(_rate(tallies, history, overflows), 2)
    title = (
        f"{some}handshakes from {whom} to {own.name} are {never} completed"
        if kind == "lost"
        else f"SYN flood on {own.name}: {len(peers)} addresses never answer, {rate:.3g} SYNs a second"
    )
    owner = processes.read(own.pid, own.comm).name if own.pid and not pidns.inner() else None
    return Finding(
        rule=rule,
        severity=severity,
        title=title,
        observed=[
            f"{len(tallies)} handshakes that nobody completed; their SYN-ACKs were sent {sent} times more",
            f"peers: {shown}" + (f" and {more} more addresses" if more > 0 else ""),
            *([f"the application accepted {accepts} connections meanwhile"] if kind == "lost" and accepts else ()),
            *syns_refused(*overflows),
            *(
                counters_agree(seen.queues, history.last, ("TCPReqQFullDrop", "TCPReqQFullDoCookies"))
                if history and any(overflows)
                else ()
            ),
        ],
        why=WHY_FLOOD if kind == "flood" else WHY_LOST + (WHY_SOME if accepts else ""),
        remedies=list(_remedies(own, history, most[0], kind, cookies)),
        facts={
            "netns": own.netns,
            "laddr": own.laddr,
            "lport": own.lport,
            "pid": own.pid,
            "comm": own.comm,
            "count": len(tallies),
            "kind": kind,
            "peers": len(peers),
            "raddr": most[0],
            "synacks_again": sent,
            "syns_per_s": rate if kind == "flood" else None,
            "accepts": accepts,
            "dropped": None if unsure else full,
            "reserved": None if unsure else reserved,
            "cookies": cookies,
        },
        who=owner,
        look=(f"retrans -L {own.lport}", f"synbl -L {own.lport}"),
        about=frozenset({listener(own.netns, own.lport), *_clients(seen, own, peers)}),
        first_s=min(tally.first_s for tally in tallies),
        last_s=max(tally.last_s for tally in tallies),
        subject=("port", own.netns, own.lport),
    )


def _rate(tallies: list[Tally], history: History | None, overflows: tuple[int, ...]) -> float:
    """How many of these SYNs came each second: those that were refused, and those that nobody completed."""
    # The SYN-ACK is sent again a second after the SYN.
    first_s, last_s = (pick(tally.first_s for tally in tallies) - 1.0 for pick in (min, max))
    if any(overflows) and history and history.first_s is not None and history.last_s is not None:
        first_s, last_s = min(first_s, history.first_s), max(last_s, history.last_s)
    return (len(tallies) + sum(overflows)) / max(last_s - first_s, 1.0)


def _clients(seen: Evidence, own: _Port, peers: Container[str]) -> Iterator[tuple[Any, ...]]:
    """Of clients on this machine, in whatever namespace: the service to which they cannot connect."""
    rows = [track.last for track in seen.sockets.now if track.last.state == "SYN_SENT"]
    for row in (*rows, *(seen.attempts.tallies if hasattr(seen, "attempts") else ())):
        if row.raddr == own.laddr and row.rport == own.lport and row.laddr in peers:
            yield service(row.netns, own.laddr, own.lport)


def _remedies(own: _Port, history: History | None, peer: str, kind: str, cookies: int) -> Iterator[Remedy]:
    inside = history.last.inside if history and not history.gone else ()
    if kind == "lost":
        yield Remedy(
            f"See by which interface the answer to {peer} leaves, and compare it with the one by which its SYNs come.",
            command=in_netns(own.netns, f"ip route get {peer} from {own.laddr}", inside),
        )
        return
    if history:
        yield from enable_cookies(history)
    if cookies:
        yield Remedy(
            "Nothing is needed for clients to connect: SYN cookies do not need a place in the queue. To spare the "
            "work, limit SYNs before they come here.",
        )


rule = SynackUnanswered()
