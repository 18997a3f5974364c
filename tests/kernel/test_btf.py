"""BTF: blobs built here, objects from clang, and the running kernel's own, compared with bpftool."""

from __future__ import annotations

import json
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpscope.errors import BtfError
from tcpscope.kernel import btf, elf
from tcpscope.kernel.btf import Btf, Kind
from tests import examples  # noqa: F401  for its settings
from tests.blob import Blob

VMLINUX = Path("/sys/kernel/btf/vmlinux")
# Ubuntu's in /usr/sbin only works for the kernel that runs.
BPFTOOLS = (*Path("/usr/lib").glob("linux-tools*/**/bpftool"), Path("/usr/sbin/bpftool"))
BPFTOOL = next((str(path) for path in BPFTOOLS if path.exists()), None)


def test_empty() -> None:
    empty = Blob().parse()
    assert len(empty) == 1
    assert list(empty.types) == []
    assert empty.type(0) == btf.Type(0, Kind.VOID, "void")
    assert empty.find("sock", Kind.STRUCT) is None
    assert empty.enum_value("X") is None
    assert empty.func_params("f") is None
    assert empty.field("sock", "x") is None
    assert empty.decl_tags(1) == ()


def test_every_kind() -> None:
    blob = Blob()
    blob.add(Kind.INT, "int", 4, 1 << 24 | 32)
    blob.add(Kind.PTR, "", 1)
    blob.add(Kind.ARRAY, "", 0, 2, 1, 3)
    blob.add(Kind.STRUCT, "s", 16, "a", 1, 0, "b", 1, 5 << 24 | 32, count=2, flag=True)
    blob.add(Kind.UNION, "u", 4, "a", 1, 0, count=1)
    blob.add(Kind.ENUM, "e", 4, "MINUS", -1, "ONE", 1, "UNO", 1, count=3, flag=True)
    blob.add(Kind.FWD, "f", 0, flag=True)
    blob.add(Kind.TYPEDEF, "t", 4)
    blob.add(Kind.VOLATILE, "", 8)
    blob.add(Kind.CONST, "", 9)
    blob.add(Kind.RESTRICT, "", 2)
    blob.add(Kind.FUNC_PROTO, "", 1, "x", 10, "", 0, count=2)
    blob.add(Kind.FUNC, "fun", 12, count=1)
    blob.add(Kind.VAR, "v", 3, 1)
    blob.add(Kind.DATASEC, ".bss", 24, 14, 0, 24, count=1)
    blob.add(Kind.FLOAT, "double", 8)
    blob.add(Kind.DECL_TAG, "unit:µs", 4, 1)
    blob.add(Kind.DECL_TAG, "doc:all", 4, -1)
    blob.add(Kind.TYPE_TAG, "rcu", 10)
    blob.add(Kind.ENUM64, "", 8, "BIG", 0, 1, "TOP", 0xFFFFFFFF, 0xFFFFFFFF, count=2)
    blob.add(Kind.ENUM64, "", 8, "LOW", 0xFFFFFFFE, 0xFFFFFFFF, count=1, flag=True)
    types = blob.parse()
    assert list(types.types) == [
        btf.Int(1, Kind.INT, "int", 4, 32, signed=True, is_char=False, is_bool=False),
        btf.Ref(2, Kind.PTR, "", 1),
        btf.Array(3, Kind.ARRAY, "", 2, 3),
        btf.Struct(4, Kind.STRUCT, "s", 16, (btf.Member("a", 1, 0), btf.Member("b", 1, 32, 5))),
        btf.Struct(5, Kind.UNION, "u", 4, (btf.Member("a", 1, 0),)),
        btf.Enum(6, Kind.ENUM, "e", 4, True, (("MINUS", -1), ("ONE", 1), ("UNO", 1))),
        btf.Fwd(7, Kind.FWD, "f", is_union=True),
        btf.Ref(8, Kind.TYPEDEF, "t", 4),
        btf.Ref(9, Kind.VOLATILE, "", 8),
        btf.Ref(10, Kind.CONST, "", 9),
        btf.Ref(11, Kind.RESTRICT, "", 2),
        btf.FuncProto(12, Kind.FUNC_PROTO, "", 1, (("x", 10), ("", 0))),
        btf.Func(13, Kind.FUNC, "fun", 12, linkage=1),
        btf.Var(14, Kind.VAR, "v", 3, linkage=1),
        btf.Datasec(15, Kind.DATASEC, ".bss", 24, (btf.SectionVar(14, 0, 24),)),
        btf.Float(16, Kind.FLOAT, "double", 8),
        btf.DeclTag(17, Kind.DECL_TAG, "unit:µs", 4, 1),
        btf.DeclTag(18, Kind.DECL_TAG, "doc:all", 4, -1),
        btf.Ref(19, Kind.TYPE_TAG, "rcu", 10),
        btf.Enum(20, Kind.ENUM64, "", 8, False, (("BIG", 1 << 32), ("TOP", (1 << 64) - 1))),
        btf.Enum(21, Kind.ENUM64, "", 8, True, (("LOW", -2),)),
    ]
    assert types.resolve(19) == types.struct("s") == types.find("s", Kind.STRUCT) == types.type(4)
    assert types.find("s", Kind.UNION) is None
    assert [types.size_of(i) for i in (1, 2, 3, 4, 5, 6, 10, 11, 14, 15, 16, 19, 20)] == [
        4,
        8,
        24,
        16,
        4,
        4,
        16,
        8,
        24,
        24,
        8,
        16,
        8,
    ]
    assert types.enumerators(types.type(6)) == {-1: "MINUS", 1: "ONE"}
    assert [types.enum_value(name) for name in ("UNO", "MINUS", "BIG", "LOW", "NE")] == [
        1,
        -1,
        1 << 32,
        -2,
        None,
    ]
    assert types.func_params("fun") == [("x", 10), ("", 0)]
    assert types.decl_tags(4, 1) == ("unit:µs",)
    assert types.decl_tags(4) == ("doc:all",)


def test_field_looks_into_anonymous_members() -> None:
    blob = Blob()
    blob.add(Kind.INT, "int", 4, 32)
    blob.add(Kind.UNION, "", 8, "deep", 1, 32, count=1)
    blob.add(Kind.CONST, "", 2)
    blob.add(Kind.STRUCT, "outer", 24, "named", 5, 0, "", 3, 64, "last", 1, 7 << 24 | 128, count=3, flag=True)
    blob.add(Kind.STRUCT, "inner", 8, "hidden", 1, 0, count=1)
    blob.add(Kind.STRUCT, "ring", 8, "", 6, 0, count=1)
    types = blob.parse()
    assert types.field("outer", "deep") == btf.Member("deep", 1, 96)
    assert types.field("outer", "last") == btf.Member("last", 1, 128, 7)
    assert types.field("outer", "hidden") is None
    assert types.field("ring", "x") is None


def test_a_name_may_be_the_tail_of_another() -> None:
    blob = Blob()
    blob.add(Kind.FLOAT, "long_name", 8)
    blob.add(Kind.FLOAT, "", 4)
    blob.words[3] = blob.words[0] + len("long_")
    types = blob.parse()
    found = types.find("name", Kind.FLOAT)
    assert found is not None
    assert found.id == 2
    assert types.find("_name", Kind.FLOAT) is None


def test_every_type_of_a_name() -> None:
    blob = Blob()
    blob.add(Kind.FLOAT, "twice", 8)
    blob.add(Kind.FWD, "twice")
    blob.add(Kind.FLOAT, "twice", 4)
    types = blob.parse()
    assert [found.id for found in types.find_all("twice", Kind.FLOAT)] == [1, 3]
    assert list(types.find_all("thrice", Kind.FLOAT)) == []


def test_a_newer_kind_is_stepped_over_by_its_layout() -> None:
    blob = Blob()
    blob.add(Kind.ENUM64 + 1, "new", 0, 7, 1, 2, 3, 4, count=2)
    blob.add(Kind.FLOAT, "double", 8)
    with pytest.raises(BtfError, match="unknown kind 20"):
        blob.parse()
    types = Btf.parse(blob.data(layout=bytes(4 * 20) + bytes([4, 8, 0, 0])))
    assert types.type(1) == btf.Type(1, Kind.UNKNOWN, "new")
    assert types.type(2).name == "double"


def endless(blob: Blob) -> None:
    blob.add(Kind.TYPEDEF, "a", 2)
    blob.add(Kind.CONST, "", 3)
    blob.add(Kind.ARRAY, "", 0, 1, 4, 2)
    blob.add(Kind.INT, "int", 4, 32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda b: b.add(Kind.PTR, "", 2), "refers to type 2, of 1"),
        (lambda b: b.add(Kind.ARRAY, "", 0, 1, 9, 0), "refers to type 9"),
        (lambda b: b.add(Kind.STRUCT, "s", 4, "x", 7, 0, count=1), "refers to type 7"),
        (lambda b: b.add(Kind.FUNC_PROTO, "", 0, "x", 7, count=1), "refers to type 7"),
        (lambda b: b.add(Kind.DATASEC, "", 0, 7, 0, 0, count=1), "refers to type 7"),
        (lambda b: b.add(Kind.ENUM, "", 4, 999, 1, count=1), "name at byte 999"),
        (lambda b: b.words.extend([999, Kind.PTR << 24, 0]), "name at byte 999"),
        (lambda b: b.add(Kind.STRUCT, "s", 4, "x", 0, 0, count=2), "type 1 is cut short"),
        (lambda b: b.words.extend([0, Kind.PTR << 24]), "unknown kind 0"),
        (lambda b: b.add(0, ""), "unknown kind 0"),
        (lambda b: b.add(77, ""), "unknown kind 77"),
        (lambda b: b.add(Kind.CONST, "", 1), "defined by itself"),
        (endless, "defined by itself"),
    ],
)
def test_contradictions(build: Callable[[Blob], object], message: str) -> None:
    blob = Blob()
    build(blob)
    with pytest.raises(BtfError, match=message):
        blob.parse()


def test_a_struct_that_points_to_itself_is_no_contradiction() -> None:
    blob = Blob()
    blob.add(Kind.STRUCT, "list", 8, "next", 2, 0, count=1)
    blob.add(Kind.PTR, "", 1)
    assert blob.parse().size_of(1) == 8


def test_a_long_chain_of_forward_references_is_walked_once() -> None:
    blob = Blob()
    for type_id in range(1, 20001):
        blob.words += [0, Kind.CONST << 24, type_id + 1]
    blob.add(Kind.INT, "int", 4, 32)
    before = time.process_time()
    assert blob.parse().size_of(1) == 4
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short: 0 bytes"),
        (Blob().data(magic=0x9FEB), "magic 0x9feb"),
        (Blob().data(version=2), "version 2"),
        (Blob().data(flags=1), "flags 0x1"),
        (Blob().data()[:-1], "string section ends at byte 25 of 24"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 23, 0, 0, 0, 1) + b"\0", "header claims 23"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 26, 0, 0, 0, 1) + b"\0", "header claims 26"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, 0), "start and end with NUL"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 0, 0, 2) + b"\0x", "start and end with NUL"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 3, 3, 1) + bytes(4), "type section has 3 bytes"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 99, 0, 1) + b"\0", "type section ends at byte 123"),
        (Blob().data(layout=b"123"), "layout section has 3 bytes"),
        (Blob().data(layout=bytes(80) + b"\3\0\0\0"), "a kind of 3 and 0 bytes"),
    ],
)
def test_broken_headers(data: bytes, message: str) -> None:
    with pytest.raises(BtfError, match=message):
        Btf.parse(data)


def test_questions_without_an_answer() -> None:
    blob = Blob()
    blob.add(Kind.FWD, "f")
    types = blob.parse()
    for type_id in (0, 1, 2, -1):
        with pytest.raises(BtfError):
            types.size_of(type_id)
    with pytest.raises(BtfError, match="it is a FWD"):
        types.enumerators(types.type(1))
    with pytest.raises(BtfError, match="no struct 'f'"):
        types.struct("f")


SOURCE = """
#define tag(text) __attribute__((btf_decl_tag(text)))
enum outcome { ESTABLISHED, REFUSED = 5 };
enum { DEPTH = 7, WIDTH };
typedef unsigned int u32;
struct event {
    u32 pid tag("doc:process");
    u32 low : 3, high : 5;
    union { long latency_us tag("unit:us"); char text[16]; };
    enum outcome outcome;
    const struct event *next;
};
struct event *anchor;
const volatile u32 limit = 3;
const volatile short depth = DEPTH;
int probe(struct event *event, u32 count) { return event->pid + count + limit + depth; }
"""


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("btf")
    (folder / "probe.c").write_text(SOURCE)
    command = ["clang", "-target", "bpf", "-g", "-O2", "-c", "probe.c", "-o", "probe.o"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "probe.o").read_bytes()


def test_an_object_from_clang(object_file: bytes) -> None:
    types = Btf.parse(elf.sections(object_file)[".BTF"])
    event = types.struct("event")
    assert event.size == types.size_of(event.id) == 40
    assert [(m.name, m.bit_offset, m.bitfield_size) for m in event.members] == [
        ("pid", 0, 0),
        ("low", 32, 3),
        ("high", 35, 5),
        ("", 64, 0),
        ("outcome", 192, 0),
        ("next", 256, 0),
    ]
    assert types.decl_tags(event.id, 0) == ("doc:process",)
    union = types.resolve(event.members[3].type_id)
    assert types.decl_tags(union.id, 0) == ("unit:us",)
    text = types.field("event", "text")
    assert text is not None
    assert (text.bit_offset, types.size_of(text.type_id)) == (64, 16)
    assert types.enumerators(types.resolve(event.members[4].type_id)) == {0: "ESTABLISHED", 5: "REFUSED"}
    assert types.enum_value("REFUSED") == 5
    params = types.func_params("probe")
    assert params is not None
    assert [name for name, _ in params] == ["event", "count"]
    assert types.type(params[1][1]).name == "u32"
    rodata = types.find(".rodata", Kind.DATASEC)
    assert isinstance(rodata, btf.Datasec)
    assert {types.type(variable.type_id).name for variable in rodata.variables} == {"limit", "depth"}


@pytest.fixture(scope="module")
def vmlinux() -> Btf:
    if not VMLINUX.exists():
        pytest.skip("this kernel has no BTF")
    return Btf.parse(VMLINUX.read_bytes())


def as_bpftool(found: btf.Type) -> dict[str, Any]:
    """A type as `bpftool -j btf dump` shows it, without the fields that tcpscope has no use for."""
    known: dict[str, Any] = {"id": found.id, "kind": found.kind.name, "name": found.name or "(anon)"}
    match found:
        case btf.Int():
            encoding = "SIGNED" if found.signed else "CHAR" if found.is_char else "BOOL" if found.is_bool else "(none)"
            return known | {"size": found.size, "nr_bits": found.bits, "encoding": encoding}
        case btf.Float():
            return known | {"size": found.size}
        case btf.Array():
            return known | {"type_id": found.type_id, "nr_elems": found.count}
        case btf.Struct():
            members = [
                {"name": m.name or "(anon)", "type_id": m.type_id, "bits_offset": m.bit_offset}
                | ({"bitfield_size": m.bitfield_size} if m.bitfield_size else {})
                for m in found.members
            ]
            return known | {"size": found.size, "members": members}
        case btf.Enum():
            return known | {
                "size": found.size,
                "encoding": "SIGNED" if found.signed else "UNSIGNED",
                "values": [{"name": name, "val": value} for name, value in found.values],
            }
        case btf.Fwd():
            return known | {"fwd_kind": "union" if found.is_union else "struct"}
        case btf.FuncProto():
            params = [{"name": name or "(anon)", "type_id": type_id} for name, type_id in found.params]
            return known | {"ret_type_id": found.return_id, "params": params}
        case btf.Func() | btf.Var():
            linkage = ["static", "global", "extern"][found.linkage]
            return known | {"type_id": found.type_id, "linkage": linkage}
        case btf.Datasec():
            variables = [{"type_id": v.type_id, "offset": v.offset, "size": v.size} for v in found.variables]
            return known | {"size": found.size, "vars": variables}
        case btf.DeclTag():
            return known | {"type_id": found.type_id, "component_idx": found.component_idx}
        case btf.Ref():
            return known | {"type_id": found.type_id}
    raise AssertionError(found)


@pytest.mark.skipif(BPFTOOL is None, reason="bpftool is the witness, and is not installed")
def test_the_kernel_as_bpftool_sees_it(vmlinux: Btf) -> None:
    dump = subprocess.run([str(BPFTOOL), "-j", "btf", "dump", "file", str(VMLINUX)], check=True, capture_output=True)
    theirs = json.loads(dump.stdout)["types"]
    assert len(theirs) == len(vmlinux) - 1
    for their, our in zip(theirs, vmlinux.types, strict=True):
        expected = {key: their[key] for key in their if key not in ("vlen", "bits_offset", "index_type_id")}
        if expected["kind"] == "ENUM" and expected["encoding"] == "UNSIGNED":
            for value in expected["values"]:
                value["val"] &= 0xFFFFFFFF  # bpftool extends the sign of unsigned ones, too
        assert as_bpftool(our) == expected


def test_the_kernel_finds_its_own(vmlinux: Btf) -> None:
    srtt = vmlinux.field("tcp_sock", "srtt_us")
    assert srtt is not None
    assert vmlinux.size_of(srtt.type_id) == 4
    assert vmlinux.field("tcp_sock", "no_such_field") is None
    assert vmlinux.field("sock_common", "skc_daddr") is not None  # inside two anonymous members
    assert vmlinux.enum_value("TCP_ESTABLISHED") == 1
    assert vmlinux.enum_value("BPF_TCP_LISTEN") == 10
    assert vmlinux.enum_value("LINUX_MIB_LISTENOVERFLOWS") is not None
    params = vmlinux.func_params("tcp_v4_connect")
    assert params is not None
    assert params[0][0] == "sk"
    pointer = vmlinux.resolve(params[0][1])
    assert isinstance(pointer, btf.Ref)
    assert vmlinux.resolve(pointer.type_id) == vmlinux.struct("sock")


def test_the_first_of_each_name_is_found(vmlinux: Btf) -> None:
    """`find` through the index agrees with a plain walk over all types."""
    first: dict[tuple[str, Kind], int] = {}
    for found in vmlinux.types:
        if found.name and found.id % 97 == 0 and found.kind is not Kind.DECL_TAG:
            first.setdefault((found.name, found.kind), 0)
    for found in vmlinux.types:
        if first.get((found.name, found.kind)) == 0:
            first[found.name, found.kind] = found.id
    for (name, kind), type_id in first.items():
        hit = vmlinux.find(name, kind)
        assert hit is not None
        assert hit.id == type_id


def test_the_kernel_is_indexed_quickly() -> None:
    if not VMLINUX.exists():
        pytest.skip("this kernel has no BTF")
    data = VMLINUX.read_bytes()
    times = []
    for _ in range(5):
        before = time.process_time()
        Btf.parse(data)
        times.append(time.process_time() - before)
    assert min(times) < 1  # measured 0.14 s; the limit is for slow and emulated machines


def exercise(data: bytes) -> None:
    """Whatever the bytes: a `BtfError`, or types that answer every question with a value or a `BtfError`."""
    try:
        types = Btf.parse(data)
    except BtfError:
        return
    for found in types.types:
        types.resolve(found.id)
        types.decl_tags(found.id)
        types.field(found.name, "x")
        types.func_params(found.name)
        types.find(found.name, Kind.TYPEDEF)
        if isinstance(found, btf.Enum):
            types.enumerators(found)
            for name, _ in found.values:
                types.enum_value(name)
        with suppress(BtfError):
            types.size_of(found.id)


@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    exercise(data)


@given(st.lists(st.integers(0, 40), max_size=80), st.binary(max_size=40))
def test_garbage_behind_a_good_header(words: list[int], strings: bytes) -> None:
    blob = Blob()
    blob.words = [word << 24 if place % 3 == 1 and word < 20 else word for place, word in enumerate(words)]
    blob.strings = b"\0" + strings + b"\0"
    exercise(blob.data())


@settings(max_examples=300)
@given(st.data())
def test_mutated_and_cut(object_file: bytes, data: st.DataObject) -> None:
    good = elf.sections(object_file)[".BTF"]
    blob = bytearray(good[: data.draw(st.integers(0, len(good)) | st.just(len(good)))])
    if blob:
        for at in data.draw(st.lists(st.integers(0, len(blob) - 1), max_size=6)):
            blob[at] = data.draw(st.integers(0, 255))
    exercise(bytes(blob))
