"""What an object says of itself, read without root and without a kernel."""

from __future__ import annotations

import ctypes
import itertools
import re
from importlib.resources import files
from pathlib import Path

import pytest

from tcpscope.errors import MalformedError, TcpscopeError
from tcpscope.filters import Filter
from tcpscope.kernel import compiled_filter, elf
from tcpscope.kernel.spec import Program, Spec

PROBES = sorted(
    path.name.removesuffix(".bpf.o") for path in (files("tcpscope") / "bpf").iterdir() if path.name.endswith(".bpf.o")
)
TRANSITION = Spec.of("transition")


def test_a_program() -> None:
    program = Program("accept__fexit", "fexit/inet_csk_accept", None)
    assert (program.hook, program.type, program.target) == ("accept", "fexit", "inet_csk_accept")
    plain = Program("state", "tp_btf/inet_sock_set_state", None)
    assert (plain.hook, plain.type) == ("state", "tp_btf")


def test_programs_stand_in_the_order_of_the_file() -> None:
    """So the first way of a hook is the best one."""
    ways = {name: [way.name for way in ways] for name, ways in TRANSITION.hooks.items()}
    assert ways["connect"] == ["connect__fentry", "connect__kprobe", "connect__retransmit"]
    assert ways["accept"] == ["accept__fexit", "accept__syscall"]
    assert ways["state"] == ["state"]
    assert TRANSITION.section("accept__fexit") == "fexit/inet_csk_accept"
    names = [program.name for program in TRANSITION.programs]
    for file in ("follow.bpf.h", "accept_hooks.bpf.h", "child.bpf.h", "transition.bpf.c"):
        source = (Path(__file__).parents[2] / "src/tcpscope/bpf" / file).read_text()
        places = ((name, re.search(rf"^int (?:\w+\(.*\b)?{name}[(,)]", source, re.M)) for name in names)
        found = {name: place.start() for name, place in places if place}
        assert len(found) >= 2
        assert list(found) == sorted(found, key=lambda name: found[name])


def test_an_optional_hook_says_what_is_then_not_known() -> None:
    assert TRANSITION.hooks["timewait"][0].without == "what follows CLOSE"
    assert TRANSITION.hooks["state"][0].without is None


@pytest.mark.parametrize("probe", PROBES)
def test_every_way_but_the_plain_one_has_a_name(probe: str) -> None:
    """One logical hook is one name; functions that are only called are no programs."""
    spec = Spec.of(probe)
    assert spec.programs
    names = [program.name for program in spec.programs]
    assert len(names) == len(set(names))
    for program in spec.programs:
        assert program.type in ("tp_btf", "fentry", "fexit", "kprobe", "kretprobe", "iter"), program
        assert program.target
    for name, ways in spec.hooks.items():
        assert all(way.without is None for way in ways[1:]), name


@pytest.mark.parametrize("probe", PROBES)
def test_the_objects_are_stripped(probe: str) -> None:
    """BTF and its relocations stay, DWARF and the place of the build do not."""
    data = (files("tcpscope") / "bpf" / f"{probe}.bpf.o").read_bytes()
    names = elf.sections(data)
    assert {".BTF", ".BTF.ext"} <= names.keys()
    assert not [name for name in names if name.startswith(".debug")]
    assert str(Path(__file__).parents[2]).encode() not in data


def test_variables() -> None:
    variables = TRANSITION.variables
    assert variables["filter"].section == ".rodata"
    assert variables["counters"].section == ".bss"
    assert variables["filter_lport"].size == 65536 // 8
    places = sorted((v.section, v.offset, v.offset + v.size) for v in variables.values())
    for (section, _, end), (other, start, _) in itertools.pairwise(places):
        assert section != other or end <= start
    assert TRANSITION.section_size(".bss") >= variables["counters"].size


class Network(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64 * 2),
        ("mask", ctypes.c_uint64 * 2),
        ("family", ctypes.c_uint64),
    )


class InKernel(ctypes.Structure):
    """`struct filter` of bpf/filter.bpf.h, once more."""

    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("netns", ctypes.c_uint32),
        ("pid_namespace", ctypes.c_uint32),
        ("family", ctypes.c_uint8),
        *((f"has_{name}", ctypes.c_bool) for name in ("lport", "rport", "port")),
        *((f"{name}_count", ctypes.c_uint8) for name in ("pid", "uid", "comm", "cgroup", "netns", "laddr", "raddr")),
        ("padding", ctypes.c_uint8 * 5),
        ("cgroup", ctypes.c_uint64),
        ("comm", ctypes.c_char * 16),
        ("laddr", Network),
        ("raddr", Network),
    )


def test_packing_a_filter() -> None:
    """The bytes that the kernel gets, read by a C struct that does not come from BTF."""
    wanted = Filter.from_options(
        pid=1,
        uid=0,
        comm="nginx",
        netns=4026531840,
        ipv4=True,
        cgroup=2**40,
        laddr="10.0.0.0/8",
        raddr="::1,192.0.2.1",
        rport=443,
    )
    variable = TRANSITION.variables["filter"]
    data = TRANSITION.pack(variable.type, compiled_filter.constants(wanted)["filter"])
    assert len(data) == variable.size == ctypes.sizeof(InKernel)
    packed = InKernel.from_buffer_copy(data)
    assert (packed.pid, packed.uid, packed.netns, packed.family) == (1, 0, 4026531840, 4)
    assert (packed.pid_count, packed.uid_count, packed.comm_count, packed.netns_count) == (1, 1, 1, 1)
    assert (packed.has_lport, packed.has_rport, packed.has_port) == (False, True, False)
    assert (packed.laddr_count, packed.raddr_count, packed.cgroup_count, packed.cgroup) == (1, 2, 1, 2**40)
    assert packed.comm == b"nginx"
    assert bytes(packed.laddr.address) == bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 0])
    assert bytes(packed.laddr.mask) == b"\xff" * 13 + bytes(3)
    assert packed.laddr.family == 4


def test_packing_numbers() -> None:
    pid = next(member for member in TRANSITION.btf.struct("owner").members if member.name == "pid")
    assert TRANSITION.pack(pid.type_id, 258) == b"\x02\x01\0\0"
    assert TRANSITION.pack(pid.type_id, -1) == b"\xff" * 4
    with pytest.raises(OverflowError):
        TRANSITION.pack(pid.type_id, 1 << 32)
    assert TRANSITION.pack(pid.type_id, b"ab") == b"ab\0\0"


def test_what_is_no_object() -> None:
    with pytest.raises(MalformedError, match="not a little-endian ELF64 object"):
        Spec("mine", b"#!/bin/sh\n")
    header = (files("tcpscope") / "bpf" / "transition.bpf.o").read_bytes()[:60] + bytes(4)  # no sections at all
    with pytest.raises(TcpscopeError, match=r"mine: no \.BTF section; compile with clang -g"):
        Spec("mine", header)


def test_a_program_that_names_no_function_is_aimed_at_one() -> None:
    spec = Spec.of("trace")
    aimed = spec.aimed({"function0": "ip_rcv", "function3": "ip_output"}, {"function0"})
    assert not {"function0", "function3"} & spec.hooks.keys()
    assert [(way.section, way.without) for way in aimed.hooks["function0"]] == [("fentry/ip_rcv", None)]
    assert [(way.section, way.without) for way in aimed.hooks["function3"]] == [
        ("fentry/ip_output", "when a packet is in ip_output()")
    ]
    assert aimed.hooks.keys() - spec.hooks.keys() == {"function0", "function3"}
    assert aimed.section("function3") == "fentry/ip_output"
