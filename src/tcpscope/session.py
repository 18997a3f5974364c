"""One probe at work: load, attach, seed, drain, and the account of what was seen."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

from tcpscope.errors import LossError
from tcpscope.filters import Filter
from tcpscope.kernel import filtering
from tcpscope.kernel._libbpf import ffi, lib
from tcpscope.kernel.features import Kernel, can_read_maps_without_privilege, drop_capabilities
from tcpscope.kernel.loaded import Loaded, Ring, Setup
from tcpscope.kernel.spec import Spec

RING_BYTES = 4 << 20
POLL_SECONDS = 0.1
_GRACE_SECONDS = 0.05  # a program runs for microseconds
READY_FD = "TCPSCOPE_READY_FD"


@dataclass
class Stats:
    """The loss contract: `seen == shown + filtered + lost`, in events. `table_full` and `missed` stand beside it.

    seen        at the hook, and wanted or not
    shown       given to the output
    filtered    not asked for, in the kernel or here; with --max-events also what came after the last one
    lost        asked for, and no room: in the ring buffer, or in an aggregate's map
    table_full  connections that found no place in a table of the kernel: their owner and times are not known
    missed      not in `seen`: runs of a program that the kernel left out because it interrupted itself, and that no
                second copy of it took; and gaps, where a connection's state has changed without any program
    """

    seen: int = 0
    shown: int = 0
    filtered: int = 0
    lost: int = 0
    table_full: int = 0
    missed: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def lossless(self) -> bool:
        return not (self.lost or self.table_full or self.missed)

    def line(self) -> str:
        """The account in one line."""
        text = f"seen {self.seen} = shown {self.shown} + filtered {self.filtered} + lost {self.lost}"
        if self.table_full:
            text += f"; {self.table_full} times a table was full"
        if self.missed:
            text += f"; at least {self.missed} times the kernel left a program out"
        return text

    def check(self, hint: str = "a narrower filter helps") -> None:
        """LossError if anything was lost."""
        if not self.lossless:
            raise LossError(f"events were lost: {self.line()}", hint)


class Session:
    """A probe in the kernel, from `with Session(...)` until its end.

    probe     name of the object in bpf/
    event     name of its event struct, or None if it sends none
    filter    what is asked for; what the kernel cannot decide of it is in `residual` and is decided by the caller
    """

    def __init__(
        self,
        probe: str,
        event: str | None,
        filter: Filter,
        *,
        constants: dict[str, Any] | None = None,
        entries: dict[str, int] | None = None,
        skip: Sequence[str] = (),
        ring_bytes: int = RING_BYTES,
        kernel: Kernel | None = None,
        debug: bool = False,
    ) -> None:
        self.spec = Spec.of(probe)
        self.kernel = kernel or Kernel()
        decided, self.residual = filtering.split(filter)
        setup = Setup(
            constants=filtering.constants(decided) | (constants or {}),
            entries=dict(entries or {}),
            event=event,
            skip=frozenset(skip),
            debug=debug,
        )
        setup.entries["events"] = ring_bytes if event else mmap.PAGESIZE
        if event:
            setup.constants["wakeup_bytes"] = ring_bytes // 4
        self.loaded = Loaded(self.spec, self.kernel, setup)
        self.stats = Stats()
        try:
            self._counters = self.loaded.memory("counters")
            self.layout = self.spec.layout(event) if event else None
            self._ring = Ring(self.loaded.map_fd("events"), self.layout.size) if self.layout else None
            if "seed" in self.loaded.hooks:  # once more: what was made while the hooks were being attached
                self.loaded.run("seed")
        except BaseException:
            self.loaded.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.loaded.close()

    def batches(self) -> Iterator[memoryview]:
        """What is in the ring now. A batch is valid until the next one is asked for."""
        assert self._ring is not None
        return self._ring.batches()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when a quarter of the ring is full."""
        return (self._ring.fd,) if self._ring else ()

    def end(self) -> None:
        """Flush what the probe holds back, detach, and return when no program runs any more: then all is final.

        Gaps are looked for while all is seen. Then nothing new is held back; the hook that forgets sockets stays until
        the flush has looked at them.
        """
        if (gap := self.loaded.hooks.get("gap")) and gap.program:
            self.loaded.run("gap")
        gaps = self.counters()["unseen"]
        if "flush" in self.loaded.hooks:
            self.loaded.detach("connected__fexit", "connected__syscall", "state", "state_again")
            wait_for_programs()
            self.loaded.run("flush")
        self.loaded.detach()
        wait_for_programs()
        hooks = self.loaded.hooks
        again = {hook.program for hook in hooks.values() if hook.program and hook.program.again}
        missed = {name: missed for name, (*_, missed) in self.loaded.program_info().items()}
        self._missed = missed_runs(missed, {name for program in again for name in (program.first, program.name)}) + gaps

    _missed = 0

    def account(self) -> Stats:
        """The statistics so far: what was counted in the kernel, and `shown`, which the caller counts in `stats`."""
        totals = self.counters()
        return Stats(
            seen=totals["seen"] + self.stats.seen,
            shown=self.stats.shown,
            filtered=totals["filtered"] + self.stats.filtered,
            lost=totals["lost"] + self.stats.lost,
            table_full=totals["table_full"],
            missed=self._missed,
        )

    def counters(self) -> dict[str, int]:
        """`struct counters` of output.bpf.h, over all processors."""
        names = ("seen", "filtered", "lost", "table_full", "rescued", "unseen")
        words = self._counters.cast("Q")
        return {name: sum(words[at::8]) for at, name in enumerate(names)}


@contextmanager
def closed_on_error(session: Session) -> Iterator[Session]:
    """The session, closed if the block fails: nobody else will."""
    try:
        yield session
    except BaseException:
        session.close()
        raise


def missed_runs(missed: Mapping[str, int], paired: Set[str]) -> int:
    """Runs that the kernel left out because the program had interrupted itself, and that nobody has made up for.

    missed  program -> runs that it was left out of; what a kernel does not count is 0
    paired  programs that have a second copy, and these

    Of a program and its second copy one is free for an event, but for a few instructions since 7.0 (once.bpf.h): what
    one of them missed says nothing, and what both did is a gap, where states are followed.
    """
    return sum(count for name, count in missed.items() if name not in paired)


def wait_for_programs() -> None:
    """Return when no BPF program runs any more that runs now."""
    if lib.tcpscope_wait_for_programs() < 0:  # not to be had with nohz_full
        time.sleep(_GRACE_SECONDS)


def monotonic_ns() -> int:
    """The kernel's clock of the time stamps (bpf_ktime_get_ns)."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def announce_ready() -> None:
    """Tell whoever asked (by the number of a file descriptor in the environment) that all hooks are attached."""
    if descriptor := os.environ.get(READY_FD):
        os.write(int(descriptor), b"ready\n")
        os.close(int(descriptor))
        del os.environ[READY_FD]


def drop_privileges(sessions: Sequence[Session], keep: Sequence[str] = ()) -> tuple[str, ...]:
    """Give up all capabilities; returns those kept: `keep`, and CAP_BPF where maps cannot be read without it."""
    needed = tuple(keep)
    for session in sessions:
        key, value = ffi.new("uint32_t *"), ffi.new("char[]", session.spec.section_size(".bss"))
        if not can_read_maps_without_privilege(session.loaded.map_fd(".bss"), key, value):
            needed = (*needed, "CAP_BPF")
            break
    drop_capabilities(needed)
    return needed
