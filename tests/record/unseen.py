"""What happened to the scenarios' connections while the kernel ran no BPF program: an independent witness.

A kernel may run no program in some of its tasks, whatever a softirq does that interrupts one of them (docs/design.md,
Loss). No tool can see that, and none is at fault. But it must be known, and not by the tool's word. Two witnesses
tell: ftrace sees every event of a tracepoint, in all tasks; a program on `softirq_entry` notes the tasks in which it is
run. An event in a softirq, in a task without a note, was shown to no program.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import Loaded
from tcpscope.kernel.spec import Spec
from tests.record.watch import PORTS

SOURCE = Path(__file__).with_name("unseen.bpf.c")
CHANGES = ("inet_sock_set_state", "tcp_destroy_sock")
EVENTS = (
    *CHANGES,
    "inet_sk_error_report",
    "tcp_cong_state_set",
    "tcp_probe",
    "tcp_receive_reset",
    "tcp_retransmit_skb",
    "tcp_retransmit_synack",
)
"""The tracepoints of the tools that a softirq passes, as far as they tell the ports."""
DISCARD = "kfree_skb"
"""It tells no ports. So what happens there may belong to any scenario of that time."""
CLONE_NEWNS = 0x20000
NAME = "tcpscope-ftrace-"
"""Of mounts and of ring buffers; the number of their process follows."""
BUFFER_KIB = 65536
"""For each processor: 600,000 events, those of other programs that use these ports among them."""

_LINE = re.compile(r"\s*(.+)-(\d+)\s+\[\d+\]\s+(\S+)\s+(\d+)\.(\d+): (\w+):(.*)")
_IP = "protocol == 0x0800 || protocol == 0x86dd"
_PORT = re.compile(r"\b[sd]port=(\d+)|(?:src|dest)=\S+:(\d+)\b")


class WitnessError(Exception):
    """It cannot be told what was unseen."""


@dataclass(frozen=True)
class Unseen:
    """An event of a tracepoint that no program was run for."""

    us: float
    task: str
    event: str
    ports: tuple[int, ...]

    @property
    def is_change(self) -> bool:
        """Whether a tool that follows states has a gap there."""
        return self.event in CHANGES


def compiled(target: Path) -> None:
    multiarch = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    flags = ["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-idirafter", f"/usr/include/{multiarch}"]
    subprocess.run(["clang", *flags, "-c", SOURCE, "-o", target], check=True)


class Witness:
    """Watches while the block of `watching()` runs; `unseen` afterwards."""

    def __init__(self, program: Path) -> None:
        self._spec = Spec("unseen", program.read_bytes())
        self.unseen: list[Unseen] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        # Attached before ftrace begins and detached after it ends: each softirq that ftrace sees may run the program.
        loaded = Loaded(self._spec, Kernel())
        try:
            with _instance() as ftrace:
                _switch(ftrace, "1")
                yield
                _switch(ftrace, "0")
                _check_for_loss(ftrace)
                with (ftrace / "trace").open(errors="replace") as lines:
                    self.unseen = list(unseen(lines, loaded.memory("ran")))
        finally:
            loaded.close()

    def records(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in self.unseen]


@contextmanager
def _instance() -> Iterator[Path]:
    """A ring buffer of ftrace of one's own, in a mount that only this process and its children see."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise WitnessError(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    with ExitStack() as stack:
        root = Path(tempfile.gettempdir(), f"{NAME}{os.getpid()}")
        _sweep(root.parent)
        root.mkdir()
        stack.callback(root.rmdir)
        for command in (("mount", "--make-rslave", "/"), ("mount", "-t", "tracefs", "tracefs", root)):
            subprocess.run(command, check=True)
        stack.callback(subprocess.run, ["umount", root], check=True)
        _sweep(root / "instances")
        made = root / "instances" / root.name
        made.mkdir()
        stack.callback(made.rmdir)
        (made / "trace_clock").write_text("mono")
        (made / "buffer_size_kb").write_text(str(BUFFER_KIB))
        yield made


def _sweep(folder: Path) -> None:
    """Remove what processes have left that were killed."""
    for left in folder.glob(f"{NAME}*"):
        if not Path("/proc", left.name.removeprefix(NAME)).exists():
            with suppress(OSError):  # another one was quicker
                left.rmdir()


def _switch(ftrace: Path, value: str) -> None:
    low, _, high = PORTS.partition("-")
    within = " || ".join(f"({port} >= {low} && {port} <= {high})" for port in ("sport", "dport"))
    for event, only in (*((event, within) for event in EVENTS), (DISCARD, _IP)):
        (folder,) = ftrace.glob(f"events/*/{event}")
        (folder / "filter").write_text(only)
        (folder / "enable").write_text(value)


def _check_for_loss(ftrace: Path) -> None:
    for stats in ftrace.glob("per_cpu/cpu*/stats"):
        lost = dict(line.split(": ") for line in stats.read_text().splitlines()).get("overrun", "0")
        if int(lost):
            raise WitnessError(f"the buffer of ftrace was too small: {lost} events are lost")


def unseen(trace: Iterable[str], ran: memoryview | bytes) -> Iterator[Unseen]:
    """Of the lines of a trace those of a softirq in a task for which `ran` has no note at its number."""
    for line in trace:
        if (found := _LINE.match(line)) is None:
            continue
        comm, pid, context, seconds, fraction, event, rest = found.groups()
        if context[2] not in "sS" or ran[int(pid)]:
            continue
        ports = tuple(int(one or other) for one, other in _PORT.findall(rest))
        us = float(seconds) * 1e6 + float(f"0.{fraction}") * 1e6
        yield Unseen(us, f"{comm} ({pid})", event, ports)
