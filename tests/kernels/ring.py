"""Kernels without a boot: whether tcpscope would find in their BTF what it needs, and what each tool has there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from tcpscope import listeners, tool
from tcpscope.kernel.btf import Btf, Enum, Kind
from tcpscope.kernel.spec import Program, Spec
from tcpscope.kernel.ways import plan, plan_refusals
from tests.kernels import code
from tests.kernels.answers import Answers, absent
from tests.kernels.answers import lacks as lacking
from tests.kernels.btfs import Found
from tests.kernels.offline import Offline
from tests.kernels.signature import probes
from tests.lacks import REFUSED_WITHOUT, is_refused

ASKS_FIRST = {
    "accept__fexit": "inet_csk_accept() lost two arguments with struct proto_accept_arg (6.10), which it asks for",
    "discard": "kfree_skb got its reason with a field of its event (5.17), which it asks for",
    "discard_again": "the same",
    "drop__note": "kfree_skb got its reason and its socket with fields of its event (5.17, 6.11), which it asks for",
    "drop__receiver": "the same",
    "retransmit": "tcp_retransmit_skb got an argument with its own event class (6.17), which it asks for",
}
"""Programs that read more arguments than some kernels have, and not there."""

STACK_BYTES = 512


@dataclass(frozen=True)
class Verdict:
    """What a kernel has of what tcpscope uses, each in words.

    lacks      probe -> what it cannot do without: it would not start there, or know less than it says
    unknown    tool -> what it does not know there, as `features` says it
    otherwise  probe -> hooks that are not attached by their best way, and what the programs ask for in vain
    """

    lacks: dict[str, list[str]]
    unknown: dict[str, list[str]]
    otherwise: dict[str, list[str]]


def judge(btf: Btf, *, functions: bool = True) -> Verdict:
    """The verdict on a kernel with this BTF. Whether functions can be hooked there is not in it."""
    kernel = Offline(btf, functions=functions)
    lacks, otherwise = {}, {}
    for probe in probes():
        if is_refused(probe, kernel):
            continue
        spec = Spec.of(probe)
        usable = [program for program in spec.programs if kernel.can(program)]
        names = {program.name for program in usable}
        answers = Answers(spec, kernel)
        found = answers.of(names)
        lacks[probe] = [
            *_hooks(spec, kernel),
            *lacking(found),
            *_arguments(spec, kernel, usable),
            *_helpers(answers, kernel, names),
            *_stack(answers, kernel, names),
        ]
        otherwise[probe] = [*_lesser_ways(spec, kernel), *(f"no `{path}`" for path in absent(found))]
    return Verdict(_full(lacks), _full(_unknown(kernel)), _full(otherwise))


def _full(found: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: words for name, words in found.items() if words}


def _hooks(spec: Spec, kernel: Offline) -> Iterator[str]:
    for hook in plan(spec, plan_refusals(spec, kernel)).values():
        if not hook.program and hook.without is None:
            yield f"no hook for '{hook.name}'"


def _lesser_ways(spec: Spec, kernel: Offline) -> Iterator[str]:
    for hook in plan(spec, plan_refusals(spec, kernel)).values():
        if hook.program and hook.refused:
            yield f"{hook.name} by `{hook.program.section}`"


def _arguments(spec: Spec, kernel: Offline, programs: list[Program]) -> Iterator[str]:
    """Programs that would read more arguments than there are; behind those of a function is what it returns."""
    for program in programs:
        if program.type not in ("tp_btf", "fentry", "fexit") or program.name in ASKS_FIRST:
            continue
        there, read = kernel.arguments(program), code.arguments(spec, program.name)
        if read > there + (program.type == "fexit"):
            yield f"{program.target} has {there} arguments, {program.name} reads {read}"


def _helpers(answers: Answers, kernel: Offline, programs: set[str]) -> Iterator[str]:
    """Helpers that the kernel does not number. Whether one may be called by a kind of program is not in the BTF."""
    enums = [enum for enum in kernel.types("bpf_func_id", Kind.ENUM) if isinstance(enum, Enum)]
    known = {value for enum in enums for _, value in enum.values}
    for piece in sorted(answers.used(programs)):
        for number in sorted(answers.helpers(piece) - known):
            yield f"no helper {number}, which {piece} calls"


def _stack(answers: Answers, kernel: Offline, programs: set[str]) -> Iterator[str]:
    """Programs that take more stack than the verifier allows (MAX_BPF_STACK). Since 6.9, which also brought arenas, it
    counts frames by 16 bytes."""
    step = 32 if kernel.enumerator("BPF_MAP_TYPE_ARENA") is None else 16
    for program in sorted(programs):
        size, way = answers.stack(program, step)
        if size > STACK_BYTES:
            yield f"{size} bytes of stack for {way}, of {STACK_BYTES}"


def _unknown(kernel: Offline) -> dict[str, list[str]]:
    found = {}
    for name in tool.names():
        each = tool.find(name)
        spec = Spec.of(each.probes[0])
        if is_refused(spec.name, kernel):
            found[name] = [f"anything: there is no tracepoint {REFUSED_WITHOUT[spec.name]}"]
            continue
        planned = plan(spec, plan_refusals(spec, kernel)).values()
        hooks = [hook for hook in planned if not spec.hooks[hook.name][0].module]  # modules are not in this BTF
        found[name] = sorted({hook.without for hook in hooks if not hook.program and hook.without})
        found[name] += [
            f"single refusals: the kernel's BTF does not number {enumerator}"
            for variable, enumerator in listeners.MIB.items()
            if variable in spec.variables and kernel.enumerator(enumerator) is None
        ]
    return found


def verdict_of(kernel: Found) -> Verdict:
    """The verdict on a kernel; kept beside its BTF until an object or the code changes."""
    kept, now = kernel.file.with_name(f"{kernel.release}.verdict"), _basis()
    try:
        basis, parts = json.loads(kept.read_text())
        if basis == now:
            return Verdict(**parts)
    except (OSError, ValueError, TypeError):
        pass
    verdict = judge(kernel.btf)
    new = kept.with_suffix(".new")
    new.write_text(json.dumps([now, asdict(verdict)]))
    new.rename(kept)
    return verdict


@cache
def _basis() -> str:
    """Of all that a verdict depends on."""
    names = ("answers", "code", "core", "offline", "ring", "signature")
    own = [Path(__file__).with_name(f"{name}.py") for name in names]
    package = Path(str(listeners.__file__)).parent
    parts = [*(Spec.of(probe).data for probe in probes()), *(f.read_bytes() for f in (*own, *package.rglob("*.py")))]
    return hashlib.sha256(b"".join(parts)).hexdigest()
