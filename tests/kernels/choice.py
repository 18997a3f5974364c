"""What runs where. The oldest and the newest kernel and the machine's own run every test of the kernel.

A kernel between them runs the tests of every kernel (each object loaded and attached by its planned way and by the
worse ones, the events of each tool with all that is recorded of them). If it offers a probe something that neither of
the two does, it runs all tests of that probe's tools too, unless tests of every kernel are there for that very thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tcpscope import tool
from tcpscope.kernel.btf import Btf
from tests.kernels import signature
from tests.kernels.debian import Image
from tests.kernels.image import btf_of

SHOWN = {"mptcp_sock.": "test_mptcp"}
"""What a kernel may have alone, as it begins, and the tests of every kernel that show it, by their name."""


def everything(name: str, names: Sequence[str]) -> bool:
    """Whether this kernel, of these from the oldest to the newest, runs every test."""
    return name in (names[0], names[-1])


def alone(images: Mapping[str, Image]) -> dict[str, dict[str, frozenset[str]]]:
    """For each kernel between: probe -> what it offers and neither the oldest nor the newest does."""
    names = list(images)
    signatures = {name: signature.of(Btf.parse(btf_of(image))) for name, image in images.items()}
    between = [name for name in names if not everything(name, names)]
    return {name: signature.alone(name, signatures, (names[0], names[-1])) for name in between}


def shown(what: str) -> str | None:
    """By which tests of every kernel."""
    return next((test for start, test in SHOWN.items() if what.startswith(start)), None)


def paths(offers: Mapping[str, frozenset[str]]) -> list[str]:
    """Where the tests of the probes are to which something is offered that no test of every kernel shows."""
    probes = [probe for probe, only in offers.items() if not all(map(shown, only))]
    tools = [name for name in tool.names() if set(tool.find(name).probes) & set(probes)]
    found = [path for name in tools for path in (f"tests/tools/test_{name}.py", f"tests/tools/{name}/")]
    return [*found, *(["tests/bpf/"] if "connections" in probes else ())]


def page(images: Mapping[str, Image], offers: Mapping[str, Mapping[str, frozenset[str]]]) -> str:
    """Of each kernel what it runs, and why."""
    lines = ["| kernel | release | runs |", "|---|---|---|"]
    for name, image in images.items():
        if name not in offers:
            runs = "everything"
        else:
            runs = "what runs on every kernel"
            for probe, only in sorted(offers[name].items()):
                has = ", ".join(f"`{each}`" for each in sorted(only))
                tests = sorted(filter(None, map(shown, only)))
                what = f"all of `{probe}`" if len(tests) < len(only) else f"`{', '.join(tests)}` for `{probe}`"
                runs += f"; {what}, which alone has {has}"
        lines.append(f"| {name} | {image.release} | {runs} |")
    return "\n".join([*lines, ""])
