"""A struct without tags, read by its BTF alone. The bytes are made by a C compiler, from the same source."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tcpscope.errors import BtfError
from tcpscope.kernel.spec import Spec
from tcpscope.schema import Clock, Layout
from tests.compiled import compiled

TYPES = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
enum color { COLOR_RED, COLOR_GREEN = 5, COLOR_BLUE };
enum sign { SIGN_MINUS = -1, SIGN_NONE, SIGN_PLUS };
enum small { SMALL_A, SMALL_B } __attribute__((packed));
struct end { u16 port; u8 bytes[4]; };
struct pair { u8 low : 3, high : 5; u16 plain; };
union both { u32 number; u8 octets[4]; };
struct hop { u32 ttl; struct end via; };
"""
EVENT = """
struct event {
	char name[12];
	signed char small;
	_Bool yes, no;
	enum small packed;
	enum color color;
	enum sign sign;
	struct end src, dst;
	u32 grid[2][3];
	short below_zero[2];
	enum color colors[3];
	char words[2][4];
	struct hop hops[2];
	u32 one : 1, three : 3, twelve : 12;
	int minus : 5;
	u64 wide : 40;
	u64 wider : 24;
	enum color field : 4;
	struct pair pair[2];
	union both both;
	union { u32 left; u16 right[2]; };
	struct { u8 nameless; };
	void *pointer;
	u64 last;
	u8 rest[];
};
"""
VALUES = """
{
	.name = "caf\\303\\251", .small = -3, .yes = 1, .packed = SMALL_B, .color = COLOR_BLUE, .sign = SIGN_MINUS,
	.src = {80, {192, 0, 2, 1}}, .dst = {443, {10, 0, 0, 1}}, .grid = {{1, 2, 3}, {4, 5, 6}}, .below_zero = {-1, -300},
	.colors = {COLOR_GREEN, COLOR_RED, 77}, .words = {"ab", "cd"},
	.hops = {{64, {1, {1, 2, 3, 4}}}, {63, {2, {5, 6, 7, 8}}}},
	.one = 1, .three = 5, .twelve = 0xabc, .minus = -11, .wide = 0x123456789aULL, .wider = 0xfedcba,
	.field = COLOR_GREEN, .pair = {{5, 17, 1000}, {2, 31, 2000}}, .both = {.number = 0x04030201},
	.left = 0x00020001, .nameless = 9, .pointer = (void *)0xffff888012345678ULL, .last = 0xffffffffffffffffULL,
}
"""
ROW = {
    "name": "café",
    "small": -3,
    "yes": True,
    "no": False,
    "packed": "B",
    "color": "BLUE",
    "src_port": 80,
    "src_bytes": [192, 0, 2, 1],
    "dst_port": 443,
    "dst_bytes": [10, 0, 0, 1],
    "grid": [[1, 2, 3], [4, 5, 6]],
    "below_zero": [-1, -300],
    "colors": ["GREEN", "RED", "77"],
    "words": ["ab", "cd"],
    "ttl": [64, 63],
    "hops_via_port": [1, 2],
    "hops_via_bytes": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "one": 1,
    "three": 5,
    "twelve": 0xABC,
    "minus": -11,
    "wide": 0x123456789A,
    "wider": 0xFEDCBA,
    "field": "GREEN",
    "low": [5, 2],
    "high": [17, 31],
    "plain": [1000, 2000],
    "number": 0x04030201,
    "octets": [1, 2, 3, 4],
    "left": 0x20001,
    "right": [1, 2],
    "nameless": 9,
    "pointer": "0xffff888012345678",
    "last": 2**64 - 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def spec_of(folder: Path, name: str, text: str) -> Spec:
    return compiled(folder, name, f"{text}\nconst struct event *anchor __attribute__((unused));\n")


def bytes_of(folder: Path, text: str, values: str) -> bytes:
    """The bytes of a struct, as a C compiler of this machine lays it out."""
    (folder / "it.c").write_text(
        f"#include <stdio.h>\n{text}\nstatic struct event it = {values};\n"
        "int main(void) { return fwrite(&it, sizeof(it), 1, stdout) != 1; }\n"
    )
    subprocess.run(["gcc", "-std=gnu11", "it.c", "-o", "it"], cwd=folder, check=True)
    return subprocess.run([folder / "it"], capture_output=True, check=True).stdout


def rows(layout: Layout, data: bytes) -> Iterator[dict[str, Any]]:
    yield from map(msgspec.structs.asdict, layout.decoder(Clock("none")).rows(data))


def test_nested_types_arrays_enums_bit_fields_and_unions(folder: Path) -> None:
    layout = Layout.whole(spec_of(folder, "event", TYPES + EVENT).btf, "event")
    data = bytes_of(folder, TYPES + EVENT, VALUES)
    assert layout.size == len(data)
    first, second = rows(layout, data * 2)
    sign = first.pop("sign")
    assert sign in ("MINUS", str(2**32 - 1))  # before clang 15 the BTF does not say that the enum has a sign
    assert first == ROW
    assert second == ROW | {"sign": sign}


def test_only_some_of_them(folder: Path) -> None:
    layout = Layout.whole(spec_of(folder, "event", TYPES + EVENT).btf, "event")
    data = bytes_of(folder, TYPES + EVENT, VALUES)
    for names in (["high"], ["twelve", "name"], ["octets", "last"], ["right"], ["dst_port", "grid"]):
        (row,) = rows(layout.select(names), data)
        assert row == {name: ROW[name] for name in names}


def test_tags_mean_the_same(folder: Path) -> None:
    text = """
    #define KIND(text) __attribute__((btf_decl_tag("kind:" text)))
    #define UNKNOWN(text) __attribute__((btf_decl_tag("unknown:" text)))
    typedef unsigned char u8; typedef unsigned int u32; typedef unsigned long long u64;
    struct event {
        u8 laddr[16] KIND("address");
        u32 raddr KIND("address");
        u8 third[4] KIND("address");
        u8 several[2][16] KIND("address");
        u32 number UNKNOWN("zero");
        u32 numbers[2] UNKNOWN("max");
        u32 error KIND("errno");
        u64 stack[3] KIND("stack");
    };
    """
    mapped = ", ".join(["0"] * 10 + ["255", "255", "192", "0", "2"])
    values = f"""{{
        .laddr = {{0x20, 1, 0xd, 0xb8, [15] = 7}}, .raddr = 0x0100000a, .third = {{10, 1, 2, 3}},
        .several = {{{{{mapped}, 8}}, {{{mapped}, 9}}}}, .numbers = {{5, -1}}, .error = 111, .stack = {{4096, 8192}},
    }}"""
    host = text.replace('KIND(text) __attribute__((btf_decl_tag("kind:" text)))', "KIND(text)")
    host = host.replace('UNKNOWN(text) __attribute__((btf_decl_tag("unknown:" text)))', "UNKNOWN(text)")
    layout = Layout.whole(spec_of(folder, "tagged", text).btf, "event")
    (row,) = rows(layout, bytes_of(folder, host, values))
    assert row == {
        "laddr": "2001:db8::7",
        "raddr": "10.0.0.1",
        "third": "10.1.2.3",
        "several": ["192.0.2.8", "192.0.2.9"],
        "number": None,
        "numbers": [5, None],
        "error": "ECONNREFUSED",
        "stack": ["0x1000", "0x2000"],
    }


def test_a_struct_of_ours_hides_what_is_internal(folder: Path) -> None:
    text = '#include "event.bpf.h"\nstruct mine { struct event event; __u32 number; __u32 padding; };'
    spec = compiled(folder, "mine", f"{text}\nconst struct mine *anchor __attribute__((unused));\n")
    names = [field.name for field in Layout.whole(spec.btf, "mine").fields]
    assert names[0] == "time" and names[-1] == "number"
    assert {"cookie", "pid", "cgroup"} < set(names)
    assert not {"in_cgroup", "has_filter_pid", "padding"} & set(names)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("__int128 big;", "field 'big' is a INT of 16 bytes, which cannot be shown"),
        ("double d;", "field 'd' is a FLOAT of 8 bytes, which cannot be shown"),
        ('unsigned char mac[6] __attribute__((btf_decl_tag("kind:address")));', "field 'mac' is an address of 6 bytes"),
    ],
)
def test_what_cannot_be_shown(folder: Path, field: str, said: str) -> None:
    spec = spec_of(folder, "odd", f"struct event {{ {field} }};")
    with pytest.raises(BtfError) as error:
        Layout.whole(spec.btf, "event")
    assert said in str(error.value)
