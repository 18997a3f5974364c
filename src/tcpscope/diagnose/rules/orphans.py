"""Connections that no process has any more, and that do not end: the kernel keeps them for the remote end's sake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, peer
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.wording import in_netns, is_in

LEAST = 10
OLD_SECONDS = 5.0
"""As many as a leak in CLOSE_WAIT has, which is the same at the other end. An orphan of a healthy connection lasts for
a round trip or two; at a thousand closes a second over 100 ms there are 100, and not one is as old as this."""

NEAR_LIMIT = 1 / 4
"""Of tcp_max_orphans. From a quarter on the kernel resets those that have sent nothing for long or had an error:
tcp_out_of_resources() doubles the number up to two times."""

FIN_WAIT2_SECONDS = 60
"""TCP_TIMEWAIT_LEN: up to this tcp_fin_timeout a small timewait socket stands for an orphan in FIN_WAIT2."""

_STATES = frozenset({"FIN_WAIT1", "FIN_WAIT2", "CLOSING", "LAST_ACK"})
_MARK = "orphans"
_SHOWN = 3
_WHY = "The process has closed these connections, and the kernel keeps them until the remote end has confirmed that. "
_WHY_HOW = {
    "no ACK": "The remote end does not acknowledge: it is gone, or the path is broken. The kernel gives up after "
    "net.ipv4.tcp_orphan_retries (0 means 8) repetitions.",
    "no room": "The remote end acknowledges, but takes no data: its application does not read. Data that was already "
    "written stays in this kernel's memory.",
    "no FIN": "The remote end has acknowledged, but does not close its own end: its application has forgotten the "
    "connection, or still sends.",
}
_OBSERVED = {
    "no ACK": "without an ACK",
    "no room": "with data for which the remote end has no room",
    "no FIN": "in FIN_WAIT2: the remote end does not close",
}


def _is_orphan(row: Any) -> bool:
    return bool(row.state in _STATES and not row.has_file)


def _waits(row: Any, before: Any) -> bool:
    """Nothing was acknowledged since the look before: otherwise it drains, however slowly."""
    moved = before is not None and before.acked_seq != row.acked_seq
    return _is_orphan(row) and (row.state == "FIN_WAIT2" or not moved)


def _how(row: Any) -> str:
    """What it waits for."""
    if row.state == "FIN_WAIT2":
        return "no FIN"
    return "no room" if row.timer == "ZERO_WINDOW" else "no ACK"


def _is_old(track: Track) -> bool:
    """In FIN_WAIT2 no ACK need come; elsewhere each ACK shows that the other end lives, and the looks tell the age."""
    return bool(max(track.held_s(_MARK), track.last.since_ack_us / 1e6) >= OLD_SECONDS)


class Orphans(Rule):
    needs = ("sockets", "resets")
    marks = {_MARK: _waits}

    def check(self, seen: Evidence) -> Iterator[Finding]:
        peers: dict[tuple[int, str, str], list[Track]] = {}
        for track in seen.sockets.now:
            if track.holds(_MARK) and _is_old(track):
                peers.setdefault((track.last.netns, track.last.raddr, _how(track.last)), []).append(track)
        for (netns, raddr, how), tracks in peers.items():
            if len(tracks) >= LEAST:
                yield self._of_peer(netns, raddr, how, tracks)
        yield from self._near_limit(seen)

    def _of_peer(self, netns: int, raddr: str, how: str, tracks: list[Track]) -> Finding:
        rows = [track.last for track in tracks]
        waiting = sum(row.unacked + row.unsent for row in rows)
        states = Counter(row.state for row in rows)
        processes = Counter(f"{row.comm} (PID {row.pid})" for row in rows if row.pid is not None)
        oldest_s = max(max(track.held_s(_MARK), track.last.since_ack_us / 1e6) for track in tracks)
        observed = [
            f"{len(rows)} connections that no process has any more, {_OBSERVED[how]}, for {OLD_SECONDS:g} s or longer",
            f"states: {_most(states)}"
            + (f"; {waiting} bytes wait to be sent or acknowledged" if how != "no FIN" else ""),
        ]
        if processes:
            observed.append(f"closed by: {_most(processes)}")
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"{len(rows)} closed connections with {raddr} do not end",
            observed=observed,
            why=_WHY + _WHY_HOW[how],
            remedies=list(_remedies(netns, raddr, how, rows)),
            look=(f"list --raddr {raddr}",),
            about=frozenset({peer(netns, raddr)}),
            subject=(netns, raddr, how),
            first_s=max(track.last_s for track in tracks) - oldest_s,
            facts={
                "netns": netns,
                "count": len(rows),
                "raddr": raddr,
                "waits_for": how,
                "states": dict(states),
                "bytes": waiting,
                "pids": sorted({row.pid for row in rows if row.pid is not None}),
            },
        )

    def _near_limit(self, seen: Evidence) -> Iterator[Finding]:
        orphans, most = _number(), _limit()
        if orphans is None or most is None or orphans < NEAR_LIMIT * most:
            return
        killed: Counter[str] = Counter()
        for group, tally in seen.resets.where(direction="SENT", cause="NO_MEMORY"):
            killed[group.raddr] += tally.count
        count = killed.total()
        held = Counter(track.last.raddr for track in seen.sockets.now if _is_orphan(track.last))
        observed = [
            f"{orphans} orphaned connections on this machine, tcp_max_orphans is {most}",
            f"{count} closed connections were reset by the kernel"
            + (f": {_most(killed)}" if count else ", so far none"),
        ]
        if held:
            observed.append(f"remote addresses with most: {_most(held)}")
        own = Path("/proc/self/ns/net").stat().st_ino
        yield Finding(
            rule=self.name,
            severity="critical" if count else "warning",
            title="so many closed connections wait for the remote end that the kernel "
            + ("resets some" if count else "may reset some"),
            observed=observed,
            why=_WHY
            + "There is a limit for all of them. Above it, and for slow ones from a quarter of it on, the kernel "
            "sends a RST and throws away the data that still waits.",
            remedies=[
                Remedy(
                    "Raise net.ipv4.tcp_max_orphans.",
                    command=f"sysctl -w net.ipv4.tcp_max_orphans={2 * most}",
                    name="net.ipv4.tcp_max_orphans",
                    present=most,
                    proposed=2 * most,
                    risk="Each may hold 64 kB and more of memory that cannot be swapped out.",
                ),
                Remedy("See which remote addresses they belong to: clients that vanish, or do not read."),
            ],
            look=("list",),
            about=frozenset({("orphans",)}),
            facts={"netns": own, "count": count, "orphans": orphans, "limit": most},
        )


def _remedies(netns: int, raddr: str, how: str, rows: list[Any]) -> Iterator[Remedy]:
    owners = {(row.pid, row.comm) for row in rows if row.pid is not None}
    inside = [pid for pid, comm in owners if is_in(pid, netns, comm)]
    if how == "no FIN":
        there = f"Find out on {raddr} which process keeps these connections: there they are in CLOSE_WAIT."
        comm = rows[0].comm or "the application"
        if rows[0].linger2_set:
            yield Remedy(
                f"Let {comm} set TCP_LINGER2 to {FIN_WAIT2_SECONDS} s at the most, or not at all: then the kernel "
                "keeps a small timewait socket in place of each of these connections.",
                name="TCP_LINGER2",
                present=rows[0].fin_timeout_s,
                proposed=FIN_WAIT2_SECONDS,
            )
            yield Remedy(there)
            return
        yield Remedy(
            f"Let the kernel wait for a FIN for {FIN_WAIT2_SECONDS} s at the most: then it keeps a small timewait "
            "socket in place of each of these connections.",
            command=in_netns(netns, f"sysctl -w net.ipv4.tcp_fin_timeout={FIN_WAIT2_SECONDS}", inside),
            name="net.ipv4.tcp_fin_timeout",
            present=rows[0].fin_timeout_s,
            proposed=FIN_WAIT2_SECONDS,
            risk="A remote end that needs longer to send the rest gets a RST.",
        )
        yield Remedy(there)
    elif how == "no room":
        yield Remedy(
            f"See on {raddr} what the application waits for. Here TCP_USER_TIMEOUT, set before close(), ends "
            "them sooner.",
        )
    else:
        yield Remedy(
            f"See whether {raddr} can be reached.",
            command=in_netns(netns, f"ping -c 3 {raddr}", inside),
        )


def _number() -> int | None:
    """Of all namespaces."""
    for line in _read("/proc/net/sockstat").splitlines():
        words = line.split()
        if words[:1] == ["TCP:"] and "orphan" in words:
            return int(words[words.index("orphan") + 1])
    return None


def _limit() -> int | None:
    """None in a network namespace that is not the first: it is not shown there."""
    text = _read("/proc/sys/net/ipv4/tcp_max_orphans").strip()
    return int(text) if text.isdecimal() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _most(found: Counter[str]) -> str:
    more = len(found) - _SHOWN
    text = ", ".join(f"{name} ({n})" for name, n in found.most_common(_SHOWN))
    return text + (f" and {more} more" if more > 0 else "")


rule = Orphans()
