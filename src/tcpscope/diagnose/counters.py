"""The kernel's SNMP counters of each network namespace, read each second: a witness, and seldom a cause."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tcpscope.kernel import netns
from tcpscope.request import Request
from tcpscope.run import Batch, Run

_PAUSE_SECONDS = 1.0
_SHARE = 100  # readings take at most this part of one processor
_NAMESPACES_AT_MOST = 256
_FILES = ("net/netstat", "net/snmp")


@dataclass(frozen=True)
class Memory:
    """What all TCP sockets of the machine take, and tcp_mem: pages."""

    pages: int
    low: int
    pressure: int
    limit: int
    page_bytes: int = resource.getpagesize()


class Counters:
    """A source. Counters have the names of nstat: TcpRetransSegs, TcpExtTCPTimeouts, ...

    The namespaces are those that have a process when the watch begins: later there is no privilege to look for more.

    memory  of TCP; None: it cannot be read, as in a network namespace without tcp_mem
    """

    memory: Memory | None = None

    def __init__(self, request: Request) -> None:
        self.run = _Nothing(())
        self._holders = dict(list(_holders(request))[:_NAMESPACES_AT_MOST])
        self._first: dict[int, dict[str, int]] = {}
        self._last: dict[int, dict[str, int]] = {}
        self._next_s = 0.0
        self._read()

    def poll(self) -> None:
        if time.monotonic() >= self._next_s:
            self._read()

    def end(self) -> None:
        self._read()

    def forget(self, before_s: float) -> None:
        """Nothing."""

    def grown(self, inode: int, name: str) -> int | None:
        """By how much a counter of a namespace has grown since the watch began; None: it cannot be read."""
        first, last = self._first.get(inode, {}), self._last.get(inode, {})
        return last[name] - first[name] if name in first and name in last else None

    def now(self, inode: int, name: str) -> int | None:
        """The value of a counter; None: it cannot be read."""
        return self._last.get(inode, {}).get(name)

    @property
    def namespaces(self) -> tuple[int, ...]:
        return tuple(self._last)

    def _read(self) -> None:
        began = time.monotonic()
        for inode, process in self._holders.items():
            if found := read(process):
                self._last[inode] = found
                self._first.setdefault(inode, found)
        self.memory = memory()
        self._next_s = began + max(_PAUSE_SECONDS, _SHARE * (time.monotonic() - began))


class _Nothing(Run):
    """Counters need no probe."""

    accounts = False

    def poll(self) -> Iterator[Batch]:
        yield from ()

    def end(self) -> Iterator[Batch]:
        yield from ()


def _holders(request: Request) -> Iterator[tuple[int, Path]]:
    """Namespaces, and the folder in /proc of a process in each."""
    for inode, process in netns.processes().items():
        if not request.filter.netns or inode in request.filter.netns:
            yield inode, process


def read(process: Path) -> dict[str, int]:
    """All counters of the network namespace of a process, by its folder in /proc; empty if they cannot be read."""
    found: dict[str, int] = {}
    try:
        for name in _FILES:
            lines = (process / name).read_text().splitlines()
            for titles, values in zip(lines[::2], lines[1::2], strict=False):
                prefix, names = titles.split(":", 1)
                for title, value in zip(names.split(), values.split(":", 1)[1].split(), strict=False):
                    found[prefix + title] = int(value)
    except OSError:
        return {}
    return found


def memory() -> Memory | None:
    """Of all network namespaces together: TCP has one account."""
    with suppress(OSError, ValueError):
        pages = re.search(r"^TCP:.* mem (\d+)", Path("/proc/self/net/sockstat").read_text(), re.M)
        limits = Path("/proc/sys/net/ipv4/tcp_mem").read_text().split()
        if pages and len(limits) == 3:
            return Memory(int(pages[1]), *map(int, limits))
    return None
