"""A remote end acknowledges nothing any more: it has gone, or something between has forgotten the connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from tcpscope.diagnose import Finding, Remedy, Rule, paths
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.paths import Again, Peer
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.tallies import INTERVAL_SECONDS, Tally
from tcpscope.diagnose.wording import seconds

# FIELD.md, fault 10: three RTOs, and no ACK for 3 s and ten round trips. A lossy path of 10 % has three losses of one
# segment in a row once in a thousand, and a peer with a full processor was not silent for longer than 0.3 s.
TIMEOUTS = 3
SILENT_US = 3_000_000
ROUND_TRIPS = 10
# Nothing was acknowledged for so long before the data that got no answer. Middleboxes forget after 60 s at the least
# (RFC 5382: two hours). After a shorter pause another cause is as likely, as a backend that has gone.
IDLE_US = 60_000_000
PAUSE_US = 3_000_000  # from here on it is told
KEEPALIVE_LEAST_S = 15  # proposed: less costs more packets than it helps
# One client that vanishes, out of thousands, is a telephone in a tunnel. From so many of one address it is a fault.
CLIENTS = 3
# Where only full segments wait, a path that loses these alone looks the same (mtu_hole). For so long something smaller
# may still show that the address lives.
TELL_US = 10_000_000
FULL = 0.9  # a connection whose segments have on average this part of its MSS shows that the path takes full ones
SEGMENTS = 4  # so many segments make an average
FINS = 3  # so many connections, all that get no answer, had an ACK of all but their FIN
USER_TIMEOUT_MS = 30_000  # proposed: RFC 5482 leaves it to the application; 30 s is two in three of its usual deadlines

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
WHY_FINS = (
    "All data of these connections has arrived, and only the segment with the FIN gets no ACK. Something on the way "
    "drops FINs: a firewall that has ended the connection in its table already, or a rule of it about TCP flags. The "
    "remote end does not learn that the connection ends, and waits."
)
WHY_HERE = (
    "What the kernel tried to send has not left this host: it has no route to this address, or the link is down. It "
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
    "Their hosts have gone without closing, as a telephone does out of reach, or a machine without power. The kernel "
    "gives"
    " up after net.ipv4.tcp_retries2 timeouts."
)


def cannot_send(row: Any) -> bool:
    """Nothing is on its way though the window is open: the kernel has tried, and found no route, or no link.

    The timer is that of a closed window then (tcp_check_probe_timer()).
    """
    is_open = row.peer_window >= min(row.mss, row.unsent)
    return bool(not row.out_segs and row.unsent and row.timer == "ZERO_WINDOW" and is_open)


def unanswered(row: Any, before: Any) -> bool:
    """A timeout has run out, and nothing was acknowledged since."""
    return bool((row.out_segs or cannot_send(row)) and paths.timeouts(row) and row.state in paths.SENDING)


def unmoved(row: Any, before: Any) -> bool:
    """Something waits for its ACK, and nothing was acknowledged since the look before."""
    return bool((row.out_segs or cannot_send(row)) and (before is None or before.acked_seq == row.acked_seq))


def stalled_us(track: Track) -> float:
    """How long the oldest data has waited for its ACK at the least: the timeouts that ran out, or as it was watched."""
    row = track.last
    ran_out = row.rto_us * (1 - 2.0**-row.backoff)
    return float(max(ran_out, track.held_s("unmoved") * 1e6))


def is_one_way(track: Track) -> bool:
    """Packets of the remote end come, and acknowledge nothing new."""
    return bool(track.last.since_ack_us < max(SILENT_US, ROUND_TRIPS * (track.last.srtt_us or 0)))


def is_silent(track: Track, least: int = TIMEOUTS) -> bool:
    if not track.holds("no_ack") or paths.timeouts(track.last) < least:
        return False
    return not is_one_way(track) or track.held_s("no_ack") * 1e6 >= SILENT_US


def is_full(track: Track) -> bool:
    """The oldest segment that has no ACK is as large as it can be."""
    return bool(track.last.unacked >= track.last.mss)


def took_full(track: Track) -> bool:
    """What had arrived on it before were full segments."""
    row = track.last
    arrived = row.sent_bytes - row.retrans_bytes - row.unacked
    segments = row.data_segs_out - row.total_retrans - row.out_segs
    return bool(segments >= SEGMENTS and arrived >= FULL * segments * row.mss)


def only_fin(row: Any) -> bool:
    """All that was sent has an ACK, but for the FIN."""
    return row.state in ("FIN_WAIT1", "CLOSING", "LAST_ACK") and row.unacked == 1 and not row.unsent


class Lives:
    """What shows that an address lives: asked for each that stalls, and gathered for the first."""

    def __init__(self, seen: Evidence) -> None:
        self._seen = seen
        self._opened: dict[Peer, list[Tally]] | None = None

    def since(self, where: Peer, tracks: list[Track], silent: list[Track]) -> tuple[int, int]:
        """How many other connections had an answer, and how many were opened, since the first of these stalled."""
        if self._opened is None:
            self._opened = {}
            for group, tally in self._seen.attempts.tallies.items():
                if group.outcome == "ESTABLISHED":
                    self._opened.setdefault((group.netns, group.raddr), []).append(tally)
        longest_us = max(map(stalled_us, silent))
        others = sum(t.last.since_ack_us < longest_us and not t.holds("no_ack") for t in tracks)
        # An interval may be read a moment after its end. One that ended so long after it stalled began after that, too.
        began_s = min(track.last_s - stalled_us(track) / 1e6 for track in silent)
        whole_s = began_s + 2 * INTERVAL_SECONDS
        return others, sum(tally.since(whole_s) for tally in self._opened.get(where, ()))


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
        clients: dict[tuple[int, int], list[Track]] = {}
        lives = Lives(seen)
        refused = refused_here(seen)
        for where, tracks in paths.by_peer(seen.sockets.now).items():
            silent = [
                track for track in tracks if is_silent(track) and (track.last.rport, track.last.laddr) not in refused
            ]
            if not silent:
                continue
            if len(silent) < CLIENTS and all(track.last.role == "PASSIVE" for track in silent):
                for track in silent:
                    clients.setdefault((where[0], track.last.lport), []).append(track)
                continue
            meanwhile = lives.since(where, tracks, silent)
            full = not any(meanwhile) and all(is_full(track) and not took_full(track) for track in silent)
            if full and not seen.ended and max(map(stalled_us, silent)) < TELL_US:
                continue  # it may be an MTU hole
            yield self._finding(seen, where, silent, meanwhile, full)
        for (netns, lport), silent in clients.items():
            yield self._clients(netns, lport, silent)

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
        title = f"{where[1]} does not answer: {number} stalled"
        living = [track for track in silent if track.last.has_file]
        why, remedies, fins = WHY_GONE if living else WHY_CLOSED, _when_gone(where, silent), False
        here = all(cannot_send(track.last) for track in silent)
        if here:
            title, why = f"this host cannot send to {where[1]}: {number} stalled", WHY_HERE
            remedies = _when_here(where, silent)
        elif full and not one_way:
            why, remedies = WHY_FULL, _when_full(where, silent)
        elif one_way and not _are_fins(silent):
            title, why = f"nothing that is sent to {where[1]} arrives: {number} stalled", WHY_ONE_WAY
        elif idle:
            title = f"{number} to {where[1]} cut while idle; new ones work"
            why, remedies = WHY_CUT, _when_idle(where, silent, min(idle_us))
        elif fins := not paused and (lives or one_way) and _are_fins(silent):
            title, why = f"{number} to {where[1]} get no answer to their FIN", WHY_FINS
            remedies = _when_fins(where, silent)
        elif lives:
            title, why = f"{number} to {where[1]} get no answer; others do", WHY_LOST
            remedies = _when_lost(where, silent)
        observed = [*_waits(silent)]
        if paused and not here:
            observed.append(f"they were idle before that for {_span(idle_us)}")
        if lives:
            observed.append(paths.meanwhile(opened, others))
        if full and not here:
            observed.append("each waits for the ACK of a full segment, and nothing smaller was sent since")
        observed += _sent_again(paths.again(seen).get(where), silent)
        return Finding(
            rule=self.name,
            severity="critical",
            title=title,
            observed=observed,
            why=why,
            remedies=list(remedies),
            **paths.of(where, paths.owners(living), "retrans", "list"),
            first_s=_since(seen, silent),
            facts=paths.facts(
                where,
                paths.owners(silent),
                len(silent),
                case="here"
                if here
                else "fins"
                if fins
                else "idle"
                if idle
                else "others"
                if lives
                else "one_way"
                if one_way
                else "gone",
                only_full=full and not here,
                stalled_s=round(max(map(stalled_us, silent)) / 1e6, 1),
                idle_s=round(min(idle_us) / 1e6, 1) if idle_us else None,
                timeouts=max(paths.timeouts(track.last) for track in silent),
                unacked_bytes=sum(track.last.unacked for track in silent),
                opened_meanwhile=opened,
                answered_meanwhile=others,
                orphans=_orphans(silent),
            ),
        )

    def _clients(self, netns: int, lport: int, silent: list[Track]) -> Finding:
        addresses = Counter(track.last.raddr for track in silent)
        number = paths.number(len(addresses), "client")
        return Finding(
            rule=self.name,
            severity="info",
            title=f"{number} of port {lport} {'does' if len(addresses) == 1 else 'do'} not answer any more",
            observed=[*_waits(silent), f"clients: {paths.listed(addresses)}"],
            why=WHY_CLIENTS,
            remedies=[],
            who=paths.who(paths.owners(silent)),
            look=(f"retrans -L {lport}", f"list -L {lport}"),
            about=frozenset({("clients", netns, lport)}),
            facts={"netns": netns, "lport": lport, "count": len(silent), "clients": len(addresses), "case": "clients"},
        )


def _are_fins(silent: list[Track]) -> bool:
    return len(silent) >= FINS and all(only_fin(track.last) for track in silent)


def _since(seen: Evidence, silent: list[Track]) -> float | None:
    """When the first of them stalled, if that was within the watch."""
    began_s = seen.now_s - max(map(stalled_us, silent)) / 1e6
    return began_s if began_s > seen.began_s else None


def _orphans(silent: list[Track]) -> int:
    return sum(not track.last.has_file for track in silent)


def _span(us: list[float]) -> str:
    least, most = round(min(us)), round(max(us))
    return seconds(least) if most - least < 1_000_000 else f"{seconds(least)} to {seconds(most)}"


def _waits(silent: list[Track]) -> Iterator[str]:
    rows = [track.last for track in silent]
    longest, most = max(map(stalled_us, silent)), max(map(paths.timeouts, rows))
    here = all(map(cannot_send, rows))
    what = "that could send nothing" if here else "without an ACK of what was sent"
    yield (
        f"{paths.number(len(silent), 'connection')} ({paths.ports(silent)}) {what}, the "
        f"longest for {seconds(round(longest))} and {paths.number(most, 'attempt' if here else 'timeout')}; the last "
        "packet of any came "
        f"{seconds(min(row.since_ack_us for row in rows))} ago"
    )
    waiting = sum(row.unsent for row in rows)
    if here:
        yield f"{waiting:,} bytes wait to be sent, and none was"
        return
    more = f", {waiting:,} more wait to be sent" if waiting else ""
    yield f"{sum(row.unacked for row in rows):,} bytes are not acknowledged{more}"
    if orphans := _orphans(silent):
        yield f"{orphans} of them closed by the application, no process has them any more"


def _sent_again(again: Again | None, silent: list[Track]) -> Iterator[str]:
    """What the kernel did at these timeouts; it may not have been able to send at all."""
    if again and again.kinds:
        yield f"sent again to it: {again.said}"
    if again and again.failed:
        yield f"could not be sent again by this host: {paths.listed(again.failed)}"
    elif not any(track.last.total_retrans or cannot_send(track.last) for track in silent):
        yield "this host has sent none of it again: its link is down, it has no route, or its own queue does not move"


def _when_here(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield Remedy(
        "See whether there is a route, and whether its device is up and has a link (state UP, LOWER_UP).",
        command=paths.command(where[0], paths.owners(silent), f"sh -c 'ip route get {where[1]}; ip link'"),
    )


def _when_gone(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield Remedy(
        "See whether a route leads to it, and then whether its host is alive.",
        command=paths.command(where[0], paths.owners(silent), f"ip route get {where[1]}"),
    )
    yield from _user_timeout(silent)


def _when_lost(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    living = [track for track in silent if track.last.has_file]
    program = paths.program(paths.owners(living))
    close = f"Let {program} close these and open new ones: others of this address are answered. Then see"
    yield Remedy(
        f"{close if living else 'See'} why the packets of these are dropped, in the firewalls, NAT and load balancers "
        "on this route.",
        command=paths.command(where[0], paths.owners(silent), f"ip route get {where[1]}"),
    )
    yield from _user_timeout(silent)


def _user_timeout(silent: list[Track]) -> Iterator[Remedy]:
    without = [track for track in silent if not track.last.user_timeout_ms and track.last.has_file]
    if without and paths.owners(without):
        yield Remedy(
            f"Let {paths.program(paths.owners(without))} set TCP_USER_TIMEOUT: then a write that is not acknowledged "
            "fails after that "
            "time, and the application can turn to another server.",
            name="TCP_USER_TIMEOUT",
            present="not set",
            proposed=f"{USER_TIMEOUT_MS} ms",
            risk="a peer that is silent for as long, and comes back, loses its connections",
        )


def _when_fins(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield Remedy(
        "See whether FINs arrive there, with tcpdump and 'tcp[tcpflags] & tcp-fin != 0', and look for rules about TCP "
        "flags, or about packets without a known connection (ct state invalid), in the firewalls on the way.",
        command=paths.command(where[0], paths.owners(silent), f"ip route get {where[1]}"),
    )


def _when_full(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield Remedy(
        "See whether it answers a small packet. If it does, large ones are lost: lower the MTU of the route, or set "
        "net.ipv4.tcp_mtu_probing to 1.",
        command=paths.command(where[0], paths.owners(silent), f"ping -c 3 -s 56 {where[1]}"),
    )
    yield from _when_gone(where, silent)


def _when_idle(where: Peer, silent: list[Track], idle_us: float) -> Iterator[Remedy]:
    living = [track for track in silent if track.last.has_file]
    program, limit_s = paths.program(paths.owners(living)), max(KEEPALIVE_LEAST_S, int(idle_us / 2e6))
    without = [track for track in living if not track.last.keepalive]
    if without:
        yield Remedy(
            f"Let {program} set SO_KEEPALIVE: {len(without)} of these do not have it. Or let its pool close "
            "connections "
            f"that were idle for {limit_s} s.",
            name="SO_KEEPALIVE",
            present="not set",
            proposed="set",
        )
    keepalive_s = max(track.last.keepalive_s for track in silent)
    if keepalive_s > limit_s:
        yield Remedy(
            "Let keepalive probe before the connection is forgotten: after half of the shortest idle time that was cut."
            " New connections and those that begin to be idle take it.",
            command=paths.command(where[0], paths.owners(silent), f"sysctl -w net.ipv4.tcp_keepalive_time={limit_s}"),
            name="net.ipv4.tcp_keepalive_time",
            present=keepalive_s,
            proposed=limit_s,
            risk="each idle connection with SO_KEEPALIVE sends one packet in that time",
        )


rule = NoAck()
