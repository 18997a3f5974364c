"""The PID namespace of this process (pid_namespaces(7)).

A process has a PID in its own namespace and in each one above. Rows show the PID of the first namespace. `--pid` takes
a PID of the namespace where the tool runs.
"""

from __future__ import annotations

import os
from pathlib import Path

FIRST = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h

NOTE = (
    "rows have the PIDs of the first PID namespace, and this is another one. Processes outside of it cannot be looked "
    "for: a socket of theirs that is older than the tool has no owner, and such a listener is not seen by queue"
)


def inner(proc: Path = Path("/proc")) -> int:
    """The inode number of our namespace; 0 if it is the first one, or /proc does not tell."""
    try:
        inode = int((proc / "self/ns/pid").readlink().name[len("pid:[") : -1])
    except (OSError, ValueError):
        return 0
    return 0 if inode == FIRST else inode


def proc_is_ours(proc: Path = Path("/proc")) -> bool:
    """Whether /proc has the PIDs of our namespace. It has those of the namespace where it was mounted."""
    try:
        return (proc / "self").readlink().name == str(os.getpid())
    except OSError:
        return False
