"""The CO-RE relocations of an object, looked up in the BTF of a kernel without that kernel: `.BTF.ext`.

libbpf does this when it loads an object: each record names a type of the object, a path into it and what is asked of
it. What is said here is the answer: found, or not; and whether the object asks beforehand if it is there, so that a
program does not use what it does not find. The format: Documentation/bpf/btf.rst in the kernel's tree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from tcpscope.kernel import elf
from tcpscope.kernel.btf import Array, Btf, Enum, Kind, Struct, Type
from tcpscope.kernel.spec import Spec

_HEADER = struct.Struct("<HBBI")
_PARTS = struct.Struct("<IIIIII")  # offset and length of functions, lines, relocations
_SECTION = struct.Struct("<II")
_RECORD = struct.Struct("<IIII")


class Asks(IntEnum):
    """What a relocation asks (`enum bpf_core_relo_kind`)."""

    FIELD_OFFSET = 0
    FIELD_SIZE = 1
    FIELD_EXISTS = 2
    FIELD_SIGNED = 3
    FIELD_LSHIFT = 4
    FIELD_RSHIFT = 5
    TYPE_ID_LOCAL = 6
    TYPE_ID_TARGET = 7
    TYPE_EXISTS = 8
    TYPE_SIZE = 9
    ENUMERATOR_EXISTS = 10
    ENUMERATOR_VALUE = 11
    TYPE_MATCHES = 12


_QUESTIONS = (Asks.FIELD_EXISTS, Asks.TYPE_EXISTS, Asks.ENUMERATOR_EXISTS, Asks.TYPE_MATCHES)


@dataclass(frozen=True)
class Relocation:
    """One question. `path` are the names of fields from the type on, array indices among them as numbers."""

    asks: Asks
    type: str
    kind: Kind
    path: tuple[str | int, ...]

    def __str__(self) -> str:
        fields = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)
        return f"{self.type}{fields}"


def relocations(spec: Spec) -> list[Relocation]:
    """All of an object, each once."""
    data = elf.sections(spec.data)[".BTF.ext"]
    _magic, _version, _flags, size = _HEADER.unpack_from(data)
    *_others, offset, length = _PARTS.unpack_from(data, _HEADER.size)
    strings = elf.sections(spec.data)[".BTF"]
    found: dict[Relocation, None] = {}
    for type_id, text_at, kind in _records(data[size + offset : size + offset + length]):
        found[_relocation(spec.btf, type_id, _text(strings, text_at), Asks(kind))] = None
    return list(found)


def _records(part: bytes) -> Iterator[tuple[int, int, int]]:
    at = 4  # the size of a record, 16
    while at < len(part):
        _name, count = _SECTION.unpack_from(part, at)
        at += _SECTION.size
        for _ in range(count):
            _instruction, type_id, text_at, kind = _RECORD.unpack_from(part, at)
            yield type_id, text_at, kind
            at += _RECORD.size


def _text(btf: bytes, at: int) -> str:
    header, _types, _types_size, strings, _size = struct.unpack_from("<IIIII", btf, 4)
    start = header + strings + at
    return btf[start : btf.index(0, start)].decode()


def _relocation(btf: Btf, type_id: int, access: str, asks: Asks) -> Relocation:
    root = btf.type(type_id)
    name, kind = root.name.partition("___")[0], root.kind
    steps = [int(step) for step in access.split(":")]
    if asks in (Asks.ENUMERATOR_EXISTS, Asks.ENUMERATOR_VALUE):
        enum = btf.resolve(type_id)
        assert isinstance(enum, Enum)
        return Relocation(asks, name, kind, (enum.values[steps[0]][0].partition("___")[0],))
    path: list[str | int] = []
    at: Type = btf.resolve(type_id)
    for step in steps[1:]:
        if isinstance(at, Struct):
            member = at.members[step]
            if member.name:
                path.append(member.name)
            at = btf.resolve(member.type_id)
        else:
            assert isinstance(at, Array)
            path.append(step)
            at = btf.resolve(at.type_id)
    return Relocation(asks, name, kind, tuple(path))


def found(relocation: Relocation, kernel: Btf) -> bool:
    """Whether the kernel has the type, and in it what the path leads to."""
    if relocation.asks is Asks.TYPE_ID_LOCAL:
        return True
    start = _type(kernel, relocation)
    if start is None:
        return False
    if isinstance(start, Enum) and relocation.path:
        return relocation.path[0] in (name for name, _ in start.values)
    at: Type | None = start
    for step in relocation.path:
        at = _step(kernel, at, step)
        if at is None:
            return False
    return True


def _type(kernel: Btf, relocation: Relocation) -> Type | None:
    """An enum or a struct may be behind a typedef, as ours may."""
    if relocation.kind is Kind.TYPEDEF:
        alias = kernel.find(relocation.type, Kind.TYPEDEF)
        return kernel.resolve(alias.id) if alias else None
    return kernel.find(relocation.type, relocation.kind)


def _step(kernel: Btf, at: Type | None, step: str | int) -> Type | None:
    if isinstance(at, Array) and isinstance(step, int):
        return kernel.resolve(at.type_id) if step < at.count or not at.count else None
    if not isinstance(at, Struct):
        return None
    todo: list[Type] = [at]
    for inner in todo:
        for member in inner.members if isinstance(inner, Struct) else ():
            if member.name == step:
                return kernel.resolve(member.type_id)
            if not member.name:
                todo.append(kernel.resolve(member.type_id))
    return None


def missing(spec: Spec, kernel: Btf) -> list[str]:
    """What a program of this object would use and does not find, without having asked whether it is there."""
    all_of_it = relocations(spec)
    absent = [relocation for relocation in all_of_it if not found(relocation, kernel)]
    asked = {(relocation.type, relocation.path) for relocation in absent if relocation.asks in _QUESTIONS}
    return sorted(
        {
            str(relocation)
            for relocation in absent
            if relocation.asks not in _QUESTIONS and not _was_asked(relocation, asked)
        }
    )


def _was_asked(relocation: Relocation, asked: set[tuple[str, tuple[str | int, ...]]]) -> bool:
    """For it, for what it is a part of, or for its type."""
    return any((relocation.type, relocation.path[:size]) in asked for size in range(len(relocation.path) + 1))
