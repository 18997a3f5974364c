"""What the running kernel can do. It asks the kernel's BTF and files, and loads trial programs; never its version."""

from __future__ import annotations

import errno
import itertools
import os
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from tcpscope.errors import NotPermittedError, UnsupportedError
from tcpscope.kernel._libbpf import ffi, lib
from tcpscope.kernel.resources import exhausted
from tcpscope.kernel.spec import Program

BTF = Path("/sys/kernel/btf/vmlinux")
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
_MODULES = Path("/sys/module")
_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
_TRIAL_FUNCTION = "tcp_connect"  # global, on every kernel that has TCP
_ALWAYS_CARRIED = 6


class Answer(msgspec.Struct, frozen=True):
    """Yes, or no with the reason."""

    yes: bool
    why: str = ""

    def __bool__(self) -> bool:
        return self.yes


class Kernel:
    """The running kernel. It computes an answer at the first question. Raises UnsupportedError without BTF, and
    ResourceError if a trial fails for lack of memory or file descriptors.

    A subclass may stand for another kernel. It replaces `parameters`, `enumerator`, `enumerators`, `has_type` and
    `has_typedef`, which read the BTF, `module`, `fentry` and `fentry_on`, which load trial programs, and `kprobe` and
    `release`. All other answers follow from these.
    """

    def __init__(self) -> None:
        if not BTF.exists():
            raise UnsupportedError(f"this kernel has no BTF ({BTF})", "it needs CONFIG_DEBUG_INFO_BTF=y")
        self._tried: dict[str, Answer] = {}
        self._modules: dict[str, Any] = {}

    _held: weakref.ref[Any] | None = None

    @cached_property
    def btf(self) -> Any:
        """The kernel's BTF, for functions of `lib`: the one that another `Kernel` holds, or it is read."""
        if btf := Kernel._held and Kernel._held():
            return btf
        lib.tcpscope_log_start(False)
        btf = lib.tcpscope_btf_load()
        if btf == ffi.NULL:
            what = f"cannot read {BTF}"
            raise exhausted(ffi.errno, what) or UnsupportedError(f"{what}: {os.strerror(ffi.errno)}")
        btf = ffi.gc(btf, lib.tcpscope_btf_free)
        Kernel._held = weakref.ref(btf)
        return btf

    def btf_with(self, module: str) -> Any:
        """The kernel's BTF with that of a loaded module, for functions of `lib`; the kernel's alone if it is empty."""
        if module and module not in self._modules:
            base = self.btf
            if (btf := lib.tcpscope_btf_load_module(base, module.encode())) == ffi.NULL:
                what = f"cannot read {BTF.parent / module}"
                raise exhausted(ffi.errno, what) or UnsupportedError(f"{what}: {os.strerror(ffi.errno)}")
            self._modules[module] = ffi.gc(btf, lambda btf, base=base: lib.tcpscope_btf_free(btf))
        return self._modules[module] if module else self.btf

    def hold(self) -> None:
        """Read the kernel's BTF now: until `release()` no other `Kernel` of this process has to."""
        _ = self.btf

    def release(self) -> None:
        """Free the kernel's BTF, up to ten megabytes, unless another `Kernel` holds it. The next question needs it."""
        self._modules.clear()
        self.__dict__.pop("btf", None)

    def module(self, name: str) -> Answer:
        """Whether functions of this module can be hooked through trampolines: it is loaded, and has BTF (5.11)."""
        if not (BTF.parent / name).exists():
            lacks = "has no BTF" if (_MODULES / name).exists() else "is not loaded"
            return Answer(False, f"the module {name} {lacks}")
        if not has_capability("CAP_SYS_ADMIN"):
            return Answer(False, f"{name} is a module, whose functions need CAP_SYS_ADMIN")
        return self.fentry

    def is_in_module(self, program: Program) -> bool:
        """Whether the function that `program` hooks is not one of the kernel proper."""
        return bool(program.module) and self.parameters(program.target) is None

    def parameters(self, function: str) -> int | None:
        """Number of parameters of a kernel function; None if there is no such function."""
        count: int = lib.tcpscope_btf_parameters(self.btf, function.encode())
        return count if count >= 0 else None

    def enumerator(self, name: str) -> int | None:
        """The value of an enumerator, also of an anonymous enum; None if there is none with this name."""
        value: int = lib.tcpscope_btf_enumerator(self.btf, name.encode())
        return None if value == -errno.ENOENT else value

    def enumerators(self, enum: str) -> dict[int, str]:
        """Value -> name of an enum; of several names the first. Empty if the kernel has no enum with this name."""
        value, names, read = ffi.new("int64_t *"), dict[int, str](), lib.tcpscope_btf_enumerator_at
        for index in itertools.count():
            if (name := read(self.btf, enum.encode(), index, value)) == ffi.NULL:
                break
            names.setdefault(value[0], ffi.string(name).decode())
        return names

    def functions_with(self, struct: str) -> dict[str, int]:
        """Each function of the kernel proper that takes a pointer to this struct -> which of its arguments that is."""
        found, after, parameter = dict[str, int](), ffi.new("uint32_t *"), ffi.new("int *")
        while True:
            name = lib.tcpscope_btf_function_with(self.btf, struct.encode(), after, parameter)
            if name == ffi.NULL:
                return found
            found.setdefault(ffi.string(name).decode(), parameter[0])

    def has_type(self, name: str) -> bool:
        """Whether there is a struct, union or enum with this name."""
        return bool(lib.tcpscope_btf_has_type(self.btf, name.encode()))

    def has_typedef(self, name: str) -> bool:
        """Whether there is a typedef with this name."""
        return bool(lib.tcpscope_btf_has_typedef(self.btf, name.encode()))

    @cached_property
    def fentry(self) -> Answer:
        """Whether functions can be hooked through trampolines (fentry, fexit)."""
        return self._try_fentry(_TRIAL_FUNCTION)

    def fentry_on(self, function: str) -> Answer:
        """Whether this function can be hooked so. On x86 trampolines carry more than six arguments only since 6.6."""
        if not self.fentry or (self.parameters(function) or 0) <= _ALWAYS_CARRIED:
            return self.fentry
        if function not in self._tried:
            self._tried[function] = self._try_fentry(function)
        return self._tried[function]

    def _try_fentry(self, function: str) -> Answer:
        error = -lib.tcpscope_try_fentry(self.btf, function.encode())
        if not error:
            return Answer(True)
        if shortage := exhausted(error, f"cannot try fentry on {function}"):
            raise shortage
        reason = os.strerror(error) if error < 512 else "not supported"  # ENOTSUPP is the kernel's own
        return Answer(False, f"the kernel refuses fentry on {function} ({reason})")

    @cached_property
    def kprobe(self) -> Answer:
        """Whether functions can be hooked with kprobes."""
        if _KPROBE_PMU.exists():
            return Answer(True)
        return Answer(False, "the kernel is built without kprobes")

    @cached_property
    def accounts_memory_by_cgroup(self) -> bool:
        """Whether the kernel charges the memory of maps to the memory cgroup, and not to RLIMIT_MEMLOCK.

        "bpf: Eliminate rlimit-based memory accounting" (5.11) added the function that this looks for.
        """
        return self.parameters("bpf_map_kmalloc_node") is not None

    @cached_property
    def allocates_in_programs(self) -> bool:
        """Whether a tracing program may insert into a map that is not preallocated.

        "bpf: Introduce any context BPF specific memory allocator" (6.1).
        """
        return self.has_type("bpf_mem_alloc")

    def can(self, program: Program) -> Answer:
        """Whether this kernel has what `program` hooks. The kernel may refuse the program in spite of a yes."""
        if program.needs and self.enumerator(program.needs) is None and self.parameters(program.needs) is None:
            return Answer(False, f"the kernel has no {program.needs}")
        if self.is_in_module(program):
            return self.module(program.module)
        if program.type in ("fentry", "fexit"):
            return self._has_arguments(program) and self.fentry_on(program.target)
        if program.type in ("kprobe", "kretprobe"):
            return self._has_arguments(program) and self.kprobe
        if program.type == "tp_btf":
            return self._has(self.has_typedef(f"btf_trace_{program.target}"), f"tracepoint {program.target}")
        if program.type == "iter":
            return self._has(self.parameters(f"bpf_iter_{program.target}") is not None, f"iterator {program.target}")
        return Answer(True)

    def _has_arguments(self, program: Program) -> Answer:
        """Whether the function exists, and has all arguments that the program reads."""
        count = self.parameters(program.target)
        if count is not None and count < program.arguments:
            return Answer(False, f"{program.target}() has {count} of the {program.arguments} arguments that are needed")
        return self._has(count is not None, f"function {program.target}")

    @staticmethod
    def _has(present: bool, what: str) -> Answer:
        return Answer(True) if present else Answer(False, f"the kernel has no {what}")


_CAPABILITIES = {  # include/uapi/linux/capability.h
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}


def capability_masks() -> tuple[int, int]:
    """Effective and permitted capabilities of this thread, as bit masks. Raises OSError."""
    effective, permitted = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _check(lib.tcpscope_capabilities(effective, permitted))
    return effective[0], permitted[0]


def has_capability(name: str) -> bool:
    """Whether the capability is in the effective set of this thread."""
    return bool(capability_masks()[0] >> _CAPABILITIES[name] & 1)


def require_capabilities(*names: str) -> None:
    """Raise NotPermittedError with those of `names` that this process lacks."""
    effective, _ = capability_masks()
    root = effective >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1  # stands for CAP_BPF and CAP_PERFMON
    missing = tuple(
        name
        for name in names
        if not effective >> _CAPABILITIES[name] & 1 and not (root and name in ("CAP_BPF", "CAP_PERFMON"))
    )
    if missing:
        raise NotPermittedError(f"missing {' and '.join(missing)}", "run as root, or grant them", missing)


def drop_capabilities(keep: tuple[str, ...] = ()) -> None:
    """Drop every capability of this process but `keep`, for good. Raises OSError."""
    _, permitted = capability_masks()
    _check(lib.tcpscope_no_new_privileges())
    mask = permitted & sum(1 << _CAPABILITIES[name] for name in keep)
    _check(lib.tcpscope_set_capabilities(mask, mask))


def can_read_maps_without_privilege(map_fd: int, key: Any, value: Any) -> bool:
    """Whether bpf(BPF_MAP_LOOKUP_ELEM) works without an effective capability. It tries a look-up.

    "bpf: refine kernel.unprivileged_bpf_disabled behaviour" (5.19) allows it. Before 5.19 the sysctl forbids all of
    bpf().
    """
    effective, permitted = capability_masks()
    _check(lib.tcpscope_set_capabilities(0, permitted))
    try:
        return bool(lib.bpf_map_lookup_elem(map_fd, key, value) == 0 or ffi.errno != errno.EPERM)
    finally:
        _check(lib.tcpscope_set_capabilities(effective, permitted))


def perf_event_paranoid() -> int:
    """The sysctl kernel.perf_event_paranoid, -1 if it is not known. Above 2, kprobes need CAP_SYS_ADMIN.

    Debian and Ubuntu have a level 3 ("security,perf: Allow further restriction of perf_event_open"), at which
    CAP_PERFMON is not enough for kprobes. Programs of type fentry and tp_btf do not depend on it.
    """
    try:
        return int(_PARANOID.read_text())
    except (OSError, ValueError):
        return -1


def perf_event_denied(what: str = "kernel probes need") -> str:
    """Why the kernel refuses this in spite of CAP_PERFMON; empty if perf_event_paranoid allows it."""
    level = perf_event_paranoid()
    if level <= 2 or has_capability("CAP_SYS_ADMIN"):
        return ""
    return f"kernel.perf_event_paranoid is {level}: {what} CAP_SYS_ADMIN"


def _check(status: int) -> None:
    if status < 0:
        raise OSError(-status, os.strerror(-status))
