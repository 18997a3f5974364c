"""One probe at work: load, attach, seed, drain, and the account of what was seen."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, ClassVar

from tcpscope.errors import LossError
from tcpscope.filters import Filter
from tcpscope.kernel import compiled_filter
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
                second copy of it took; and transitions of connections that no program saw
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
    owners    whether a probe that asks for the owners of sockets needs them in this run
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
        owners: bool = True,
        ring_bytes: int = RING_BYTES,
        kernel: Kernel | None = None,
        debug: bool = False,
    ) -> None:
        self.spec = Spec.of(probe)
        self.kernel = kernel or Kernel()
        decided, self.residual = compiled_filter.split(filter)
        setup = Setup(
            constants=compiled_filter.constants(decided) | (constants or {}),
            entries=dict(entries or {}),
            skip=frozenset(skip),
            debug=debug,
        )
        setup.entries["events"] = ring_bytes if event else mmap.PAGESIZE
        if event:
            setup.constants["wakeup_bytes"] = ring_bytes // 4
        self.owners: Owners | None = None
        if self.spec.shared:
            if owners:
                self.owners = Owners.share(filter, self.kernel, debug)
                setup.shared = {name: self.owners.loaded.map_fd(name) for name in self.spec.shared}
            else:
                setup.entries |= dict.fromkeys(self.spec.shared, 1)
        self.stats = Stats()
        try:
            self.loaded = Loaded(self.spec, self.kernel, setup)
        except BaseException:
            self._release()
            raise
        try:
            self._counters = Counters(self.loaded)
            self.layout = self.spec.layout(event) if event else None
            self._ring = Ring(self.loaded.map_fd("events"), self.layout.size) if self.layout else None
            self.loaded.run_role("seeds")  # once more: what was made while the hooks were being attached
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.loaded.close()
        self._release()

    def _release(self) -> None:
        if self.owners and not self._released:
            self._released = True
            self.owners.release()

    _released = False

    @property
    def notes(self) -> list[str]:
        """What the user should know of its objects, a line each."""
        return [*self.loaded.notes, *(self.owners.loaded.notes if self.owners else ())]

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

        Nothing new is held back then; what forgets sockets stays attached until the flush has looked at them.
        """
        if self.spec.role("flushes"):
            self.loaded.detach(*self.spec.role("delays"))
            wait_for_programs()
            self.loaded.run_role("flushes")
        self.loaded.detach()
        wait_for_programs()
        self._missed = missed_runs(self.loaded)

    _missed = 0

    def account(self) -> Stats:
        """The statistics so far: what was counted in the kernel, and `shown`, which the caller counts in `stats`.

        What `owners` lacks is not in it: several sessions may share that.
        """
        totals = self.counters()
        return Stats(
            seen=totals["seen"] + self.stats.seen,
            shown=self.stats.shown,
            filtered=totals["filtered"] + self.stats.filtered,
            lost=totals["lost"] + self.stats.lost,
            table_full=totals["table_full"],
            missed=totals["missed"] + self._missed,
        )

    def counters(self) -> dict[str, int]:
        """`struct counters` of output.bpf.h, over all processors."""
        return self._counters.read()


class Counters:
    """`struct counters` of output.bpf.h, in an object that is loaded."""

    _NAMES = ("seen", "filtered", "lost", "table_full", "rescued", "missed")

    def __init__(self, loaded: Loaded) -> None:
        self._words = loaded.memory("counters").cast("Q")

    def read(self) -> dict[str, int]:
        """Over all processors."""
        return {name: sum(self._words[at::8]) for at, name in enumerate(self._NAMES)}


class Owners:
    """Whose each socket is: the object `owner`, loaded once for all sessions of this process that ask for it.

    Which sockets have a place in its table depends on the namespace and the family of the filter, and what is known of
    cgroups on its cgroup: sessions that differ in one of these have another one.
    """

    _shared: ClassVar[dict[tuple[Any, ...], Owners]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, key: tuple[Any, ...], loaded: Loaded) -> None:
        self.loaded = loaded
        self._key = key
        self._users = 0
        self._counters = Counters(loaded)

    @classmethod
    def share(cls, filter: Filter, kernel: Kernel, debug: bool = False) -> Owners:
        """Those for this filter, until `release()`."""
        key = (filter.netns, filter.family, filter.cgroup)
        with cls._lock:
            found = cls._shared.get(key)
            if found is None:
                wanted = Filter(netns=filter.netns, family=filter.family, cgroup=filter.cgroup)
                setup = Setup(
                    constants=compiled_filter.constants(wanted), entries={"events": mmap.PAGESIZE}, debug=debug
                )
                found = cls._shared[key] = cls(key, Loaded(Spec.of("owner"), kernel, setup))
                found.loaded.run_role("seeds")
            found._users += 1
            return found

    def release(self) -> None:
        """One user less; the last one unloads it."""
        with self._lock:
            self._users -= 1
            if not self._users:
                del self._shared[self._key]
                self._last = self.account()
                self.loaded.close()

    _last: Stats | None = None

    def account(self) -> Stats:
        """What it lacks: `table_full` and `missed`."""
        return self._last or Stats(table_full=self._counters.read()["table_full"], missed=missed_runs(self.loaded))


@contextmanager
def closed_on_error(session: Session) -> Iterator[Session]:
    """The session, closed if the block fails: nobody else will."""
    try:
        yield session
    except BaseException:
        session.close()
        raise


def missed_runs(loaded: Loaded) -> int:
    """Runs that the kernel skipped because the program had interrupted itself, and that nobody has made up for.

    Of a program and its second copy one is free for an event, but for a few instructions since 7.0 (recursion.bpf.h).
    What one of them missed says nothing; what both did is a missed transition, where transitions are followed. What a
    kernel does not count is 0.
    """
    again = [hook.program for hook in loaded.hooks.values() if hook.program and hook.program.again]
    paired = {name for program in again for name in (program.first, program.name)}
    return sum(missed for name, (*_, missed) in loaded.program_info().items() if name not in paired)


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
