"""What /proc says of a process now: what it waits for, what it may open, and which unit or container it belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tcpscope.diagnose import Remedy
from tcpscope.errors import UnsupportedError
from tcpscope.filters import cgroup_mount
from tcpscope.kernel import pidns
from tcpscope.schema import comm_text

FD_SETSIZE = 1024
"""Of the C library: descriptors from here on do not fit into the fd_set of select()."""

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
    open_files_hard  up to where the soft limit can be raised without CAP_SYS_RESOURCE
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
    open_files_hard: int | None = None

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
    unit = container = wchan = limit = hard = None
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
                limit, hard = map(int, line.split()[3:5])
    return Process(pid, name, rest.split()[0].decode(), wchan, unit, container, limit, frozen, by_docker, hard)


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


def without_files(process: Process, share: float = 1.0) -> bool:
    """Whether it can open no further file, and so accept no connection; or has this share of its limit open."""
    opened = files(process.pid)
    return opened is not None and process.open_files is not None and opened >= share * process.open_files


def said_of_files(process: Process, has: str = "has") -> str:
    """Of one that has nearly all open that it may, or all."""
    opened, limit = files(process.pid), process.open_files or 0
    number = f"all {limit:,}" if opened is None or opened >= limit else f"{opened:,} of the {limit:,}"
    return f"{process.comm} (PID {process.pid}) {has} {number} files open that it may (RLIMIT_NOFILE)"


def more_files(found: Sequence[Process], proposed: int, what: str, risk: str = "") -> Remedy:
    """`what`, and a higher limit of open files for these processes: one whose limits are known, or several such.

    A soft limit above the hard one is refused (EINVAL). systemd (LimitNOFILE=) and Docker (--ulimit) set both to one
    value, so the hard one often has to be raised, too.
    """
    limits, shown = [each.open_files or 0 for each in found], " ".join(str(each.pid) for each in found)
    hard = [each.open_files_hard or proposed for each in found]
    above = min(hard) < proposed
    number = f"{proposed}:{max(proposed, *hard) if above else ''}"
    command = f"prlimit --pid {shown} --nofile={number}"
    if len(found) > 1:
        command = f"for pid in {shown}; do prlimit --pid $pid --nofile={number}; done"
    if above and proposed > (_nr_open() or proposed):
        command = f"sysctl -w fs.nr_open={proposed} && {command}"
    risks = [risk] if risk else []
    if above:
        risks.append(f"The hard limit is {min(hard)}: to raise it needs CAP_SYS_RESOURCE.")
    if proposed > FD_SETSIZE:
        risks.append(
            f"A program that uses select() writes beyond its fd_set with a descriptor of {FD_SETSIZE} or more: it "
            "crashes, or its data is damaged."
        )
    return Remedy(
        f"{what} For the next start set {_set_at_start(found[0], proposed)}.",
        command=command,
        name="RLIMIT_NOFILE",
        present=min(limits),
        proposed=proposed,
        risk=" ".join(risks) or None,
    )


def _nr_open() -> int | None:
    """No limit of any process can be more."""
    with suppress(OSError, ValueError):
        return int((PROC / "sys/fs/nr_open").read_text())
    return None


def _set_at_start(process: Process, limit: int) -> str:
    """Where a process gets its limit from when it starts."""
    if process.by_docker:
        return f"--ulimit nofile={limit} of its container"
    if process.unit and process.unit.endswith(".service") and not process.container:
        return f"LimitNOFILE={limit} in {process.unit}"
    return f"its limit where it is started: LimitNOFILE={limit} in a unit, ulimit -n {limit} in a shell"


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
