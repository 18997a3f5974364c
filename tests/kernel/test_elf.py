"""ELF: objects from clang, and the same cut, changed and made up."""

from __future__ import annotations

import struct
import subprocess
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpscope.errors import MalformedError
from tcpscope.kernel import elf
from tests import examples  # noqa: F401  for its settings

SOURCE = """
const volatile int limit = 3;
const volatile short depth = 4;
int counter;
__attribute__((section("tp_btf/sock"))) int probe(void *context) { return limit + depth + counter; }
char text[] __attribute__((section("license"))) = "GPL";
"""


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("elf")
    (folder / "probe.c").write_text(SOURCE)
    command = ["clang", "-target", "bpf", "-g", "-O2", "-c", "probe.c", "-o", "probe.o"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "probe.o").read_bytes()


def test_sections(object_file: bytes) -> None:
    sections = elf.sections(object_file)
    assert sections["license"] == b"GPL\0"
    assert sections[".BTF"].startswith(b"\x9f\xeb\x01")
    assert len(sections["tp_btf/sock"]) % 8 == 0
    assert sections[".bss"] == b""


def test_symbols(object_file: bytes) -> None:
    rodata = elf.sections(object_file)[".rodata"]
    found = {symbol.name: symbol for symbol in elf.symbols(object_file)}
    assert found["probe"].section == "tp_btf/sock"
    assert found["counter"] == elf.Symbol("counter", ".bss", 0, 4)
    for name, size, value in (("limit", 4, 3), ("depth", 2, 4)):
        symbol = found[name]
        assert (symbol.section, symbol.size) == (".rodata", size)
        assert int.from_bytes(rodata[symbol.value : symbol.value + size], "little") == value


def header(table_at: int = 64, entry_size: int = 64, count: int = 1, names: int = 0) -> bytes:
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    return struct.pack("<16sHHIQQQIHHHHHH", ident, 1, 247, 1, 0, 0, table_at, 0, 64, 0, 0, entry_size, count, names)


def entry(name: int = 0, type_: int = 3, at: int = 0, size: int = 7, link: int = 0) -> bytes:
    return struct.pack("<IIQQQQIIQQ", name, type_, 0, 0, at, size, link, 0, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a little-endian ELF64"),
        (b"\x7fELF\x02\x02\x01" + bytes(99), "not a little-endian ELF64"),
        (b"\x7fELF\x02\x01\x01", "cut short: 7 bytes"),
        (header(), "cut short: 64 bytes"),
        (header(entry_size=40) + bytes(64), "section headers of 40 bytes"),
        (header(names=1) + entry(), "names are in section 1 of 1"),
        (header() + entry(size=999), "ends at 999"),
        (header() + entry(name=7), "name at byte 7"),
        (header(count=2) + entry(at=63, size=2) + entry(type_=2, size=23), "symbol table of 23 bytes"),
        (header(count=2) + entry(at=63, size=2) + entry(type_=2, size=24, link=2), "in section 2 of 2"),
    ],
)
def test_broken(data: bytes, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        elf.sections(data)
        elf.symbols(data)


def test_no_sections() -> None:
    assert elf.sections(header(count=0)) == {}
    assert elf.symbols(header(count=0)) == []


def exercise(data: bytes) -> None:
    """Whatever the bytes: a value or a `MalformedError`."""
    for read in (elf.sections, elf.symbols):
        with suppress(MalformedError):
            read(data)


@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    exercise(data)
    exercise(header() + data)


@settings(max_examples=300)
@given(st.data())
def test_mutated_and_cut(object_file: bytes, data: st.DataObject) -> None:
    """The header and the section table, at the end, are hit more often than the rest."""
    size = len(object_file)
    blob = bytearray(object_file[: data.draw(st.just(size) | st.integers(0, size))])
    places = st.integers(0, 63) | st.integers(max(size - 2000, 0), size) | st.integers(0, size)
    for at in data.draw(st.lists(places, max_size=6)):
        if at < len(blob):
            blob[at] = data.draw(st.integers(0, 255))
    exercise(bytes(blob))
