"""An object in the kernel: programs attached in the best way that this kernel has, maps, counters.

The loader first asks the kernel which hooks it has (features.py). It then loads and attaches the best program of each
hook. If the kernel refuses one, the loader starts again with the next program of that hook.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tcpscope.errors import NotPermittedError, RefusedError, ResourceError, TcpscopeError, UnsupportedError
from tcpscope.kernel._libbpf import ffi, lib
from tcpscope.kernel.features import Kernel, has_capability, perf_event_denied, require_capabilities
from tcpscope.kernel.machine import possible_cpus, sockets_at_most, tcp_sockets
from tcpscope.kernel.resources import exhausted, failed, help_for
from tcpscope.kernel.ring import BATCH_BYTES
from tcpscope.kernel.spec import HASH, RINGBUF, Spec
from tcpscope.kernel.verifier import verifier_lines, verifier_summary
from tcpscope.kernel.ways import plan, plan_refusals
from tcpscope.schema import Layout

PRIVILEGES = ("CAP_BPF", "CAP_PERFMON")
LEAST_BATCH = 64  # entries of a map
# The largest that kernels before 5.18 take (bpf_verifier_log_attr_valid). Before 6.4 a small one loses the log's end,
# with the reason. The pages take no memory until the kernel refuses a program: only then libbpf passes the buffer.
# Since bpf_preempt_disable() (6.10), until "bpf: Summarize sleepable global subprogs" (6.15).
_NO_GLOBAL_FUNCTIONS = "global function calls are not allowed with preemption disabled"
_VERIFIER_BYTES = 0xFFFFFFFF >> 8
_PER_SOCKET = 65536  # in output.bpf.h
_LEAST_ENTRIES = 1024
_CLOCK_MONOTONIC_COARSE = 6  # it ticks with the jiffies: hrtimer_get_res() returns KTIME_LOW_RES
_NO_PREALLOC, _MMAPABLE = 1, 1 << 10  # BPF_F_NO_PREALLOC, BPF_F_MMAPABLE
_NOEXIST = 1  # BPF_NOEXIST
_NEXT_WALKER = "next_walker"  # connection.bpf.h


@dataclass
class Setup:
    """How an object is to be loaded.

    constants  values of read-only globals, by name. The loader sets `hooked_HOOK` and `possible_cpus` itself
    entries    sizes of maps, by name
    key_bytes  sizes of the keys of maps, by name, if they are shorter than those that the object has
    keys       keys of maps, by name, inserted before a program is attached. Of a set (its values are one byte) a
               sequence, of other maps with their values
    stacks     values of stacks, by name, pushed before a program is attached; the last one is the top
    skip       hooks that this run does not need
    shared     maps of other objects that this object uses -> their file descriptors
    seed_once  do not seed before the hooks are attached: nobody uses the object before it is seeded after that
    before     is called with the object before a program is attached, again if the object is loaded again
    debug      print the messages of libbpf and the verifier's log on stderr
    """

    constants: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    key_bytes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, Sequence[bytes] | Mapping[bytes, bytes]] = field(default_factory=dict)
    stacks: dict[str, Sequence[bytes]] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    shared: Mapping[str, int] = field(default_factory=dict)
    seed_once: bool = False
    before: Callable[[Loaded], None] | None = None
    debug: bool = False


class _Refused(Exception):
    """The kernel refused one program.

    `log` is the verifier's log, if the verifier refused it; `said` is the last message of libbpf.
    """

    def __init__(self, program: str, reason: str, log: str = "", said: str = "") -> None:
        super().__init__(program)
        self.program = program
        self.reason = reason
        self.log = log
        self.said = said

    @property
    def hint(self) -> str:
        """Why it was refused, in one line."""
        return verifier_summary(self.log) or self.said


class _NoMemoryError(Exception):
    """The kernel has no memory for the object. `what` has failed."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Loaded:
    """An object in the kernel, from `Loaded(spec, kernel, setup)` until `close()`.

    Raises NotPermittedError without the privileges, UnsupportedError if a hook that is not optional has no way,
    ResourceError without enough memory or file descriptors, and TcpscopeError if libbpf or the kernel cannot load it.

    hooks     hook -> how it is attached
    notes     what the user should know about it, one line each
    verifier  program that the kernel refused -> the end of the verifier's log
    """

    _static: ClassVar[bool] = False
    """Whether this kernel lets no program call a global function where preemption is disabled."""

    def __init__(self, spec: Spec, kernel: Kernel, setup: Setup | None = None) -> None:
        require_capabilities(*PRIVILEGES)
        self.spec = spec
        self._kernel = kernel
        self._setup = setup or Setup()
        self._object: Any = ffi.NULL
        self._links: dict[str, Any] = {}
        self._programs: dict[str, Any] = {}
        self._missed: dict[str, int] = {}
        self._data = ffi.from_buffer(spec.data)
        self.verifier: dict[str, str] = {}
        refused = self._refused = plan_refusals(spec, kernel)
        lacking = frozenset(refused)
        self._allocates, self._shrinks = kernel.allocates_in_programs, False
        wanted = self._entries = sockets_at_most(tcp_sockets(), self._allocates)
        self.notes: list[str] = []
        while True:
            self.hooks = plan(spec, refused, self._setup.skip)
            for hook in self.hooks.values():
                if hook.program is None and hook.without is None:
                    raise UnsupportedError(
                        f"this kernel offers no hook for '{self._called(hook.name)}' of the probe '{spec.name}'",
                        "; ".join(dict.fromkeys(hook.refused.values())),
                    )
            try:
                self._load()
                if self._setup.before:
                    self._setup.before(self)
                self._attach()
                if self._entries < wanted:
                    self.notes.append(
                        f"no memory for {wanted} sockets in the tables of '{spec.name}', "
                        f"there is room for {self._entries}; further ones are counted as table_full"
                    )
                self.notes += self._left_out(refused.keys() - lacking)
                return
            except _NoMemoryError as error:
                self.close()
                if not self._shrinks or self._entries // 2 < _LEAST_ENTRIES:
                    raise failed(errno.ENOMEM, error.what) from None
                self._entries //= 2
            except _Refused as refusal:
                self.close()
                if not self._static and _NO_GLOBAL_FUNCTIONS in refusal.log:
                    Loaded._static = True
                    continue
                if refusal.program not in spec_names(spec) or refusal.program in refused:
                    raise TcpscopeError(f"{spec.name}: {refusal.reason}", refusal.hint) from None
                if self._last_way(refusal.program, refused):
                    raise self._final(refusal) from None
                last = verifier_lines(refusal.log)[-1:]
                refused[refusal.program] = ": ".join([refusal.reason, *last])
                if last:
                    self.verifier[refusal.program] = verifier_summary(refusal.log)
            except BaseException:
                self.close()
                raise

    def _called(self, program: str) -> str:
        """The name of a program, or of the function that it was aimed at."""
        return self.spec.aims.get(program, program)

    def _left_out(self, surprising: set[str]) -> list[str]:
        """A line for each hook that has no program because the kernel refused one that it should take.

        That is one that it has all for (`surprising`), or one that the user has asked for.
        """
        lines = []
        surprising = surprising | (self._refused.keys() & self.spec.aims.keys())
        for name, ways in self.spec.hooks.items():
            reason = next((self._refused[way.name] for way in ways if way.name in surprising), "")
            attached = name in self.hooks and self.hooks[name].program
            if reason and not attached and (name in self.hooks or ways[0].again):
                lost = f"not known without it: {ways[0].without}" if ways[0].without else "events may be missed"
                lines.append(f"'{self._called(name)}' of '{self.spec.name}' is left out, {reason}; {lost}")
        return lines

    def _last_way(self, program: str, refused: dict[str, str]) -> bool:
        ways = next(ways for ways in self.spec.hooks.values() if program in (way.name for way in ways))
        needed = ways[0].without is None and not ways[0].again
        return needed and all(way.name in refused or way.name == program for way in ways)

    def _final(self, refusal: _Refused) -> TcpscopeError:
        what = f"{self.spec.name}: program '{self._called(refusal.program)}': {refusal.reason}"
        return RefusedError(what, refusal.hint, refusal.program, refusal.log, refusal.said)

    def _load(self) -> None:
        lib.tcpscope_log_start(self._setup.debug)
        programs = [hook.program for hook in self.hooks.values() if hook.program]
        module = next((program.module for program in programs if self._kernel.is_in_module(program)), "")
        with _types_file(self.spec.name) as types:
            name, btf = os.fsencode(self.spec.name), self._kernel.btf_with(module)
            self._object = lib.tcpscope_open(self._data, len(self.spec.data), name, btf, types.fileno())
            if self._object == ffi.NULL:
                error, what = ffi.errno, f"{self.spec.name}: not a BPF object"
                raise exhausted(error, what) or TcpscopeError(f"{what}: {os.strerror(error)}")
            self._prepare_and_load()

    def _prepare_and_load(self) -> None:
        if self._static:
            lib.tcpscope_make_static(self._object)
        if not has_capability("CAP_SYS_ADMIN"):
            lib.tcpscope_leave_modules(self._object)
        chosen = {hook.program.name: hook for hook in self.hooks.values() if hook.program}
        verifier = ffi.from_buffer(mmap.mmap(-1, _VERIFIER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        program = lib.bpf_object__next_program(self._object, ffi.NULL)
        while program != ffi.NULL:
            name = ffi.string(lib.bpf_program__name(program)).decode()
            lib.bpf_program__set_autoload(program, name in chosen)
            if name in chosen:
                self._aim(name, program)
                lib.bpf_program__set_log_buf(program, verifier, _VERIFIER_BYTES)
                self._programs[name] = program
            program = lib.bpf_object__next_program(self._object, program)
        self._size_tables()
        sizes = {name: len(keys) for name, keys in self._setup.keys.items() if keys}
        for name, entries in (self._setup.entries | sizes).items():
            lib.bpf_map__set_max_entries(self._map(name), entries)
        for name in () if self.spec.counts else self.spec.channels:
            # A type says what the events are. The kernel wants the size of the map's own values.
            lib.bpf_map__set_value_size(self._map(name), 0 if self.spec.maps[name] == RINGBUF else 4)
        for name, size in self._setup.key_bytes.items():
            lib.bpf_map__set_key_size(self._map(name), size)
        for name, descriptor in self._setup.shared.items():
            if error := lib.bpf_map__reuse_fd(self._map(name), descriptor):
                what = f"{self.spec.name}: map '{name}' cannot be shared"
                raise exhausted(-error, what) or TcpscopeError(f"{what}: {os.strerror(-error)}")
        self._write_constants()
        error = -lib.bpf_object__load(self._object)
        if not self._has_global_data():
            what = f"{self.spec.name}: libbpf could not try out the kernel, for lack of memory or open files"
            raise ResourceError(what, f"{help_for(errno.ENOMEM)}; {help_for(errno.EMFILE)}")
        if error:
            raise self._load_error(error, ffi.string(verifier).decode(errors="replace"))
        for name, keys in self._setup.keys.items():
            self._insert(name, keys)
        for name, values in self._setup.stacks.items():
            for value in values:
                self.push(name, value)

    def _aim(self, name: str, program: Any) -> None:
        """Name the function that a program hooks, if its section names none."""
        function = self.spec.aims.get(name)
        if function and (error := lib.bpf_program__set_attach_target(program, 0, function.encode())):
            raise _Refused(name, f"cannot hook {function}() ({os.strerror(-error)})")

    def push(self, name: str, value: bytes) -> None:
        """Push a value onto a stack. Raises OSError if it is full."""
        if lib.bpf_map_update_elem(self.map_fd(name), ffi.NULL, ffi.from_buffer(value), 0) < 0:
            raise failed(ffi.errno, f"{self.spec.name}: nothing can be pushed onto '{name}'")

    def value(self, name: str, key: bytes, size: int) -> bytes | None:
        """The value of a key in a hash map, of `size` bytes; None: it has none."""
        found = bytearray(size)
        if lib.bpf_map_lookup_elem(self.map_fd(name), ffi.from_buffer(key), ffi.from_buffer(found)) < 0:
            return None
        return bytes(found)

    def insert(self, name: str, key: bytes, value: bytes) -> bool:
        """Insert a new key into a hash map. False if there is such a key, or no room."""
        fd = self.map_fd(name)
        return bool(lib.bpf_map_update_elem(fd, ffi.from_buffer(key), ffi.from_buffer(value), _NOEXIST) == 0)

    def remove(self, name: str, key: bytes) -> None:
        """Delete a key from a hash map, if it is there."""
        lib.bpf_map_delete_elem(self.map_fd(name), ffi.from_buffer(key))

    def _insert(self, name: str, keys: Sequence[bytes] | Mapping[bytes, bytes]) -> None:
        entries = keys if isinstance(keys, Mapping) else dict.fromkeys(keys, b"\0")
        for key, value in entries.items():
            if lib.bpf_map_update_elem(self.map_fd(name), ffi.from_buffer(key), ffi.from_buffer(value), 0) < 0:
                error, what = ffi.errno, f"{self.spec.name}: map '{name}' cannot be filled"
                if error == errno.ENOMEM:
                    raise _NoMemoryError(what)
                raise exhausted(error, what) or TcpscopeError(f"{what}: {os.strerror(error)}")

    def _has_global_data(self) -> bool:
        """Whether libbpf has created the map .bss as one that user space can map. True if the object has no .bss.

        Once in a process libbpf tries whether the kernel has such maps (5.2, 5.5). It takes every error for a no. Each
        kernel that has ring buffers (5.8) has them.
        """
        table = lib.bpf_object__find_map_by_name(self._object, b".bss")
        if table == ffi.NULL:
            return True
        return bool(lib.bpf_map__autocreate(table) and lib.bpf_map__map_flags(table) & _MMAPABLE)

    def _size_tables(self) -> None:
        for name, type_ in self.spec.maps.items() if self.spec.counts else ():
            table = self._map(name)
            if type_ == HASH and lib.bpf_map__max_entries(table) == _PER_SOCKET:
                self._shrinks = True
                lib.bpf_map__set_max_entries(table, self._entries)
                lib.bpf_map__set_map_flags(table, _NO_PREALLOC if self._allocates else 0)

    def _write_constants(self) -> None:
        values: dict[str, Any] = {
            f"hooked_{hook.name}": hook.program is not None
            for hook in self.hooks.values()
            if f"hooked_{hook.name}" in self.spec.variables
        }
        if "possible_cpus" in self.spec.variables:
            values["possible_cpus"] = possible_cpus()
        if "jiffy_ns" in self.spec.variables:
            values["jiffy_ns"] = round(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1e9)
        values |= self._setup.constants
        size = ffi.new("size_t *")
        for name, value in values.items():
            variable = self.spec.variables[name]
            start = lib.bpf_map__initial_value(self._map(variable.section), size)
            memory = ffi.buffer(start, size[0])
            memory[variable.offset : variable.offset + variable.size] = self.spec.pack(variable.type, value)

    def _load_error(self, error: int, verifier: str) -> Exception:
        """The exception for a failed load. Only libbpf's messages name the program that the kernel refused.

        libbpf has unloaded all programs by now, and the log is empty if the kernel refused one before the verifier ran.
        """
        log = ffi.string(lib.tcpscope_log()).decode(errors="replace")
        if self._setup.debug:
            print(verifier, end="", file=sys.stderr)
        said = [line.removeprefix("libbpf: ") for line in log.splitlines() if "failed to load object" not in line]
        found = re.search(r"prog '(\w+)': (?:BPF program load failed|failed to (?:load|find|prepare))", log)
        what = f"{self.spec.name}: " + (f"program '{found[1]}' cannot be loaded" if found else "cannot be loaded")
        if error == errno.ENOMEM:
            return _NoMemoryError(what)
        if shortage := exhausted(error, what):
            return shortage
        if error == errno.EPERM and not verifier and self._locked_memory_is_limited():
            return NotPermittedError(
                f"{self.spec.name}: no memory for BPF objects within the limit of locked memory",
                "this kernel needs CAP_SYS_RESOURCE too, or a larger 'ulimit -l'",
                ("CAP_SYS_RESOURCE",),
            )
        if error == errno.EPERM and not found:
            return TcpscopeError(f"{what}: {os.strerror(error)}", "a security module, seccomp or lockdown forbids it")
        if found:
            return _Refused(found[1], f"refused by the kernel ({os.strerror(error)})", verifier, "; ".join(said[-1:]))
        return TcpscopeError(f"{what}: {os.strerror(error)}", "; ".join(said[-2:]))

    def _locked_memory_is_limited(self) -> bool:
        return not has_capability("CAP_SYS_RESOURCE") and not self._kernel.accounts_memory_by_cgroup

    def _attach(self) -> None:
        """Attach iterators and what deletes entries, seed, attach the others: their first event finds its owner."""
        chosen = {hook.program.name: hook.program for hook in self.hooks.values() if hook.program}
        forgetting = self.spec.role("forgets")
        early = [name for name in self._programs if chosen[name].type == "iter" or name in forgetting]
        for name in early:
            self.attach(name, chosen[name].over)
        if not self._setup.seed_once:
            self.run_role("seeds")
        for name in self._programs:
            if name not in early:
                self.attach(name, chosen[name].over)

    def _map(self, name: str) -> Any:
        found = lib.bpf_object__find_map_by_name(self._object, name.encode())
        if found == ffi.NULL:
            raise KeyError(name)
        return found

    def map_fd(self, name: str) -> int:
        """The file descriptor of a map."""
        fd: int = lib.bpf_map__fd(self._map(name))
        return fd

    @property
    def kernel_bytes(self) -> int:
        """Bytes of kernel memory that the maps take now, as the kernel reports them (memlock in fdinfo)."""
        found, table = 0, lib.bpf_object__next_map(self._object, ffi.NULL)
        while table != ffi.NULL:
            lines = Path(f"/proc/self/fdinfo/{lib.bpf_map__fd(table)}").read_text().splitlines()
            found += sum(int(line.split()[1]) for line in lines if line.startswith("memlock:"))
            table = lib.bpf_object__next_map(self._object, table)
        return found

    def memory(self, name: str) -> memoryview:
        """A global variable in .bss, as memory shared with the kernel. A read needs no system call and no privilege."""
        variable = self.spec.variables[name]
        mapped = self.values(variable.section, self.spec.section_size(variable.section))
        return mapped[variable.offset : variable.offset + variable.size]

    def values(self, name: str, size: int) -> memoryview:
        """The first `size` bytes of the values of an array map, as memory shared with the kernel: BPF_F_MMAPABLE."""
        try:
            return memoryview(mmap.mmap(self.map_fd(name), size))
        except OSError as error:
            raise failed(error.errno, f"{self.spec.name}: map '{name}' cannot be mapped") from None

    def iterate(self, hook: str, netns_fd: int = -1) -> Iterator[bytes]:
        """Run an iterator to its end, in the network namespace of `netns_fd` (-1: in this one). Yields its output.

        Raises OSError if the kernel cannot run it.
        """
        program = self.hooks[hook].program
        assert program is not None
        fd = lib.tcpscope_iterate(lib.bpf_link__fd(self._links[program.name]), netns_fd)
        if fd < 0:
            raise failed(-fd, f"{self.spec.name}: iterator '{hook}' cannot run")
        with os.fdopen(fd, "rb", buffering=0) as file:
            yield from pieces(file)

    def entries(self, name: str, key: Layout | int, value: Layout, take: bool = False) -> Iterator[tuple[Any, Any]]:
        """All entries of a hash map: pairs of raw rows of `key` and `value`. With `take` it removes them from the map.

        A `key` that is a number is the size of the keys, which are bytes then.

        An entry that programs insert or delete meanwhile may be among them or not. Raises OSError.
        """
        read = lib.bpf_map_lookup_and_delete_batch if take else lib.bpf_map_lookup_batch
        decode_values = value.decoder(raw=True).rows
        key_size = key if isinstance(key, int) else key.size
        decode_keys = partial(_cut, key_size) if isinstance(key, int) else key.decoder(raw=True).rows
        room = max(LEAST_BATCH, BATCH_BYTES // (key_size + value.size))
        start, position, count = ffi.NULL, ffi.new("uint32_t *"), ffi.new("uint32_t *")
        while True:
            keys, values = bytearray(key_size * room), bytearray(value.size * room)
            count[0] = room
            into = ffi.from_buffer(keys), ffi.from_buffer(values)
            error = -read(self.map_fd(name), start, position, *into, count, ffi.NULL)
            if error == errno.ENOSPC:  # one bucket has more than there is room for
                room *= 2
                continue
            if error not in (0, errno.ENOENT):
                raise failed(error, f"{self.spec.name}: map '{name}' cannot be read")
            ends = count[0] * key_size, count[0] * value.size
            yield from zip(
                decode_keys(memoryview(keys)[: ends[0]]), decode_values(memoryview(values)[: ends[1]]), strict=True
            )
            if error:  # ENOENT: that was the last bucket
                return
            start = position

    def run(self, hook: str) -> None:
        """Run an iterator that has no output."""
        for _ in self.iterate(hook):
            pass

    def run_role(self, role: str, but: str = "") -> None:
        """Run the iterators that have this role, but for one hook."""
        for hook in self.hooks.values():
            if hook.program and hook.program.name in self.spec.role(role) and hook.name != but:
                self.run(hook.name)

    def seed_counts(self, counts: bool) -> None:
        """Whether the seed counts the sockets without a place: when it runs the last time, with all hooks attached."""
        if "seed_counts" in self.spec.variables:
            self.memory("seed_counts")[0] = counts

    def walk_on(self, other: Loaded, hook: str) -> bool:
        """Let `hook` of another object see each open file that an iterator of this one sees. False: it cannot."""
        program = other.hooks[hook].program
        if _NEXT_WALKER not in self.spec.maps or program is None:
            return False
        descriptor = ffi.new("int *", lib.bpf_program__fd(other._programs[program.name]))
        return bool(lib.bpf_map_update_elem(self.map_fd(_NEXT_WALKER), ffi.new("uint32_t *"), descriptor, 0) == 0)

    def walk_alone(self) -> None:
        """From now on no other object sees what an iterator of this one sees."""
        if _NEXT_WALKER in self.spec.maps:
            lib.bpf_map_delete_elem(self.map_fd(_NEXT_WALKER), ffi.new("uint32_t *"))

    @property
    def is_open(self) -> bool:
        return bool(self._object != ffi.NULL)

    def program_info(self) -> dict[str, tuple[int, int, int]]:
        """Program -> run time in ns, runs (both 0 unless kernel.bpf_stats_enabled), skipped runs.

        The kernel counts skipped runs of trampolines since 5.12, of tracepoints since it skips any (6.1), of kernel
        probes since 6.7 ("bpf: Count missed stats in trace_call_bpf", and `missed` of their links).
        """
        info = ffi.new("struct tcpscope_program_info *")
        result = {}
        for name, program in self._programs.items():
            if lib.tcpscope_program_info(lib.bpf_program__fd(program), info) == 0:
                result[name] = (info.run_time_ns, info.run_count, info.missed + self._missed_calls(name))
        return result

    def _missed_calls(self, name: str) -> int:
        """Calls of the function for which the kernel probe did not run; also after it was detached."""
        if name in self._links:
            self._missed[name] = max(0, lib.tcpscope_link_missed(lib.bpf_link__fd(self._links[name])))
        return self._missed.get(name, 0)

    def attach(self, name: str, over: str | None = None) -> None:
        """Attach a program, also again after `detach`. `over` is the map that an iterator visits."""
        program = self._programs[name]
        if over:
            link = lib.tcpscope_attach_to_map(program, self.map_fd(over))
        else:
            link = lib.bpf_program__attach(program)
        if link == ffi.NULL:
            error, what = ffi.errno, f"{self.spec.name}: program '{name}' cannot be attached"
            if error == errno.ENOMEM:
                raise _NoMemoryError(what)
            if shortage := exhausted(error, what):
                raise shortage
            reason = os.strerror(error) if error < 512 else "not supported"  # ENOTSUPP, in the kernel only
            denied = perf_event_denied() if error in (errno.EACCES, errno.EPERM) else ""
            to = f" to {self.spec.aims[name]}()" if name in self.spec.aims else ""
            raise _Refused(name, f"cannot be attached{to} ({denied or reason})")
        self._links[name] = link

    def detach(self, *programs: str) -> None:
        """Detach these programs; without names, all. Maps and counters stay readable."""
        for name in programs or tuple(self._links):
            if name in self._links:
                self._missed_calls(name)
                lib.bpf_link__destroy(self._links.pop(name))

    def close(self) -> None:
        """Detach and free everything. May be called twice."""
        self.detach()
        self._programs.clear()
        if self._object != ffi.NULL:
            lib.bpf_object__close(self._object)
            self._object = ffi.NULL


def _types_file(name: str) -> io.FileIO:
    """A file in memory, for the types of the kernel that an object asks for (excerpt.c)."""
    try:
        return io.FileIO(os.memfd_create("tcpscope types", os.MFD_CLOEXEC), "w")
    except OSError as error:
        what = f"{name}: no file in memory"
        raise exhausted(error.errno or 0, what) or TcpscopeError(f"{what}: {error.strerror}") from None


def _cut(size: int, data: memoryview) -> list[bytes]:
    return [bytes(data[at : at + size]) for at in range(0, len(data), size)]


def pieces(file: io.RawIOBase) -> Iterator[bytes]:
    """The output of an iterator, in pieces.

    After a million objects without output a read returns EAGAIN (MAX_ITER_OBJECTS in kernel/bpf/bpf_iter.c), which is
    None here. The next read goes on from there.
    """
    while (piece := file.read(1 << 18)) != b"":
        if piece is not None:
            yield piece


def spec_names(spec: Spec) -> set[str]:
    return {program.name for program in spec.programs}
