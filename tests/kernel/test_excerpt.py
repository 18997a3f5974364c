"""The excerpt of the kernel's BTF against the whole, as another reader of BTF sees both."""

from __future__ import annotations

import os
import subprocess
from functools import cache

import pytest
from tcpscope.kernel._libbpf import ffi, lib

from tcpscope.kernel.btf import Array, Btf, Enum, Kind, Ref, Struct
from tcpscope.kernel.features import BTF, Kernel
from tcpscope.kernel.spec import Spec
from tests.kernel.test_types import PROBES

pytestmark = pytest.mark.kernel

NAMED = (Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.ENUM64, Kind.TYPEDEF)


@cache
def whole() -> Btf:
    return Btf.parse(BTF.read_bytes())


def excerpt_for(spec: Spec, module: str = "") -> Btf:
    btf = Kernel().btf_with(module)
    fd = os.memfd_create("types", os.MFD_CLOEXEC)
    try:
        opened = lib.tcpscope_open(ffi.from_buffer(spec.data), len(spec.data), b"test", btf, fd)
        assert opened != ffi.NULL
        lib.bpf_object__close(opened)
        return Btf.parse(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)


class Shapes:
    """What the kinds of types say, down to the pointers, without their numbers."""

    def __init__(self, btf: Btf) -> None:
        self.btf = btf
        self.known: dict[int, object] = {}

    def of(self, number: int) -> object:
        if number not in self.known:
            self.known[number] = self._of(number)
        return self.known[number]

    def _of(self, number: int) -> object:
        found = self.btf.type(number)
        if found.kind is Kind.PTR:
            return Kind.PTR
        if isinstance(found, Ref):
            return found.kind, found.name, self.of(found.type_id)
        if isinstance(found, Array):
            return found.kind, found.count, self.of(found.type_id)
        if isinstance(found, Struct):
            members = [(member.name, member.bit_offset, member.bitfield_size) for member in found.members]
            return found.kind, found.name, found.size, members, [self.of(member.type_id) for member in found.members]
        if isinstance(found, Enum):
            return found.kind, found.name, found.size, found.signed, found.values
        return found.kind, found.name


@pytest.mark.root
def test_a_file_without_a_path() -> None:
    """As without /proc: libbpf reads the whole."""
    spec, kernel = Spec.of("owner"), Kernel()
    opened = lib.tcpscope_open(ffi.from_buffer(spec.data), len(spec.data), b"test", kernel.btf, -1)
    assert opened != ffi.NULL
    program = lib.bpf_object__next_program(opened, ffi.NULL)
    while program != ffi.NULL:
        lib.bpf_program__set_autoload(program, ffi.string(lib.bpf_program__name(program)) == b"state")
        program = lib.bpf_object__next_program(opened, program)
    assert lib.bpf_object__load(opened) == 0
    lib.bpf_object__close(opened)


@pytest.mark.parametrize("probe", PROBES)
def test_libbpf_finds_the_kernels_own_types(probe: str) -> None:
    spec = Spec.of(probe)
    part = excerpt_for(spec)
    shapes, shapes_there = Shapes(part), Shapes(whole())
    wanted = {found.name.partition("___")[0] for found in spec.btf.types if found.kind in NAMED and found.name}
    assert {"sock", "sock_common"} < wanted
    for name in wanted:
        for kind in NAMED:
            mine = [shapes.of(found.id) for found in part.find_all(name, kind)]
            assert mine == [shapes_there.of(found.id) for found in whole().find_all(name, kind)], (name, kind)
    assert len(part) < len(whole()) / 10


@pytest.mark.root
def test_a_module() -> None:
    """Its functions and types are there beside those of the kernel, which come first. nft lets the kernel load it."""
    kernel, module = Kernel(), "nf_tables"
    subprocess.run(["nft", "list", "tables"], check=True, capture_output=True)
    if not (BTF.parent / module).exists() or kernel.has_type("nft_chain"):
        pytest.skip(f"this kernel has no module {module}, or none that has BTF (5.11)")
    spec = Spec.of("trace")
    alone, together = excerpt_for(spec), excerpt_for(spec, module)
    assert kernel.parameters("nft_do_chain") is None
    assert lib.tcpscope_btf_parameters(kernel.btf_with(module), b"nft_do_chain") == 2
    assert lib.tcpscope_btf_parameters(kernel.btf_with(module), b"tcp_connect") == kernel.parameters("tcp_connect")
    for name, fields in {
        "nft_pktinfo": {"skb"},
        "nft_chain": {"table", "name"},
        "nft_table": {"family", "name"},
    }.items():
        assert not list(alone.find_all(name, Kind.STRUCT))
        (found,) = together.find_all(name, Kind.STRUCT)
        assert isinstance(found, Struct)
        assert fields <= {member.name for member in found.members}
    mine, theirs = Shapes(together), Shapes(alone)
    for name in ("sk_buff", "sock", "net_device"):
        found = [[shapes.of(one.id) for one in shapes.btf.find_all(name, Kind.STRUCT)] for shapes in (mine, theirs)]
        assert found[0] == found[1] != []


def test_enumerators_of_64_bits() -> None:
    """The reader in C against the one in Python: the first enum of each name."""
    kernel, wide = Kernel(), [found for found in whole().types if found.kind is Kind.ENUM64 and found.name]
    for found in wide:
        first = next(whole().find_all(found.name, Kind.ENUM64))
        assert isinstance(first, Enum)
        expected: dict[int, str] = {}
        for name, value in first.values:
            expected.setdefault(value, name)
        got = {value % 2**64: name for value, name in kernel.enumerators(found.name).items()}
        assert got == {value % 2**64: name for value, name in expected.items()}, found.name
    if not wide:
        pytest.skip("this kernel's BTF has no enum of 64 bits (6.0)")
