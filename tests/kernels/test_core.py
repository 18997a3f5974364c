"""CO-RE relocations of objects from clang, looked up in kernels that are made here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tcpscope.kernel.btf import Kind
from tcpscope.kernel.spec import Spec
from tests.blob import Blob
from tests.kernels.core import Asks, Relocation, ends, relocations
from tests.kernels.objects import KERNEL, OBJECT, spec_of, types_of
from tests.kernels.offline import Offline
from tests.kernels.signature import probes


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return spec_of(OBJECT, tmp_path_factory.mktemp("core"))


def found(spec: Spec, source: str, folder: Path) -> dict[str, set[int]]:
    """What a relocation asks for -> where a kernel of this source has it."""
    kernel = Offline(types_of(source, folder))
    return {str(one): {end.bit_offset for end in ends(one, kernel)} for one in relocations(spec)}


def test_every_relocation_is_read(spec: Spec) -> None:
    read = {(str(one), one.asks): {place.piece for place in where} for one, where in relocations(spec).items()}
    assert read == {
        ("sock.mark", Asks.FIELD_OFFSET): {"first"},
        ("sock.data", Asks.FIELD_OFFSET): {"first"},
        ("sock.state", Asks.FIELD_OFFSET): {"first"},
        ("sock.hidden", Asks.FIELD_OFFSET): {"first"},
        ("sock.low", Asks.FIELD_SIZE): {"first"},
        ("row.cells[2]", Asks.FIELD_OFFSET): {"second"},
        ("row.each", Asks.FIELD_OFFSET): {"second"},
        ("row.each[1].deep", Asks.FIELD_OFFSET): {"second"},
        ("inner.deep", Asks.FIELD_OFFSET): {"called"},
        ("later.since", Asks.FIELD_EXISTS): {"asks"},
        ("later.since", Asks.FIELD_OFFSET): {"asks"},
        ("maybe", Asks.TYPE_EXISTS): {"asks"},
        ("maybe.field", Asks.FIELD_OFFSET): {"asks"},
        ("helper.HELPER", Asks.ENUMERATOR_EXISTS): {"asks"},
        ("new.one", Asks.FIELD_EXISTS): {"guards"},
        ("new.one", Asks.FIELD_OFFSET): {"only_if_asked"},
        ("new.other", Asks.FIELD_EXISTS): {"careless"},
        ("new.other", Asks.FIELD_OFFSET): {"careless"},
        ("uses_alias.alias.value", Asks.FIELD_OFFSET): {"alias"},
    }


def test_where_a_kernel_has_it(spec: Spec, tmp_path: Path) -> None:
    """Worked out by hand, in bits; of an enumerator its value."""
    places = found(spec, KERNEL, tmp_path)
    assert places == {
        "sock.data": {0},
        "sock.mark": {64},
        "sock.low": {129},
        "sock.hidden": {160},
        "sock.state": {192},
        "row.cells[2]": {32},
        "row.each": {64},
        "row.each[1].deep": {160},
        "inner.deep": {32},
        "later.since": {0},
        "maybe": {0},
        "maybe.field": {0},
        "new.one": {0},
        "new.other": {32},
        "helper.HELPER": {9},
        "uses_alias.alias.value": {0},
    }


@pytest.mark.parametrize(
    ("old", "new", "gone"),
    [
        ("long mark", "long march", {"sock.mark"}),
        ("void *data", "long data", {"sock.data"}),  # a number is no pointer
        ("void *data", "struct inner *data", set()),  # but every pointer is one
        ("enum state state", "int state", {"sock.state"}),
        ("enum state state", "enum other { A } state", {"sock.state"}),
        ("x, hidden", "x, seen", {"sock.hidden"}),
        ("struct { union { int x, hidden; }; }", "int hidden", set()),
        ("cells[4]", "cells[2]", {"row.cells[2]"}),
        ("short cells[4]", "short *cells", {"row.cells[2]"}),
        ("short cells[4]", "char cells[9]", set()),  # numbers of another width are numbers
        ("struct inner each[2]; }", "struct inner each[]; }", set()),
        ("struct inner each[2]", "union { int deep; } each[2]", set()),
        ("more, deep;", "more;", {"inner.deep", "row.each[1].deep"}),
        ("struct maybe { int field; };", "struct maybe { int other; };", {"maybe.field"}),
        ("maybe", "never", {"maybe", "maybe.field"}),
        ("HELPER", "ANOTHER", {"helper.HELPER"}),
        ("struct { int value; } alias_t", "int alias_t", {"uses_alias.alias.value"}),
    ],
)
def test_what_a_kernel_lacks(spec: Spec, tmp_path: Path, old: str, new: str, gone: set[str]) -> None:
    assert old in KERNEL
    places = found(spec, KERNEL.replace(old, new), tmp_path)
    assert {name for name, where in places.items() if not where} == gone


def test_types_of_the_same_name() -> None:
    blob = Blob()
    blob.add(Kind.INT, "int", 4, 32)
    blob.add(Kind.STRUCT, "inner", 8, "deep", 1, 0, count=1)
    blob.add(Kind.STRUCT, "inner", 8, "else", 1, 0, count=1)
    blob.add(Kind.STRUCT, "inner", 8, "deep", 1, 32, count=1)
    blob.add(Kind.UNION, "inner", 8, "deep", 1, 8, count=1)
    one = Relocation(Asks.FIELD_OFFSET, "inner", Kind.STRUCT, ("deep",), ((Kind.INT,),))
    assert [end.bit_offset for end in ends(one, Offline(blob.parse()))] == [0, 32]


def test_relocations_are_those_of_the_source() -> None:
    read = {str(one): one.asks for one in relocations(Spec.of("life"))}
    assert read["tcp_sock.bytes_acked"] is Asks.FIELD_OFFSET
    assert read["proto_accept_arg"] is Asks.TYPE_EXISTS
    assert read["bpf_func_id.BPF_FUNC_check_mtu"] is Asks.ENUMERATOR_EXISTS


@pytest.mark.parametrize("probe", probes())
def test_the_kernels_functions_that_are_called_may_be_missing(probe: str, tmp_path: Path) -> None:
    """They are not among the relocations, so that nobody looks whether a kernel has them: they are weak."""
    (tmp_path / "it.o").write_bytes(Spec.of(probe).data)
    named = subprocess.run(["llvm-nm", "-u", tmp_path / "it.o"], capture_output=True, text=True, check=True)
    assert [line for line in named.stdout.splitlines() if not line.strip().startswith("w ")] == []
