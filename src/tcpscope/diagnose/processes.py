"""What /proc says of a process now: what it waits for, and which unit or container it belongs to."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tcpscope.errors import UnsupportedError
from tcpscope.filters import cgroup_mount
from tcpscope.kernel import pidns
from tcpscope.schema import comm_text

PROC = Path("/proc")
_THREADS_AT_MOST = 1000
_UNIT = re.compile(r"([^/]+\.(?:service|scope|socket))(?:/|$)")
_CONTAINER = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
_DOCKER = re.compile(r"/docker[-/]([0-9a-f]{12})[0-9a-f]{52}(?:\.scope)?(?:/|$)")
_STATES = {"D": "uninterruptible sleep", "T": "stopped", "t": "stopped by a tracer", "Z": "zombie"}


@dataclass(frozen=True)
class Process:
    """A process. `comm` is its name. What cannot be read is None.

    state        the letter of /proc/PID/stat: R, S, D, T, ...
    wchan        kernel function in which it sleeps; None without CAP_SYS_PTRACE
    unit         its systemd unit
    container    the first twelve digits of its container's id
    by_docker    that is one of Docker's
    open_files   RLIMIT_NOFILE, the soft limit. There is always one: fs.nr_open at the most
    frozen       its cgroup (v2) is frozen, as that of a paused container
    """

    pid: int
    comm: str
    state: str | None = None
    wchan: str | None = None
    unit: str | None = None
    container: str | None = None
    open_files: int | None = None
    frozen: bool = False
    by_docker: bool = False

    @property
    def name(self) -> str:
        """`nginx (PID 4711, nginx.service)`."""
        where = f"container {self.container}" if self.container else self.unit
        return f"{self.comm} (PID {self.pid}{f', {where}' if where else ''})"

    @property
    def is_stopped(self) -> bool:
        return self.state in ("T", "t")

    @property
    def does(self) -> str | None:
        """`is stopped`, if it is in a state in which it cannot work."""
        if self.frozen:
            return "is in a frozen cgroup"
        return f"is in state {self.state} ({_STATES[self.state]})" if self.state in _STATES else None


def read(pid: int, comm: str | None = None) -> Process:
    """The process as it is now. Of one that has gone only what is given is known.

    So it is in an inner PID namespace: PIDs are those of the first one, and /proc has others under these numbers.
    """
    if pidns.inner():
        return Process(pid, comm or "?")
    folder = PROC / str(pid)
    try:
        stat = (folder / "stat").read_bytes()
    except OSError:
        return Process(pid, comm or "?")
    raw, _, rest = stat.partition(b"(")[2].rpartition(b")")
    name = comm_text(raw)
    if comm is not None and comm != name and comm[:15] != name[:15]:
        return Process(pid, comm)  # another process has this number now, or in this namespace
    unit = container = wchan = limit = None
    frozen = by_docker = False
    with suppress(OSError):
        wchan = (folder / "wchan").read_text().strip("0\n") or None
    with suppress(OSError):
        for line in (folder / "cgroup").read_text(errors="replace").splitlines():
            path = line.rpartition(":")[2]
            units, found = _UNIT.findall(path), _CONTAINER.search(path)
            unit = units[-1] if units else unit
            container = found[1] if found else container
            if found:
                by_docker = found[1] in _DOCKER.findall(path)
            if line.startswith("0::"):
                frozen = _is_frozen(path)
    with suppress(OSError, ValueError, IndexError):
        for line in (folder / "limits").read_text().splitlines():
            if line.startswith("Max open files"):
                limit = int(line.split()[3])
    return Process(pid, name, rest.split()[0].decode(), wchan, unit, container, limit, frozen, by_docker)


def _is_frozen(cgroup: str) -> bool:
    """Whether a cgroup or one above it is frozen; the state of its processes is S then, as of any that sleeps."""
    with suppress(OSError, UnsupportedError):
        return "frozen 1" in (cgroup_mount() / cgroup.lstrip("/") / "cgroup.events").read_text()
    return False


def files(pid: int) -> int | None:
    """How many files it has open; None: it cannot be read. Since 6.2 it needs no privilege."""
    if pidns.inner():
        return None
    folder = PROC / str(pid) / "fd"
    with suppress(OSError):
        return folder.stat().st_size or sum(1 for _ in folder.iterdir())
    return None


def children(pid: int) -> list[Process] | None:
    """The processes that it has forked and that still live; None: they cannot be read."""
    if pidns.inner():
        return None
    found: list[Process] = []
    try:
        for folder in islice((PROC / str(pid) / "task").iterdir(), _THREADS_AT_MOST):
            for child in (folder / "children").read_text().split():
                with suppress(OSError):
                    name = comm_text((PROC / child / "comm").read_bytes()[:-1])
                    found.append(Process(int(child), name))
    except OSError:
        return None
    return found


def threads(pid: int) -> Counter[tuple[str, str | None]]:
    """State and wchan of its threads, and how many there are of each; empty: they cannot be read."""
    found: Counter[tuple[str, str | None]] = Counter()
    if pidns.inner():
        return found
    with suppress(OSError):
        for folder in islice((PROC / str(pid) / "task").iterdir(), _THREADS_AT_MOST):
            with suppress(OSError):
                state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                wchan = None
                with suppress(OSError):
                    wchan = (folder / "wchan").read_text().strip("0\n") or None
                found[state, wchan] += 1
    return found
