"""What a kernel offers each probe, by its BTF: kernels with the same signature need not all be asked everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tcpscope.kernel import elf
from tcpscope.kernel.btf import Btf, Kind
from tcpscope.kernel.spec import Spec, probes
from tcpscope.kernel.ways import plan, plan_refusals
from tests.kernels.answers import Answer, Answers, width
from tests.kernels.offline import Offline

Signature = Mapping[str, frozenset[str]]
"""Probe -> what of it differs between kernels, in words."""

_WITH_ARGUMENTS = ("fentry", "fexit", "kprobe", "kretprobe", "tp_btf")


def of(btf: Btf, *, functions: bool = True) -> dict[str, frozenset[str]]:
    """The signature of a kernel with this BTF. Whether functions can be hooked there is not in it."""
    kernel = Offline(btf, functions=functions)
    specs = {probe: Spec.of(probe) for probe in probes()}
    return {
        probe: frozenset([*_ways(spec, kernel), *_found(spec, kernel), _functions(spec, kernel)])
        for probe, spec in specs.items()
    }


def alone(name: str, signatures: Mapping[str, Signature], others: tuple[str, ...]) -> dict[str, frozenset[str]]:
    """Of each probe what this kernel has and none of the others; probes without anything are left out."""
    found = {
        probe: has - frozenset().union(*(signatures[other][probe] for other in others))
        for probe, has in signatures[name].items()
    }
    return {probe: only for probe, only in found.items() if only}


def _ways(spec: Spec, kernel: Offline) -> Iterator[str]:
    """The program of each hook, and how many arguments that has which it hooks."""
    for hook in plan(spec, plan_refusals(spec, kernel)).values():
        program = hook.program
        yield f"{hook.name}: {program.name if program else 'nothing'}"
        if program and program.type in _WITH_ARGUMENTS:
            yield f"{program.target} has {kernel.arguments(program)} arguments"


def _functions(spec: Spec, kernel: Offline) -> str:
    """Which of the kernel's functions that the object's programs would call are there: their combination counts."""
    names = sorted(symbol.name for symbol in elf.symbols(spec.data) if not symbol.section)
    called = [name for name in names if spec.btf.find(name, Kind.FUNC)]
    return f"kernel functions: {', '.join(name for name in called if kernel.parameters(name) is not None) or 'none'}"


def _found(spec: Spec, kernel: Offline) -> Iterator[str]:
    """What the object's relocations lead to: not there, there, or how wide a number is."""
    for one, answer in Answers(spec, kernel).of([program.name for program in spec.programs]).items():
        yield f"{one}: {width(one, kernel) if answer is Answer.FOUND else answer.value}"
