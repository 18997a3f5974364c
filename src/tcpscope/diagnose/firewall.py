"""Packets that a firewall of this host drops: of which handshakes they are, and whose."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from tcpscope.diagnose import addresses, paths
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.tallies import Tally
from tcpscope.listeners import Listener

SYNS, ANSWERS, ACKS = "SYNs", "SYN-ACKs", "ACKs"
"""Packets of handshakes. ACKs: what a client sends when it believes that it is connected."""

_FUNCTION = "nf_hook_slow"  # it frees the packet; before 5.17 there is no other sign
_OF_RULES = "nft_do_chain"  # here nftables frees it, on newer kernels: connection tracking does not

Ends = tuple[str, int, str, int]
"""Local address and port, remote address and port."""

Owner = tuple[int | None, str | None]
"""PID and name of a process; None: not known."""


class Dropped(NamedTuple):
    """Packets of one handshake that were dropped in the network namespace `netns`, as the listener names its ends."""

    netns: int
    laddr: str
    lport: int
    raddr: str
    rport: int
    owner: Owner
    location: str | None
    tally: Tally

    @property
    def by_rule(self) -> bool:
        """Whether it is certain that a rule has dropped it. Connection tracking drops in no chain."""
        return (self.location or "").startswith(_OF_RULES)


class Connecting:
    """Who on this machine connects, or has connected, in whatever network namespace.

    failing   (local address, remote address, remote port) -> (network namespace, PID, name) -> attempts without success
    answered  (network namespace, remote address, remote port) -> attempts that succeeded
    tried     (local address, remote address, remote port) of all of them
    connected (network namespace, remote address) of connections that are there, or were opened from here
    """

    def __init__(self, seen: Evidence) -> None:
        self.failing: dict[tuple[str, str, int], Counter[tuple[int, int | None, str | None]]] = defaultdict(Counter)
        self.answered: Counter[tuple[int, str, int]] = Counter()
        self.tried: set[tuple[str, str, int]] = set()
        self.connected: set[tuple[int, str]] = set()
        for group, tally in (seen.attempts.tallies if hasattr(seen, "attempts") else {}).items():
            self.tried.add((group.laddr, group.raddr, group.rport))
            if group.outcome == "ESTABLISHED":
                self.answered[group.netns, group.raddr, group.rport] += tally.count
                self.connected.add((group.netns, group.raddr))
            elif group.raddr is not None:
                self.failing[group.laddr, group.raddr, group.rport][group.netns, group.pid, group.comm] += tally.count
        for track in tracks_of(seen):
            row = track.last
            if row.state == "SYN_SENT":
                self.failing[row.laddr, row.raddr, row.rport][row.netns, row.pid, row.comm] += 1
                self.tried.add((row.laddr, row.raddr, row.rport))
            elif row.state in paths.SENDING:
                self.connected.add((row.netns, row.raddr))


class Forwarded:
    """Whose a packet is that a network namespace receives, but only forwards: of a container, or for one.

    It is certain only where the address to which it goes is none of the namespace.
    """

    def __init__(self, seen: Evidence, connecting: Connecting) -> None:
        self._seen, self._connecting = seen, connecting
        self._listening: dict[int, list[History]] = defaultdict(list)
        for history in seen.queues.histories.values():
            if not history.gone:
                self._listening[history.last.lport].append(history)
        self._found: dict[tuple[int, str, int], History | None] = {}
        self._has: dict[tuple[int, str], bool | None] = {}

    def listener(self, what: str, dropped: Dropped) -> History | None:
        """The listener in another network namespace."""
        where = dropped.netns, dropped.laddr, dropped.lport
        if where not in self._found:
            takes = (each for each in self._listening[dropped.lport] if self._takes(each.last, dropped))
            self._found[where] = next(takes, None)
        history = self._found[where]
        return history if history and self._passes(what, dropped) else None

    def client(self, what: str, dropped: Dropped) -> int | None:
        """The network namespace, another one, of a process that connects."""
        waits = self._connecting.failing.get((dropped.raddr, dropped.laddr, dropped.lport), Counter())
        inode = next((inode for inode, _, _ in waits if inode != dropped.netns), None)
        return inode if inode is not None and self._passes(what, dropped) else None

    def _takes(self, own: Listener, dropped: Dropped) -> bool:
        if own.netns == dropped.netns or not takes(own.laddr, dropped.laddr):
            return False
        return own.laddr == dropped.laddr or bool(addresses.is_local(dropped.laddr, own))

    def _passes(self, what: str, dropped: Dropped) -> bool:
        where = dropped.netns, dropped.raddr if what == ANSWERS else dropped.laddr
        if where not in self._has:
            self._has[where] = addresses.has(*where, listeners_in(self._seen, dropped.netns))
        return self._has[where] is False


def dropped_of(group: Any, tally: Tally, here: bool) -> Dropped:
    """`here`: the local end is that of the listener."""
    local, remote = (group.laddr, group.lport), (group.raddr, group.rport)
    ends = (*local, *remote) if here else (*remote, *local)
    return Dropped(group.netns, *ends, (group.pid, group.comm), group.location, tally)


def listeners_in(seen: Evidence, inode: int) -> Iterator[Listener]:
    """Those of a network namespace: their processes tell about it."""
    histories = seen.queues.histories.values()
    return (each.last for each in histories if each.last.netns == inode and not each.gone)


def tracks_of(seen: Evidence) -> Iterator[Track]:
    return iter(seen.sockets.now) if hasattr(seen, "sockets") else iter(())


def ends_of(row: Any) -> Ends:
    """Of a socket, or of a packet."""
    return row.laddr, row.lport, row.raddr, row.rport


def is_answer(flags: str | None) -> bool:
    return flags is not None and "SYN" in flags and "ACK" in flags


def is_of_connection(flags: str | None) -> bool:
    return flags is not None and "ACK" in flags and "SYN" not in flags and "RST" not in flags


def takes(listens: str, laddr: str) -> bool:
    """Whether a listener there may take connections to this address. One at :: may take those of IPv4."""
    return listens in (laddr, "::") or (listens == "0.0.0.0" and ":" not in laddr)


def is_syn(flags: str | None) -> bool:
    return flags is not None and "SYN" in flags and "ACK" not in flags


def is_of_firewall(group: Any) -> bool:
    """Before 5.17 there is no reason, but the function."""
    if group.reason is None:
        return bool(group.location) and group.location.startswith(_FUNCTION)
    return bool(group.reason == "NETFILTER_DROP")
