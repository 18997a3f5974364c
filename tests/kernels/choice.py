"""What runs where. The oldest and the newest kernel and the machine's own run every test of the kernel.

A kernel between them runs the tests of every kernel (each object loaded and attached by its planned way and by the
worse ones, the events of each tool with all that is recorded of them). If it offers a probe something that neither of
the two does, it runs all tests of that probe's tools too, unless tests of every kernel are there for that very thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tcpscope import tool
from tcpscope.kernel.btf import Btf
from tcpscope.kernel.spec import Spec, probes
from tests.kernels import signature
from tests.kernels.debian import Image
from tests.kernels.image import btf_of

_LOADED = "tests/kernel/test_loaded.py::test_all_ways_but_the_refused_are_really_there"
SHOWN = {
    "mptcp_sock.subflow": {
        "attempt": "tests/tools/connect/test_ways.py::test_mptcp",
        "listeners": "tests/tools/queue/test_events.py::test_mptcp",
        "rtt": "tests/tools/rtt/test_keys.py::test_mptcp",
        "sockets": "tests/tools/test_list.py::test_mptcp",
    },
    "kernel functions": dict.fromkeys(probes(), _LOADED),
}
"""The name of what a kernel may have alone -> probe -> the test of every kernel that covers it."""


def everything(name: str, names: Sequence[str]) -> bool:
    """Whether this kernel, of these from the oldest to the newest, runs every test."""
    return name in (names[0], names[-1])


def alone(images: Mapping[str, Image]) -> dict[str, dict[str, frozenset[str]]]:
    """For each kernel between: probe -> what it offers and neither the oldest nor the newest does."""
    names = list(images)
    signatures = {name: signature.of(Btf.parse(btf_of(image))) for name, image in images.items()}
    between = [name for name in names if not everything(name, names)]
    return {name: signature.alone(name, signatures, (names[0], names[-1])) for name in between}


def shown(probe: str, what: str) -> str | None:
    """The test of every kernel that covers what a kernel has alone, if there is one."""
    return SHOWN.get(what.partition(": ")[0], {}).get(probe)


def paths(offers: Mapping[str, frozenset[str]]) -> list[str]:
    """Where the tests of the probes are to which something is offered that no test of every kernel shows."""
    probes = [probe for probe, only in offers.items() if not all(shown(probe, what) for what in only)]
    tools = [name for name in tool.names() if set(tool.find(name).probes) & set(probes)]
    found = [path for name in tools for path in (f"tests/tools/test_{name}.py", f"tests/tools/{name}/")]
    return [*found, *(["tests/bpf/"] if any(Spec.of(probe).role("delays") for probe in probes) else ())]


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
                tests = {shown(probe, each) for each in only}
                if None in tests:
                    runs += f"; all of `{probe}`, which alone has {has}"
                else:
                    by = ", ".join(f"`{test}`" for test in sorted(filter(None, tests)))
                    runs += f"; alone it has for `{probe}` {has}, which {by} covers"
        lines.append(f"| {name} | {image.release} | {runs} |")
    return "\n".join([*lines, ""])
