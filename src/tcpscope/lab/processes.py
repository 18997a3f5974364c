"""Child processes that die with the lab, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

PR_SET_PDEATHSIG = 1

_prctl = ctypes.CDLL(None).prctl


def start(argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen`, but the kernel kills the child when the calling thread ends."""
    parent = os.getpid()
    return subprocess.Popen(argv, preexec_fn=lambda: follow(parent), **options)


def follow(parent: int) -> None:
    """Ask the kernel to kill this forked process with its parent. This function must not import or take a lock."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
