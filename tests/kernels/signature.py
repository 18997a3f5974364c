"""What a kernel offers each probe, by its BTF: kernels with the same signature need not all be asked everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files

from tcpscope.kernel.btf import Btf, Kind, Struct
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tests.kernels.offline import Offline

Signature = Mapping[str, frozenset[str]]
"""Probe -> what of it differs between kernels, in words."""

_FUNCTIONS = ("fentry", "fexit", "kprobe", "kretprobe")


def probes() -> list[str]:
    """The objects that the package ships."""
    ending = ".bpf.o"
    return sorted(f.name.removesuffix(ending) for f in (files("tcpscope") / "bpf").iterdir() if f.name.endswith(ending))


def of(btf: Btf) -> dict[str, frozenset[str]]:
    """The signature of a kernel with this BTF, which lets functions be hooked."""
    kernel = Offline(btf)
    return {probe: frozenset([*_ways(Spec.of(probe), kernel), *_fields(Spec.of(probe), btf)]) for probe in probes()}


def alone(name: str, signatures: Mapping[str, Signature], others: tuple[str, ...]) -> dict[str, frozenset[str]]:
    """Of each probe what this kernel has and none of the others; probes without anything are left out."""
    found = {
        probe: has - frozenset().union(*(signatures[other][probe] for other in others))
        for probe, has in signatures[name].items()
    }
    return {probe: only for probe, only in found.items() if only}


def _ways(spec: Spec, kernel: Offline) -> Iterator[str]:
    """The program of each hook, and how many arguments that has which it hooks."""
    refused = plan_refusals(spec, kernel)
    for hook in plan(spec, refused).values():
        program = hook.program
        yield f"{hook.name}: {program.name if program else 'nothing'}"
        if program and program.type in _FUNCTIONS:
            yield f"{program.target}() has {kernel.parameters(program.target)} arguments"
        if program and program.type == "tp_btf":
            yield f"tracepoint {program.target} has {kernel.parameters(f'__bpf_trace_{program.target}')} arguments"


def _fields(spec: Spec, btf: Btf) -> Iterator[str]:
    """Each field of the kernel that the object names: not there, or its size, and whether it is a bit field."""
    for ours in spec.btf.types:
        if not isinstance(ours, Struct) or ours.kind != Kind.STRUCT or not ours.name:
            continue
        real = ours.name.partition("___")[0]
        if btf.find(real, Kind.STRUCT) is None:
            continue  # an event of our own, or a type that this kernel lacks: the plan and the fields of others tell
        for member in ours.members:
            there = btf.field(real, member.name) if member.name else None
            if there is None:
                yield f"{real}.{member.name}: not there"
            elif isinstance(btf.resolve(there.type_id), Struct):
                yield f"{real}.{member.name}: there"  # its size is nothing that a program reads
            else:
                bits = f", {there.bitfield_size} bits" if there.bitfield_size else ""
                yield f"{real}.{member.name}: {btf.size_of(there.type_id)} bytes{bits}"
