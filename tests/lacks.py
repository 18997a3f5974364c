"""What the running kernel lacks, so that a test expects something else: asked of the kernel, not of what is tested."""

from __future__ import annotations

import gzip
import platform
from collections.abc import Collection
from pathlib import Path

from tcpscope.kernel.features import Answer, Kernel
from tcpscope.kernel.spec import Program

REFUSED_WITHOUT = {"congestion": "tcp_cong_state_set"}
"""A probe -> the tracepoint without which its tool is refused: nothing else would show all that it counts."""


def is_refused(probe: str, kernel: Kernel) -> bool:
    tracepoint = REFUSED_WITHOUT.get(probe)
    return bool(tracepoint) and not kernel.has_typedef(f"btf_trace_{tracepoint}")


def functions_cannot_be_hooked() -> bool:
    kernel = Kernel()
    return not kernel.fentry and not kernel.kprobe


def refusals_cannot_be_seen() -> bool:
    """kfree_skb has rx_sk, and tells a refusal without functions, since this function came (6.11)."""
    return functions_cannot_be_hooked() and Kernel().parameters("sk_skb_reason_drop") is None


FUNCTIONS = ("fentry", "fexit", "kprobe", "kretprobe")
"""For `pretend()`: functions cannot be hooked."""


def pretend(lacks: Collection[str]) -> None:
    """From now on this process takes the kernel for one without these kinds of programs, or without what they hook."""
    can = Kernel.can

    def less(kernel: Kernel, program: Program) -> Answer:
        there = not {program.type, program.target} & {*lacks}
        return can(kernel, program) if there else Answer(False, "the test goes without it")

    Kernel.can = less  # type: ignore[method-assign]


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
