"""Reads sections and symbols of a BPF object file: little-endian ELF64, as clang writes it (elf(5)).

It reads what finds the BTF and the offsets of variables. libbpf does the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from tcpscope.errors import MalformedError

_IDENT = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_SYMTAB = 2
_SHT_NOBITS = 8


class Symbol(msgspec.Struct, frozen=True):
    """A symbol. `section` is the name of its section, empty if it has none."""

    name: str
    section: str
    value: int
    size: int


class _Section(msgspec.Struct, frozen=True):
    name: str
    type: int
    link: int
    data: bytes


def sections(data: bytes) -> dict[str, bytes]:
    """The sections of an object file by name. A section without bytes in the file (.bss) is empty.

    Raises MalformedError.
    """
    found: dict[str, bytes] = {}
    for section in _read(data):
        found.setdefault(section.name, section.data)
    return found


def symbols(data: bytes) -> list[Symbol]:
    """The named symbols of an object file. Raises MalformedError."""
    table = _read(data)
    symtabs = (section for section in table if section.type == _SHT_SYMTAB)
    return [symbol for symtab in symtabs for symbol in _symbols(symtab, table)]


def _symbols(symtab: _Section, table: list[_Section]) -> Iterator[Symbol]:
    if len(symtab.data) % _SYMBOL.size:
        raise MalformedError(f"ELF symbol table of {len(symtab.data)} bytes", f"one has {_SYMBOL.size}")
    if symtab.link >= len(table):
        raise MalformedError(f"ELF symbol names are in section {symtab.link} of {len(table)}")
    names = table[symtab.link].data
    for name_at, _info, _other, index, value, size in _SYMBOL.iter_unpack(symtab.data):
        if name_at:
            section = table[index].name if index < len(table) else ""
            yield Symbol(_text(names, name_at), section, value, size)


def _read(data: bytes) -> list[_Section]:
    if not data.startswith(_IDENT):
        raise MalformedError(f"not a little-endian ELF64 object: it starts with '{data[:7].hex(' ')}'")
    if len(data) < _HEADER.size:
        raise MalformedError(f"ELF is cut short: {len(data)} bytes, its header alone has {_HEADER.size}")
    header = _HEADER.unpack_from(data)
    table_at, entry_size, count, names_index = header[6], *header[11:]
    if not count:
        return []
    if entry_size != _SECTION.size:
        raise MalformedError(f"ELF section headers of {entry_size} bytes", f"expected {_SECTION.size}")
    entries = list(_SECTION.iter_unpack(_slice(data, table_at, count * entry_size)))
    contents = [b"" if type_ == _SHT_NOBITS else _slice(data, at, size) for _, type_, _, _, at, size, *_ in entries]
    if names_index >= count:
        raise MalformedError(f"ELF section names are in section {names_index} of {count}")
    names = contents[names_index]
    return [
        _Section(_text(names, entry[0]), entry[1], entry[6], content)
        for entry, content in zip(entries, contents, strict=True)
    ]


def _slice(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise MalformedError(f"ELF is cut short: {len(data)} bytes, something in it ends at {at + size}")
    return data[at : at + size]


def _text(strings: bytes, at: int) -> str:
    end = strings.find(0, at)
    if end < 0:
        raise MalformedError(f"ELF name at byte {at} does not end in its {len(strings)} bytes of strings")
    return strings[at:end].decode(errors="replace")
