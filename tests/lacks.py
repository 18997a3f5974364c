"""What the running kernel lacks, so that a test expects something else: asked of the kernel, not of what is tested."""

from __future__ import annotations

import gzip
import platform
from pathlib import Path

from tcpscope.kernel.features import Kernel

REFUSED_WITHOUT = {"congestion": "tcp_cong_state_set"}
"""A probe -> the tracepoint without which its tool is refused: nothing else would show all that it counts."""


def is_refused(probe: str, kernel: Kernel) -> bool:
    tracepoint = REFUSED_WITHOUT.get(probe)
    return bool(tracepoint) and not kernel.has_typedef(f"btf_trace_{tracepoint}")


def functions_cannot_be_hooked() -> bool:
    kernel = Kernel()
    return not kernel.fentry and not kernel.kprobe


def no_netem() -> bool:
    return built_without("NET_SCH_NETEM", "sch_netem")


def built_without(option: str, module: str) -> bool:
    """By the kernel's configuration, or if that is not there by its modules."""
    config = Path("/proc/config.gz")
    if config.exists():
        lines = gzip.decompress(config.read_bytes()).decode().splitlines()
        return not any(line.startswith(f"CONFIG_{option}=") for line in lines)
    modules = Path("/lib/modules", platform.release())
    return not any(module in (modules / name).read_text() for name in ("modules.dep", "modules.builtin"))
