"""Child processes that do not outlive the lab, however it ends."""

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
    """`subprocess.Popen`, killed by the kernel when the thread that calls this has ended."""
    parent = os.getpid()
    return subprocess.Popen(argv, preexec_fn=lambda: follow(parent), **options)


def follow(parent: int) -> None:
    """Let the kernel kill this process, just forked, with its parent. Nothing here may import or take a lock."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
