"""A session: one probe in the kernel, from its start to its account."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from tcpscope.errors import LossError, UsageError
from tcpscope.filters import Filter
from tcpscope.kernel import compiled_filter, netns, pidns
from tcpscope.kernel._libbpf import ffi, lib
from tcpscope.kernel.features import Kernel, can_read_maps_without_privilege, drop_capabilities
from tcpscope.kernel.loaded import Loaded, Setup
from tcpscope.kernel.ring import Ring
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.walk import Walk, Walked
from tcpscope.schema import Layout

RING_BYTES, RING_BYTES_AT_MOST = 4 << 20, 1 << 30
POLL_SECONDS = 0.1
_GRACE_SECONDS = 0.05  # longer than any program runs
READY_FD = "TCPSCOPE_READY_FD"
_SEED = "seed"  # the iterator over open files, of those with the role "seeds"
_NO_PLACE = {
    errno.E2BIG: "it holds as many sockets as it has room for",
    errno.ENOMEM: "the kernel had no memory for an entry at that moment",
}


@dataclass
class Stats:
    """The account of a run. The loss contract: `seen == shown + filtered + limited + lost`, in events.

    seen        events at the hook, before any filter
    shown       events that the reader got
    filtered    events that the filter excludes, in the kernel or here; with --max-events also those after the last one
    lost        events that the filter wants, for which the ring buffer or an aggregate had no room, or which the reader
                of standard output did not take
    limited     events that the filter wants, but more than --rate allows in their second
    table_full  connections that found no place in a table of the kernel: their owner and times are not known
    missed      not in `seen`: transitions that no program saw, runs that the kernel skipped (recursion) of programs
                that have no second copy, and packets of which a program cannot tell what happened; a lower bound
    """

    seen: int = 0
    shown: int = 0
    filtered: int = 0
    lost: int = 0
    limited: int = 0
    table_full: int = 0
    missed: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def record(self) -> dict[str, int | None]:
        """The account as a record; None is not known."""
        return asdict(self)

    unknown: ClassVar[str] = ""
    """What would help, if it is not known what was lost. Empty: it is known."""

    @property
    def lossless(self) -> bool:
        """Whether `lost`, `table_full` and `missed` are zero."""
        return not (self.lost or self.table_full or self.missed)

    def line(self) -> str:
        """The account in one line."""
        limited = f" + over --rate {self.limited}" if self.limited else ""
        text = f"seen {self.seen} = shown {self.shown} + filtered {self.filtered}{limited} + lost {self.lost}"
        if self.table_full:
            text += f"; {self.table_full} times a table was full"
        if self.missed:
            text += f"; at least {self.missed} times a program was skipped, or could not tell"
        return text

    def check(self, hint: str = "a narrower filter helps") -> None:
        """Raise LossError, with `hint`, unless the account is lossless."""
        if self.unknown:
            raise LossError(f"what was lost is not known: {self.line()}", self.unknown)
        if not self.lossless:
            raise LossError(f"events were lost: {self.line()}", hint)


class Session:
    """A probe in the kernel, from its construction until `close()`, or the end of the `with` block.

    probe       name of the object in bpf/, or an object; it need not have our headers
    event       its event struct, by name or as a layout; None: it sends no events in this run, or the caller reads them
    filter      the filter of the run, which the kernel decides
    constants   values of read-only globals of the object, by name
    entries     sizes of maps, by name
    key_bytes   sizes of the keys of maps, by name, if they are shorter than those of the object
    keys        keys of maps, by name: those of a set, or those of another map with their values
    stacks      values of stacks, by name
    skip        hooks that this run does not need
    owners      whether this run needs the owners of sockets, if the probe uses the object `owner`
    ring_bytes  size of the ring buffer, a power of two
    before      is called with the loaded object before a program is attached

    Raises the errors of `Loaded`.
    """

    def __init__(
        self,
        probe: str | Path | Spec,
        event: str | Layout | None,
        filter: Filter,
        *,
        constants: dict[str, Any] | None = None,
        entries: dict[str, int] | None = None,
        key_bytes: dict[str, int] | None = None,
        keys: dict[str, Sequence[bytes] | Mapping[bytes, bytes]] | None = None,
        stacks: dict[str, Sequence[bytes]] | None = None,
        skip: Sequence[str] = (),
        owners: bool = True,
        ring_bytes: int = RING_BYTES,
        before: Callable[[Loaded], None] | None = None,
        kernel: Kernel | None = None,
        debug: bool = False,
    ) -> None:
        self.spec = probe if isinstance(probe, Spec) else Spec.of(probe)
        self.kernel = kernel or Kernel()
        setup = Setup(
            constants=(compiled_filter.constants(filter) if filters(self.spec) else {}) | (constants or {}),
            entries=dict(entries or {}),
            key_bytes=dict(key_bytes or {}),
            keys=({compiled_filter.LISTS: compiled_filter.keys(filter)} if filters(self.spec) else {}) | (keys or {}),
            stacks=stacks or {},
            skip=frozenset(skip),
            seed_once=Walk.is_shared(),
            before=before,
            debug=debug,
        )
        if self.spec.counts:
            setup.entries["events"] = ring_bytes if event else mmap.PAGESIZE
            if event:
                setup.constants["wakeup_bytes"] = ring_bytes // 4
        self.owners: Owners | None = None
        if self.spec.shared and owners:
            self.owners = Owners.share(filter, self.kernel, debug)
        else:
            setup.entries |= dict.fromkeys(self.spec.shared, 1)
        self.stats = Stats()
        self._held = ExitStack()
        try:
            self._held.enter_context(netns.held(filter.netns))  # so that the number means no other one later
            layout = self.spec.layout(event) if isinstance(event, str) else event
            self.layout = layout.named(self.kernel.enumerators) if layout else None
            if self.owners:
                self._before = self.owners.before()
                setup.shared = {name: self.owners.loaded.map_fd(name) for name in self.spec.shared}
            self.loaded = Loaded(self.spec, self.kernel, setup)
        except BaseException:
            self._release()
            raise
        finally:
            self.kernel.release()
        try:
            self._counters = Counters(self.loaded)
            self._ring = Ring(self.loaded.map_fd("events"), self.layout.size) if self.layout else None
            self._held_back = self.loaded.memory("holds").cast("Q") if self.holds_back else None
            if _SEED in self.spec.role("seeds"):
                Walk.look(self.loaded, _SEED, partial(self._seeded, Walk.is_shared()))
            else:
                self._seed_others()
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
        """Unload the probe, and stop using the object `owner`. May be called twice."""
        self.loaded.close()
        if self._ring:
            self._ring.close()
        self._release()

    def _release(self) -> None:
        self._held.close()
        if self.owners and not self._released:
            self._released = True
            self._owned = self._of_owners()
            self.owners.release()

    seeded: Walked | None = None
    """What the seed has written, if it was run with that of others."""

    def _seeded(self, shared: bool, walked: Walked) -> None:
        self.seeded = walked if shared else None
        self._seed_others()

    def _seed_others(self) -> None:
        """Run the seeds that look at something else than open files."""
        self.loaded.seed_counts(True)
        self.loaded.run_role("seeds", but=_SEED)
        self.loaded.seed_counts(False)

    _ring: Ring | None = None
    _held_back: memoryview | None = None
    _released = False
    _before = Stats()
    _owned: Stats | None = None

    def _of_owners(self) -> Stats:
        """What the table of owners lacked during this session: final after the end."""
        if self.owners is None or self._owned is not None:
            return self._owned or Stats()
        now, before = self.owners.account(), self._before
        return Stats(table_full=now.table_full - before.table_full, missed=now.missed - before.missed)

    @property
    def notes(self) -> list[str]:
        """What the user should know about the loaded objects, one line each."""
        here = [pidns.NOTE] if pidns.inner() else []
        return [*here, *self.loaded.notes, *(self.owners.loaded.notes if self.owners else ())]

    @property
    def why_full(self) -> list[str]:
        """Why a socket found no place in a table, one line each. Nothing if all did, or if only the seed found none."""
        objects = [self.loaded, *([self.owners.loaded] if self.owners else [])] if self.spec.counts else []
        errors = dict.fromkeys(int.from_bytes(each.memory("table_error")[:4], sys.byteorder) for each in objects)
        return [f"no place in a table: {_NO_PLACE.get(error) or os.strerror(error)}" for error in errors if error]

    def batches(self) -> Iterator[memoryview]:
        """The events that are in the ring now, as bytes. A batch is valid until the next one is asked for."""
        assert self._ring is not None
        return self._ring.batches()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """File descriptors for poll(): one becomes readable when a quarter of the ring is full."""
        return (self._ring.fd,) if self._ring else ()

    @property
    def holds_back(self) -> bool:
        """Whether the object has pending events while the run lasts: its variable `holds` is their number."""
        return "holds" in self.spec.variables

    def release_held(self) -> None:
        """Run the iterator that sends the pending events whose time is over. An object without `holds` has none."""
        if self._held_back and self._held_back[0]:
            self.loaded.run_role("flushes")

    def end(self) -> None:
        """Flush pending events, detach all programs, and wait until none runs: then the counters are final.

        First it detaches what makes events pending. Programs that delete entries stay attached until the flush is over:
        for what they find then, nothing counts as missed.
        """
        if self.spec.counts:
            self.loaded.memory("ending")[0] = True
        if self.spec.role("flushes"):
            self.loaded.detach(*self.spec.role("delays"))
            wait_for_programs()
            self.loaded.run_role("flushes")
        self.loaded.detach()
        wait_for_programs()
        self._missed = missed_runs(self.loaded)
        self._owned = self._of_owners()

    _missed = 0

    def account(self) -> Stats:
        """The account so far: the kernel's counters, and what the caller has counted in `stats`."""
        totals = self.counters()
        return (
            Stats(
                seen=totals["seen"] + self.stats.seen,
                shown=self.stats.shown,
                filtered=totals["filtered"] + self.stats.filtered,
                lost=totals["lost"] + self.stats.lost,
                limited=totals["limited"] + self.stats.limited,
                table_full=totals["table_full"],
                missed=totals["missed"] + self._missed,
            )
            + self._of_owners()
        )

    def counters(self) -> dict[str, int]:
        """`struct counters` of output.bpf.h: counter -> its sum over all processors."""
        return self._counters.read()


def filters(spec: Spec) -> bool:
    """Whether its programs decide the filter (filter.bpf.h)."""
    return "filter_lport" in spec.variables and compiled_filter.LISTS in spec.maps


class Counters:
    """`struct counters` of output.bpf.h, of a loaded object. Zeros of one that does not count."""

    _NAMES = ("seen", "filtered", "lost", "table_full", "rescued", "missed", "limited")

    def __init__(self, loaded: Loaded) -> None:
        self._words = loaded.memory("counters").cast("Q") if loaded.spec.counts else memoryview(bytes(64)).cast("Q")

    def read(self) -> dict[str, int]:
        """Counter -> its sum over all processors."""
        return {name: sum(self._words[at::8]) for at, name in enumerate(self._NAMES)}


class Owners:
    """The owners of sockets: the object `owner`, loaded once for all sessions of this process that use it.

    The namespace and the family of the filter decide which sockets have an entry, and its cgroup what an entry says of
    cgroups; in a PID namespace also its PID. Sessions whose filters differ in one of these use another `Owners`.
    """

    _shared: ClassVar[dict[Filter, Owners]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, key: Filter, loaded: Loaded) -> None:
        self.loaded = loaded
        self._key = key
        self._users = 0
        self._counters = Counters(loaded)
        self._seeded = 0

    def _note_seeded(self, walked: Walked) -> None:
        self._seeded = self._counters.read()["table_full"]

    @classmethod
    def share(cls, filter: Filter, kernel: Kernel, debug: bool = False) -> Owners:
        """The `Owners` for this filter. Each call needs one `release()`. Raises the errors of `Loaded`."""
        pid = filter.pid if pidns.inner() else ()
        key = Filter(pid=pid, netns=filter.netns, family=filter.family, cgroup=filter.cgroup)
        with cls._lock:
            found = cls._shared.get(key) or cls._load(key, kernel, debug)
            cls._shared[key] = found
            found._users += 1
            return found

    @classmethod
    def _load(cls, key: Filter, kernel: Kernel, debug: bool) -> Owners:
        setup = Setup(
            constants=compiled_filter.constants(key),
            entries={"events": mmap.PAGESIZE},
            keys={compiled_filter.LISTS: compiled_filter.keys(key)},
            seed_once=True,
            debug=debug,
        )
        loaded = Loaded(Spec.of("owner"), kernel, setup)
        try:
            found = cls(key, loaded)
            Walk.look(loaded, _SEED, found._note_seeded)
            return found
        except BaseException:
            loaded.close()
            raise

    def release(self) -> None:
        """Stop using it. The last user unloads the object."""
        with self._lock:
            self._users -= 1
            if not self._users:
                del self._shared[self._key]
                self.loaded.close()

    def before(self) -> Stats:
        """The account of what the next session does not see: not of older sockets without a place, which it sees."""
        now = self.account()
        return Stats(table_full=now.table_full - self._seeded, missed=now.missed)

    def account(self) -> Stats:
        """Its `table_full` and `missed` so far; all other fields are zero. Only for who has not released it."""
        return Stats(table_full=self._counters.read()["table_full"], missed=missed_runs(self.loaded))


@contextmanager
def closed_on_error(session: Session) -> Iterator[Session]:
    """The session. If the block raises, the session is closed."""
    try:
        yield session
    except BaseException:
        session.close()
        raise


def missed_runs(loaded: Loaded) -> int:
    """Runs that the kernel skipped (recursion), of programs that have no second copy.

    If the kernel skips one of two copies, the other handles the event (recursion.bpf.h). If it skips both, a transition
    is missed, and an object that follows transitions counts it. A kernel that counts no skipped runs adds 0.
    """
    again = [hook.program for hook in loaded.hooks.values() if hook.program and hook.program.again]
    paired = {name for program in again for name in (program.first, program.name)}
    return sum(missed for name, (*_, missed) in loaded.program_info().items() if name not in paired)


def wait_for_programs() -> None:
    """Wait until all BPF programs that run now have ended."""
    if lib.tcpscope_wait_for_programs() < 0:  # the kernel refuses membarrier() with nohz_full
        time.sleep(_GRACE_SECONDS)


def announce_ready() -> None:
    """Write "ready" to the file descriptor that the environment names, if it names one: all hooks are attached.

    Raises UsageError if that is no number of a descriptor to which we can write.
    """
    if text := os.environ.pop(READY_FD, None):
        try:
            descriptor = int(text)
            os.write(descriptor, b"ready\n")
            os.close(descriptor)
        except (ValueError, OverflowError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no number of a descriptor"
            raise UsageError(f"{READY_FD}={text}: {reason}", "give the number of an open descriptor") from None


def drop_privileges(sessions: Sequence[Session], keep: Sequence[str] = ()) -> tuple[str, ...]:
    """Drop all capabilities but `keep`, and CAP_BPF if this kernel needs it to read maps. Returns those it kept."""
    needed = tuple(keep)
    for session in sessions:
        spec = session.spec
        table, size = (".bss", spec.section_size(".bss")) if spec.counts else (next(iter(spec.channels)), 8)
        key, value = ffi.new("uint32_t *"), ffi.new("char[]", size)
        if not can_read_maps_without_privilege(session.loaded.map_fd(table), key, value):
            needed = (*needed, "CAP_BPF")
            break
    drop_capabilities(needed)
    return needed
