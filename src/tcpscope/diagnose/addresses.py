"""Which addresses a network namespace has: a packet for another one is forwarded, or for nobody."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, ip_address
from pathlib import Path

from tcpscope.diagnose.wording import is_in
from tcpscope.kernel import netns, pidns
from tcpscope.listeners import Listener

PROC = Path("/proc")
_KNOWN_SECONDS = 10
_BYTES_AT_MOST = 4 << 20
"""Of fib_trie, which has all routes. A router with more of them is not asked."""


def is_local(address: str, listener: Listener) -> bool | None:
    """Whether the network namespace of this listener has this address. None: its addresses cannot be read."""
    return _is_of(address, _process(listener), listener.netns)


def has(inode: int, address: str, listeners: Iterable[Listener]) -> bool | None:
    """Whether this network namespace, which has these listeners, has this address. None: its addresses cannot be read.

    Of our own it is known without a listener.
    """
    own = PROC / "self" if netns.own() == inode else None
    return _is_of(address, own or next(filter(None, map(_process, listeners)), None), inode)


def _is_of(address: str, process: Path | None, inode: int) -> bool | None:
    found = None if process is None else _read(process, inode, int(time.monotonic() / _KNOWN_SECONDS))
    if found is None:
        return None
    known = ip_address(address)
    if isinstance(known, IPv6Address):
        return known in found[1]
    return any(known in network for network in found[0])


def _process(listener: Listener) -> Path | None:
    """The folder in /proc of a process that is in the listener's network namespace."""
    if netns.own() == listener.netns:
        return PROC / "self"
    if pidns.inner():
        return None
    inside = (own for own in listener.holders if own.pid in listener.inside)
    return next((PROC / str(own.pid) for own in inside if is_in(own.pid, listener.netns, own.comm)), None)


@lru_cache(maxsize=64)
def _read(process: Path, inode: int, when: int) -> tuple[Collection[IPv4Network], Collection[IPv6Address]] | None:
    """Networks of IPv4 of which each address is local, and addresses of IPv6; None: they cannot be read."""
    ipv4: list[IPv4Network] = []
    try:
        with (process / "net/fib_trie").open() as file:
            text = file.read(_BYTES_AT_MOST)
            if file.read(1):
                return None
    except OSError:
        return None
    address = ""
    for line in text.splitlines():
        words = line.split()
        if words[0] == "|--":
            address = words[1]
        elif "LOCAL" in words:
            ipv4.append(IPv4Network(address + words[0]))
    return set(ipv4), _ipv6(process / "net/if_inet6")


def _ipv6(path: Path) -> set[IPv6Address]:
    """None of them without IPv6."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    return {IPv6Address(int(line.split()[0], 16)) for line in lines}
