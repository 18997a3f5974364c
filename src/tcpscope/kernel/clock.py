"""The clock of the kernel's programs (bpf_ktime_get_ns()): CLOCK_MONOTONIC of the first time namespace."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

_FIRST = "time:[4026531834]"  # PROC_TIME_INIT_INO, include/linux/proc_ns.h


def monotonic_ns() -> int:
    """Nanoseconds of that clock, whatever time namespace this process is in."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) - _offset_ns()


@cache
def _offset_ns() -> int:
    return offset_ns()


def offset_ns(process: Path = Path("/proc/self")) -> int:
    """By how much CLOCK_MONOTONIC of a process is ahead of the first namespace's (time_namespaces(7)).

    The file has the offsets that the process's children get. Those of the process are the same, unless it has called
    unshare() since it was started.
    """
    try:
        if str((process / "ns/time").readlink()) == _FIRST:
            return 0
        lines = (process / "timens_offsets").read_text().splitlines()
    except OSError:
        return 0  # before 5.6 there are no time namespaces
    offsets = {name: int(seconds) * 1_000_000_000 + int(ns) for name, seconds, ns in map(str.split, lines)}
    return offsets["monotonic"]
