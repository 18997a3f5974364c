"""Netfilter's table of connections: when it is full, a packet that needs a new entry is dropped as if by a rule."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tcpscope.kernel import netns

SYSCTLS = Path("/proc/sys/net/netfilter")
NEARLY = 0.99
"""Entries end each second, so the table is seldom quite full when it is read."""

_KEPT_SECONDS = 60.0  # as rules look at the last minute


@dataclass(frozen=True)
class Table:
    """The entries of a network namespace, and how many it may have."""

    entries: int
    limit: int

    @property
    def is_full(self) -> bool:
        return self.entries >= NEARLY * self.limit


class Tables:
    """The tables that were read. One that was full in the last minute stays so: then packets were dropped."""

    def __init__(self) -> None:
        self._full: dict[int, tuple[float, Table]] = {}

    def of(self, inode: int) -> Table | None:
        """Of this network namespace. None: it tracks no connections, or its table cannot be read."""
        now_s, found = time.monotonic(), read(inode)
        if found and found.is_full:
            self._full[inode] = now_s, found
        elif inode in self._full and now_s - self._full[inode][0] >= _KEPT_SECONDS:
            del self._full[inode]
        return self._full[inode][1] if inode in self._full else found


def read(inode: int) -> Table | None:
    """Sysctls are those of the network namespace of who reads them: others cannot be read."""
    if inode != netns.own():
        return None
    with suppress(OSError, ValueError):
        entries, limit = (int((SYSCTLS / f"nf_conntrack_{name}").read_text()) for name in ("count", "max"))
        return Table(entries, limit) if limit else None  # 0: without a limit
    return None
