"""What the running kernel has of the functions that a user's program hooks.

Our own probes ask the kernel's BTF alone. A user may also name an instruction within a function, a function without
BTF, and one of a module.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import msgspec

from tcpscope.kernel.features import BTF, Answer, Kernel, has_capability
from tcpscope.kernel.spec import Program

_KALLSYMS = Path("/proc/kallsyms")
_OFFSET = re.compile(r"0[xX][0-9a-fA-F]+|\d+")
_PROBES = ("kprobe", "kretprobe")
_TRAMPOLINES = ("fentry", "fexit", "fmod_ret")


class UsersKernel(Kernel):
    def can(self, program: Program) -> Answer:
        type_ = program.type.partition(".")[0]
        function, plus, offset = program.target.partition("+")
        if type_ not in (*_PROBES, *_TRAMPOLINES):
            return super().can(program)
        if plus and type_ != "kprobe":
            return Answer(False, f"only a kprobe can have an offset, and {program.section} is none")
        if plus and not _OFFSET.fullmatch(offset):
            return Answer(False, f"'+{offset}' is no offset, such as +0x10")
        answer = super().can(msgspec.structs.replace(program, section=f"{program.type}/{function}"))
        if answer or self.parameters(function) is not None:
            return answer
        module = module_of(function)
        if module is None:
            return answer
        if type_ in _PROBES:
            return self.kprobe
        if not module:
            return Answer(False, f"the kernel's BTF has no function {function}, which {type_} needs; take kprobe")
        if not (BTF.parent / module).exists():
            return Answer(False, f"{function} is a function of the module {module}, which has no BTF; take kprobe")
        if not has_capability("CAP_SYS_ADMIN"):
            return Answer(False, f"{function} is a function of the module {module}: {type_} needs CAP_SYS_ADMIN there")
        return self.fentry


@cache
def module_of(function: str) -> str | None:
    """The module that a function belongs to; empty: the kernel itself. None: there is no such function."""
    line = re.search(rf"^\S+ [tTwW] {re.escape(function)}(?:\t\[(\w+)\])?$", _KALLSYMS.read_text(), re.M)
    return (line[1] or "") if line else None
