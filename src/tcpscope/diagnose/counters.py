"""The kernel's SNMP counters of each network namespace, read each second: a witness, and seldom a cause."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tcpscope.diagnose.wording import is_in
from tcpscope.kernel import netns
from tcpscope.kernel.resources import help_for
from tcpscope.request import Request
from tcpscope.run import Batch, Run
from tcpscope.snmp import counters_in

_PAUSE_SECONDS = 1.0
_SHARE = 100  # readings take at most this part of one processor
_NAMESPACES_AT_MOST = 256
_FILES = ("net/netstat", "net/snmp")
_MET_AT_MOST = 10_000  # processes with a socket in a namespace that is not known
_MOUNTINFO = Path("/proc/self/mountinfo")
_FILES_SHARE = 4  # they take at most this part of the files that this process may open
_BYTES = 1 << 16  # of such a file: they have about 1 and 4 kB


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
    One in which a socket is found later is read by the process that has the socket (`meet`). If nothing held it when
    the watch began, it is younger, and its counters began at zero. Otherwise it is not known how they grew before.

    Their files stay open. So a later process under the same number is not asked, which may be in another namespace.
    An open file keeps its namespace: when all processes that were in it are gone, it is let go.

    memory  of TCP; None: it cannot be read, as in a network namespace without tcp_mem
    """

    memory: Memory | None = None

    def __init__(self, request: Request) -> None:
        self._wanted, self._most = request.filter.netns, _at_most()
        self._older: Collection[int] | None = None
        self._met: set[tuple[int, int]] = set()
        self._born, self._partial, self._ever = set[int](), set[int](), set[int]()
        self._open = dict(_opened(self._wanted, self._most))
        self._older = _existing({files.number for files in self._open.values()})
        self._numbers = dict(_numbers())
        self.run = _Files(self._open)
        self._first: dict[int, dict[str, int]] = {}
        self._middle: dict[int, tuple[float, dict[str, int]]] = {}
        self._last: dict[int, dict[str, int]] = {}
        self._next_s = 0.0
        self._read()

    def meet(self, sockets: Iterable[tuple[int, int, str]]) -> None:
        """Read the namespaces in which sockets were found, unless they are known: by PIDs and names of processes."""
        for inode, pid, comm in sockets:
            if inode in self._open or (inode, pid) in self._met or len(self._open) >= self._most:
                continue
            if len(self._met) < _MET_AT_MOST:
                self._met.add((inode, pid))
            if not self._wanted or inode in self._wanted:
                self._open_by(inode, pid, comm)

    def _open_by(self, inode: int, pid: int, comm: str) -> None:
        """The process may have left the namespace. It is not asked if it can be seen to be in another one: by its link,
        or because its files are those of a namespace that is known. Its counters began at zero only if it is met for
        the first time and the watch has forgotten nothing: without a process that was met it may have been there long.
        """
        if not is_in(pid, inode, comm):
            return
        with suppress(OSError):
            files = _Open([Path("/proc", str(pid))])
            if self._numbers.setdefault(files.number, inode) != inode:
                files.close()
                return
            self._open[inode] = files
            younger = self._older is not None and inode not in self._older and inode not in self._ever
            (self._born if younger else self._partial).add(inode)

    def blind_spots(self) -> Iterator[str]:
        """What the counters do not tell, a line each."""
        if len(self._open) >= self._most:
            yield f"the kernel's counters of {self._most} network namespaces were read, of others they were not"
        if self._partial:
            numbers = ", ".join(map(str, sorted(self._partial)))
            yield f"of network namespace {numbers} the kernel's counters were not read from the beginning"

    def begin(self) -> None:
        self._first.clear()
        self._read()

    def poll(self) -> None:
        if time.monotonic() >= self._next_s:
            self._read()

    def end(self) -> None:
        self._read()

    def forget(self, before_s: float) -> None:
        """Let the counters begin at a reading before this time, and not long before."""
        self._older = None
        for inode, (read_s, values) in list(self._middle.items()):
            if read_s < before_s and inode in self._last:
                self._first[inode], self._middle[inode] = values, (time.monotonic(), self._last[inode])
                self._partial.discard(inode)

    def grown(self, inode: int, name: str) -> int | None:
        """By how much a counter of a namespace has grown since the watch began, or in the time that the rules look at,
        which is one minute to two. None: it cannot be read, or was not read from the beginning.
        """
        if inode in self._partial:
            return None
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
        for inode, files in list(self._open.items()):
            found = files.read()
            if found:
                self._last[inode] = found
                self._ever.add(inode)
                if inode not in self._first:
                    self._first[inode] = dict.fromkeys(found, 0) if inode in self._born else found
                    self._middle[inode] = began, found
            elif found is not None:
                self._numbers.pop(files.number, None)
                files.close()
                del self._open[inode]
                for known in (self._last, self._first, self._middle):
                    known.pop(inode, None)  # another namespace may get this number
                self._born.discard(inode)
                self._partial.discard(inode)
        self.memory = memory()
        self._next_s = began + max(_PAUSE_SECONDS, _SHARE * (time.monotonic() - began))


class _Open:
    """The files with the counters of one network namespace. `processes`: the folders in /proc of those that are in it.

    Raises OSError if a file cannot be opened.
    """

    def __init__(self, processes: list[Path]) -> None:
        self._processes = processes[::-1]
        self._files: list[int] = []
        try:
            for name in _FILES:
                self._files.append(os.open(processes[0] / name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.close()
            raise

    def read(self) -> dict[str, int] | None:
        """All counters; empty if its processes are gone; None: they cannot be read now."""
        while self._processes and not self._processes[-1].exists():
            self._processes.pop()
        if not self._processes:
            return {}
        found: dict[str, int] = {}
        try:
            for file in self._files:
                found |= counters_in(os.pread(file, _BYTES, 0).decode(errors="replace"))
        except OSError as error:
            return None if help_for(error.errno) else {}
        return found

    @property
    def number(self) -> int:
        """Of the first file: each namespace has entries of its own in /proc."""
        return os.fstat(self._files[0]).st_ino

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())


class _Files(Run):
    """Counters need no probe, but open files."""

    accounts = False

    def __init__(self, opened: dict[int, _Open]) -> None:
        super().__init__(())
        self._open = opened

    def poll(self) -> Iterator[Batch]:
        yield from ()

    def end(self) -> Iterator[Batch]:
        yield from ()

    def close(self) -> None:
        super().close()
        while self._open:
            self._open.popitem()[1].close()


def _existing(files: Collection[int]) -> set[int] | None:
    """The namespaces that something holds now: processes, names, and mounts elsewhere, as container engines have them.

    `files` are the numbers of files of namespaces that are known. None: a process that may not be seen is in none of
    these.
    """
    with suppress(OSError):
        mounted = re.findall(r" net:\[(\d+)\] ", _MOUNTINFO.read_text(errors="replace"))
        if all((process / _FILES[0]).stat().st_ino in files for process in netns.hidden()):
            return {*netns.visible().namespaces, *map(int, mounted)}
    return None


def _at_most() -> int:
    """Of how many namespaces the files may be opened."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _NAMESPACES_AT_MOST
    return min(_NAMESPACES_AT_MOST, limit // _FILES_SHARE // len(_FILES))


def _opened(wanted: Collection[int], most: int) -> Iterator[tuple[int, _Open]]:
    """Namespaces and their files, as far as files may be opened."""
    number = 0
    for inode, processes in netns.processes().items():
        if number == most:
            return
        if not wanted or inode in wanted:
            with suppress(OSError):
                files = _Open(processes)
                number += 1
                yield inode, files


def _numbers() -> Iterator[tuple[int, int]]:
    """The number of the first file of each namespace that has a process -> the namespace."""
    for inode, processes in netns.processes().items():
        with suppress(OSError):
            yield (processes[0] / _FILES[0]).stat().st_ino, inode


def memory() -> Memory | None:
    """Of all network namespaces together: TCP has one account."""
    with suppress(OSError, ValueError):
        pages = re.search(r"^TCP:.* mem (\d+)", Path("/proc/self/net/sockstat").read_text(), re.M)
        limits = Path("/proc/sys/net/ipv4/tcp_mem").read_text().split()
        if pages and len(limits) == 3:
            return Memory(int(pages[1]), *map(int, limits))
    return None
