"""A kernel that does not run, as its BTF describes it: what `Kernel` says of the running one."""

from __future__ import annotations

from functools import cache, cached_property

from tcpscope.kernel.btf import Btf, FuncProto, Kind, Ref, Type
from tcpscope.kernel.features import Answer, Kernel
from tcpscope.kernel.spec import Program


class Offline(Kernel):
    """What can be said of a kernel by its BTF alone.

    Whether functions can be hooked is not in it, neither at all nor those of more than six arguments: Debian's kernels
    can, by kernel probes if not by trampolines. `functions` says it of others.
    """

    def __init__(self, btf: Btf, *, functions: bool = True) -> None:  # nothing of the running kernel is needed
        self.btf = btf
        self._functions = Answer(functions, "" if functions else "this kernel lets no functions be hooked")
        self._types = cache(lambda name, kind: tuple(btf.find_all(name, kind)))  # asked for the same often

    def types(self, name: str, kind: Kind) -> tuple[Type, ...]:
        """Every type of this kind with this name."""
        return self._types(name, kind)

    def release(self) -> None:
        """It has nothing to give back."""

    def parameters(self, function: str) -> int | None:
        found = self.btf.func_params(function)
        return None if found is None else len(found)

    def module(self, name: str) -> Answer:
        return Answer(False, f"the BTF of the kernel does not have the module {name}")

    def enumerator(self, name: str) -> int | None:
        return self.btf.enum_value(name)

    def enumerators(self, enum: str) -> dict[int, str]:
        return next((self.btf.enumerators(found) for found in self.types(enum, Kind.ENUM)), {})

    def has_type(self, name: str) -> bool:
        return any(self.types(name, kind) for kind in (Kind.STRUCT, Kind.UNION, Kind.ENUM))

    def has_typedef(self, name: str) -> bool:
        return bool(self.types(name, Kind.TYPEDEF))

    @cached_property
    def fentry(self) -> Answer:
        return self._functions

    @cached_property
    def kprobe(self) -> Answer:
        return self._functions

    def fentry_on(self, function: str) -> Answer:
        return self._functions

    def arguments(self, program: Program) -> int:
        """How many arguments there are where `program` is hooked, which this kernel must have."""
        if program.type != "tp_btf":
            return self.parameters(program.target) or 0
        pointer = self.btf.resolve(self.types(f"btf_trace_{program.target}", Kind.TYPEDEF)[0].id)
        assert isinstance(pointer, Ref)
        prototype = self.btf.resolve(pointer.type_id)
        assert isinstance(prototype, FuncProto)
        return len(prototype.params) - 1  # the first is the tracepoint's own
