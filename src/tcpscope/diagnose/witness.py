"""The kernel's counters of the network namespaces of listeners: the witness of what was seen at each of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tcpscope.kernel import netns, pidns
from tcpscope.listeners import LISTENERS_AT_MOST, Listener, NamespaceKey
from tcpscope.snmp import counters_in

COUNTERS = ("ListenOverflows", "ListenDrops", "TCPReqQFullDoCookies", "TCPReqQFullDrop")


class Witness:
    """The kernel's counters of each network namespace while it was watched, read from /proc.

    They are read when a namespace is first seen, and when a listener of it has refused something. So a look costs no
    reading where nothing happens.
    """

    def __init__(self) -> None:
        self._before: dict[NamespaceKey, dict[str, int]] = {}
        self._now: dict[NamespaceKey, dict[str, int]] = {}
        self._seen: dict[NamespaceKey, int] = {}  # what its listeners had refused at the last reading
        self._last: dict[NamespaceKey, list[Listener]] = {}

    def look(self, found: Iterable[Listener]) -> None:
        """After a snapshot of the listeners that pass the filter."""
        groups: dict[NamespaceKey, list[Listener]] = {}
        for own in found:
            groups.setdefault(own.namespace, []).append(own)
        last_groups, self._last = self._last, groups
        for namespace, group in groups.items():
            if last_groups.get(namespace) == group:
                continue
            seen = hash(tuple((own.key, own.drops, sum((own.refused or {}).values()), own.counters) for own in group))
            if self._seen.get(namespace) == seen:
                continue
            self._seen[namespace] = seen
            read = namespace_counters(group)
            last = self._now.get(namespace)
            if last is None:
                self._before[namespace] = _at_birth(read, group) if all(own.since_ns for own in group) else read
            elif not read:
                continue
            elif any(read[name] < n for name, n in last.items()):  # another namespace had this inode number
                self._before[namespace] = dict.fromkeys(read, 0)
            self._now[namespace] = read
        if len(self._now) > 2 * LISTENERS_AT_MOST:
            for known in (self._before, self._now, self._seen):
                for gone in known.keys() - groups.keys():
                    del known[gone]

    def begin(self) -> None:
        """Count from the last reading on."""
        self._before = dict(self._now)

    def grown(self, listener: Listener) -> dict[str, int]:
        before = self._before.get(listener.namespace, {})
        now = self._now.get(listener.namespace, {})
        return {name: now[name] - n for name, n in before.items() if name in now}


def _at_birth(read: dict[str, int], group: list[Listener]) -> dict[str, int]:
    """What the counters were before the first of these listeners began: zero, if what they refused explains `read`.

    Otherwise the counters are older, and it is not known what they were.
    """
    drops = sum(own.drops for own in group)
    cookies = sum(own.count("COOKIE_SENT") or 0 for own in group)
    return {name: 0 for name, n in read.items() if n <= (cookies if name == "TCPReqQFullDoCookies" else drops)}


def namespace_counters(group: Iterable[Listener]) -> dict[str, int]:
    """The kernel's counters (TcpExt...) of the network namespace of these listeners; empty if they cannot be read.

    Holders have the PIDs of the first PID namespace. In another one /proc may have other processes under these.
    """
    if pidns.inner():
        return {}
    for pid in dict.fromkeys(pid for own in group for pid in _inside(own)):
        try:
            pairs = counters_in(Path(f"/proc/{pid}/net/netstat").read_text())
        except OSError:
            continue
        return {name: pairs[f"TcpExt{name}"] for name in COUNTERS if f"TcpExt{name}" in pairs}
    return {}


def _inside(listener: Listener) -> Iterable[int]:
    """The PIDs of holders in its network namespace. Before the first walk: who called listen(), unless it has left.

    Without privileges it cannot be seen whether it did. Few programs change their namespace.
    """
    if listener.inside:
        return listener.inside
    return (own.pid for own in listener.holders if own.fd is None and not _has_left(own.pid, listener.netns))


def _has_left(pid: int, inode: int) -> bool:
    """Whether a process has left the network namespace in which it made its socket.

    Without privileges this cannot be seen. The answer is no then: few programs change their namespace.
    """
    try:
        return netns.inode_of(f"/proc/{pid}/ns/net") != inode
    except OSError:
        return False
