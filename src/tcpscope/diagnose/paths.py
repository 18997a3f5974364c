"""What the rules about the way to a remote address say in the same words."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tcpscope.diagnose import connection, peer, processes
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.tallies import Tally
from tcpscope.diagnose.wording import in_netns, is_in

SENDING = frozenset({"ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT1", "CLOSING", "LAST_ACK"})
"""States in which the remote end has to acknowledge what was sent."""

_SHOWN = 3
_HERE = "{}"
_KNOWN_SECONDS = 10

Peer = tuple[int, str]
"""Network namespace, as inode, and remote address."""


_UNRESOLVED_IN = ("neigh_invalidate", "arp_error_report", "ndisc_error_report")
"""Functions that discard what waits for a link address, where discards have no reason."""


def is_unresolved(group: Any) -> bool:
    """A discard of what this host sends, since no next hop has given its link address."""
    if group.direction != "SENT":
        return False
    return group.reason == "NEIGH_FAILED" if group.reason else str(group.location).startswith(_UNRESOLVED_IN)


def resolution(address: str) -> str:
    """How the link address of a next hop is asked for."""
    return "neighbour discovery" if ":" in address else "ARP"


def by_peer(tracks: Iterable[Track]) -> Mapping[Peer, list[Track]]:
    """The connections of each remote address, without those that are being opened."""
    found: dict[Peer, list[Track]] = {}
    for track in tracks:
        row = track.last
        if row.state in SENDING:
            found.setdefault((row.netns, row.raddr), []).append(track)
    return found


def timeouts(row: Any) -> int:
    """How many RTOs have run out since the last ACK of new data."""
    return int(max(row.backoff, row.retransmits))


def listed(numbers: Counter[Any], noun: str = "more") -> str:
    """`5432 (3), 6379 (1) and 2 more`: the most frequent first."""
    text = ", ".join(f"{value} ({n})" for value, n in numbers.most_common(_SHOWN))
    rest = len(numbers) - _SHOWN
    return text + (f" and {rest} {noun}" if rest > 0 else "")


def ports(tracks: Iterable[Track]) -> str:
    """`remote port 5432 (3)`: the services that are reached, or `local port` and those that are given."""
    remote, local = Counter[int](), Counter[int]()
    for track in tracks:
        row = track.last
        (local if row.role == "PASSIVE" else remote)[row.lport if row.role == "PASSIVE" else row.rport] += 1
    words = [f"{end} port {listed(found)}" for end, found in (("remote", remote), ("local", local)) if found]
    return ", ".join(words)


Owners = Counter[tuple[int, str]]
"""PID and name of processes, with the number of their connections or segments."""


def owners(tracks: Iterable[Track]) -> Owners:
    return Counter((track.last.pid, track.last.comm) for track in tracks if track.last.pid is not None)


def pids(found: Owners) -> list[int]:
    """The one with the most first."""
    return [pid for (pid, _), _ in found.most_common()]


def program(found: Owners) -> str:
    """The name of the one with the most."""
    return found.most_common(1)[0][0][1] if found else "the application"


def who(found: Owners) -> str | None:
    """`orders (PID 4711, orders.service) and 2 more`: the one with the most."""
    if not found:
        return None
    pid, comm = found.most_common(1)[0][0]
    name = processes.read(pid, comm).name
    return name + (f" and {len(found) - 1} more" if len(found) > 1 else "")


def command(netns: int, found: Owners, text: str) -> str | None:
    """A command in the network namespace of these processes' sockets; None: it is not known how to enter that."""
    inside = next((pid for (pid, comm), _ in found.most_common() if is_in(pid, netns, comm)), None)
    entered = in_netns(netns, _HERE, [inside]) if inside else _entered(netns, int(time.monotonic() / _KNOWN_SECONDS))
    return entered.replace(_HERE, text) if entered else None


@lru_cache(maxsize=64)
def _entered(netns: int, when: int) -> str | None:
    """Without a process to enter by. All of /proc is read for it, and many findings may ask."""
    return in_netns(netns, _HERE)


def of(where: Peer, found: Owners, *look: str) -> dict[str, Any]:
    """What a finding about a remote address has beside its text: `who`, `look`, `about`, `subject`."""
    return {
        "subject": where,
        "who": who(found),
        "look": tuple(f"{command} --raddr {where[1]}" for command in look),
        "about": frozenset({peer(*where)}),
    }


def both(where: Peer, connections: Iterable[tuple[str, int, str, int]]) -> frozenset[tuple[Any, ...]]:
    """For `Finding.about`: this address and these connections, which their other ends see, too."""
    return frozenset({peer(*where), *(connection(where[0], *ends) for ends in connections)})


def facts(where: Peer, found: Owners, count: int, **numbers: Any) -> dict[str, Any]:
    """What programs want to know of every finding about a remote address."""
    return {
        "netns": where[0],
        "raddr": where[1],
        "count": count,
        "pids": pids(found),
        "comm": program(found) if found else None,
    } | numbers


def percent(part: float, whole: int) -> str:
    """`3.2%`."""
    share = 100 * part / whole
    return f"{share:.{int(share < 10)}f}%"


def number(count: int, noun: str) -> str:
    """`1 connection`, `3 connections`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def meanwhile(opened: int, answered: int) -> str:
    """What shows that an address lives."""
    found = [f"{number(opened, 'connect')} succeeded"] if opened else []
    found += [f"{number(answered, 'other connection')} had an answer"] if answered else []
    return f"meanwhile {' and '.join(found)}"


KINDS = {
    "FAST": "after ACKs that showed a loss (fast)",
    "RACK_TIMEOUT": "after RACK's reordering timer",
    "RTO": "after a timeout (RTO)",
    "SLOW_START": "in slow start after it",
    "LOSS_PROBE": "as a loss probe of the tail",
}
"""Retransmissions of data and FINs."""


@dataclass
class Again:
    """What was sent again to an address, or could not be: data and FINs only.

    kinds        kind -> segments that were sent again
    failed       errno -> attempts that were not sent (since 6.17)
    spurious     segments of which the kernel has found that they had arrived
    connections  addresses and ports of each connection -> what it sent again
    """

    kinds: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    spurious: int = 0
    connections: Counter[tuple[str, int, str, int]] = field(default_factory=Counter)
    owners: Owners = field(default_factory=Counter)
    first_s: float = math.inf
    last_s: float = 0.0

    @property
    def segs(self) -> int:
        return self.kinds.total()

    @property
    def said(self) -> str:
        """`40 after a timeout (RTO), 3 as a loss probe of the tail`."""
        return ", ".join(f"{segs:,} {KINDS[kind]}" for kind, segs in self.kinds.most_common())

    def _add(self, group: Any, tally: Tally) -> None:
        if group.kind == "SPURIOUS":
            self.spurious += tally.sum
            return
        sent = group.errno == "none"
        if sent:
            self.kinds[group.kind] += tally.sum
        else:
            self.failed[group.errno] += tally.count
        self.connections[group.laddr, group.lport, group.raddr, group.rport] += tally.sum if sent else 0
        if group.pid is not None:
            self.owners[group.pid, group.comm] += max(tally.sum, tally.count)
        self.first_s, self.last_s = min(self.first_s, tally.first_s), max(self.last_s, tally.last_s)


def again(seen: Evidence) -> Mapping[Peer, Again]:
    """What was sent again to each address. Several rules ask in the same check: it is added up once."""
    if _last.get("of") is not seen.retrans.tallies or _last["at_s"] != seen.now_s:
        found: dict[Peer, Again] = {}
        for group, tally in seen.retrans.tallies.items():
            if group.kind in KINDS or group.kind == "SPURIOUS":
                where = group.netns, group.raddr
                if (known := found.get(where)) is None:
                    known = found[where] = Again()
                known._add(group, tally)
        _last.update(of=seen.retrans.tallies, at_s=seen.now_s, found=found)
    result: Mapping[Peer, Again] = _last["found"]
    return result


_last: dict[str, Any] = {}


@dataclass(frozen=True)
class Sent:
    """Segments sent again, of how many, to tell the share. `of_peer`: of this address alone."""

    again: int
    all: int
    of_peer: bool

    @property
    def said(self) -> str:
        """`50 of 1,523 segments of this network namespace were sent again (3.3%)`."""
        what = "segments of data on its connections while these were looked at"
        of = what if self.of_peer else "segments of this network namespace"
        return f"{self.again:,} of {self.all:,} {of} were sent again ({percent(self.again, self.all)})"


def sent(seen: Evidence, where: Peer, found: Again) -> Sent:
    """Of the connections with this address, as they were looked at.

    Where most of these ended between two looks, of the whole namespace: 0, if its counters cannot be read.
    """
    tally = seen.sockets.sent.get(where, Tally())
    if 2 * tally.sum >= found.segs:
        return Sent(tally.sum, tally.count, True)
    again, out = (seen.counters.grown(where[0], f"Tcp{name}") or 0 for name in ("RetransSegs", "OutSegs"))
    return Sent(again, out, False)


def transmitted(seen: Evidence, netns: int, part: int) -> int | None:
    """How many segments TCP has sent in a network namespace, with those that were sent again or could not be sent.

    TcpOutSegs has only new ones. None: it is not known, or not for all the time in which `part` was counted.
    """
    counters = getattr(seen, "counters", None)
    grown = counters.grown if counters is not None else lambda netns, name: None
    new = grown(netns, "TcpOutSegs")
    if new is None:
        return None
    sent = new + (grown(netns, "TcpRetransSegs") or 0) + (grown(netns, "TcpExtTCPRetransFail") or 0)
    return sent if sent >= part else None


def needless(seen: Evidence, where: Peer, found: Again) -> int:
    """How many had arrived already, as the kernel found out, or as the remote end said (DSACK)."""
    return min(found.segs, max(found.spurious, seen.sockets.twice.get(where, Tally()).count))
