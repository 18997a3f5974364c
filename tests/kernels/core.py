"""The CO-RE relocations of an object, looked up in the BTF of a kernel without that kernel.

libbpf does this when it loads an object. Each record of the section `.BTF.ext` names a type of the object, a path into
it and what is asked of it. What does not exist there makes the instruction one that no verifier takes; but a program
can ask whether it exists, and the verifier does not look at what is then never reached. The format:
Documentation/bpf/btf.rst in the kernel's tree.

libbpf's rules, as far as objects here use them:
- A type is looked for by its name and kind, without the part of the name from `___` on. All that are called so are
  looked at, and those that have the path must have it at the same place.
- A field is looked for by its name, also in anonymous members. Its kind must be the same: a number for a number of any
  width, a pointer for any pointer, a struct or union for any, an array for one of such elements.
- An index must be within the array, unless that has no length.
- An enumerator is looked for by its name, and in several enums it must have the same value.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from tcpscope.kernel import elf
from tcpscope.kernel.btf import Array, Btf, Enum, Kind, Member, Struct, Type
from tcpscope.kernel.spec import Spec
from tests.kernels import code
from tests.kernels.offline import Offline

_HEADER = struct.Struct("<HBBI")
_PARTS = struct.Struct("<IIIIII")  # offset and length of functions, lines, relocations
_SECTION = struct.Struct("<II")
_RECORD = struct.Struct("<IIII")
_ENUMS = (Kind.ENUM, Kind.ENUM64)


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


QUESTIONS = (Asks.FIELD_EXISTS, Asks.TYPE_EXISTS, Asks.ENUMERATOR_EXISTS, Asks.TYPE_MATCHES)
OF_ENUMERATORS = (Asks.ENUMERATOR_EXISTS, Asks.ENUMERATOR_VALUE)


class Place(NamedTuple):
    """An instruction: the program or function that it is in, and where it is in the section."""

    piece: str
    at: int


@dataclass(frozen=True)
class Relocation:
    """One question.

    path   names of fields from the type on, and indices of arrays; of an enum the name of the enumerator
    kinds  what each step leads to: the kind, below an array with that of its elements, and of an enum its name
    """

    asks: Asks
    type: str
    kind: Kind
    path: tuple[str | int, ...]
    kinds: tuple[tuple[Kind | str, ...], ...] = ()

    def __str__(self) -> str:
        fields = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)
        return f"{self.type}{fields}"


@cache
def relocations(spec: Spec) -> Mapping[Relocation, frozenset[Place]]:
    """All of an object, each with the places where it stands."""
    sections = elf.sections(spec.data)
    data = sections[".BTF.ext"]
    _magic, _version, _flags, size = _HEADER.unpack_from(data)
    *_others, offset, length = _PARTS.unpack_from(data, _HEADER.size)
    found: dict[Relocation, frozenset[Place]] = {}
    for section, instruction, type_id, text_at, asks in _records(data[size + offset : size + offset + length]):
        name = _text(sections[".BTF"], section)
        one = _relocation(spec.btf, type_id, _text(sections[".BTF"], text_at), Asks(asks))
        found[one] = found.get(one, frozenset()) | {Place(_piece(spec, name, instruction), instruction)}
    return found


def _records(part: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    at = 4  # the size of a record, 16
    while at < len(part):
        name, count = _SECTION.unpack_from(part, at)
        at += _SECTION.size
        for _ in range(count):
            yield (name, *_RECORD.unpack_from(part, at))
            at += _RECORD.size


def _piece(spec: Spec, section: str, at: int) -> str:
    return next(name for name, own in code.pieces(spec).items() if own.section == section and own.begin <= at < own.end)


def _text(btf: bytes, at: int) -> str:
    header, _types, _types_size, strings, _size = struct.unpack_from("<IIIII", btf, 4)
    start = header + strings + at
    return btf[start : btf.index(0, start)].decode()


def _relocation(btf: Btf, type_id: int, access: str, asks: Asks) -> Relocation:
    root = btf.type(type_id)
    name, kind = essential(root.name), root.kind
    steps = [int(step) for step in access.split(":")]
    at = btf.resolve(type_id)
    if asks in OF_ENUMERATORS:
        assert isinstance(at, Enum)
        return Relocation(asks, name, kind, (essential(at.values[steps[0]][0]),))
    path: list[str | int] = []
    kinds = []
    for step in steps[1:]:
        if isinstance(at, Struct):
            member = at.members[step]
            at = btf.resolve(member.type_id)
            if member.name:
                path.append(member.name)
                kinds.append(_shape(btf, at))
        else:
            assert isinstance(at, Array)
            at = btf.resolve(at.type_id)
            path.append(step)
            kinds.append(_shape(btf, at))
    return Relocation(asks, name, kind, tuple(path), tuple(kinds))


def essential(name: str) -> str:
    """The name that counts: a flavour is told from another one by what follows `___`."""
    return name.partition("___")[0]


def _shape(btf: Btf, type_: Type) -> tuple[Kind | str, ...]:
    """What must be the same of two fields."""
    if isinstance(type_, Array):
        return (Kind.ARRAY, *_shape(btf, btf.resolve(type_.type_id)))
    if type_.kind in _ENUMS:
        return Kind.ENUM, essential(type_.name)
    if type_.kind is Kind.FWD:
        return Kind.FWD, essential(type_.name)
    return (Kind.STRUCT if type_.kind is Kind.UNION else type_.kind,)


def _compatible(mine: tuple[Kind | str, ...], theirs: tuple[Kind | str, ...]) -> bool:
    return len(mine) == len(theirs) and all(
        a == b or (isinstance(a, str) and isinstance(b, str) and not (a and b))
        for a, b in zip(mine, theirs, strict=True)
    )


def ends(relocation: Relocation, kernel: Offline) -> list[Member]:
    """What the kernel has there, in each type of that name: the last step's type, and where from the start it lies.

    The end of an enumerator's path has its value for a place, a type alone is its own end.
    """
    kinds = _ENUMS if relocation.kind in _ENUMS else (relocation.kind,)
    starts = [start for kind in kinds for start in kernel.types(relocation.type, kind)]
    return [end for start in starts if (end := _end(relocation, kernel.btf, start))]


def _end(relocation: Relocation, kernel: Btf, start: Type) -> Member | None:
    if relocation.asks in OF_ENUMERATORS:
        values = dict(start.values) if isinstance(start, Enum) else {}
        name = str(relocation.path[0])
        return Member(name, start.id, values[name]) if name in values else None
    end = Member("", start.id, 0)
    for step, shape in zip(relocation.path, relocation.kinds, strict=True):
        further = _step(kernel, kernel.resolve(end.type_id), step)
        if further is None or not _compatible(shape, _shape(kernel, kernel.resolve(further.type_id))):
            return None
        end = _from(end, further)
    return end


def _step(kernel: Btf, at: Type, step: str | int) -> Member | None:
    """A field, or an element of an array, from the start of what it is in."""
    if isinstance(step, int):
        if not isinstance(at, Array) or 0 < at.count <= step:
            return None
        return Member("", at.type_id, 8 * step * kernel.size_of(at.type_id))
    for member in at.members if isinstance(at, Struct) else ():
        if member.name == step:
            return member
        if not member.name and (inner := _step(kernel, kernel.resolve(member.type_id), step)):
            return _from(member, inner)
    return None


def _from(outer: Member, inner: Member) -> Member:
    return Member(inner.name, inner.type_id, outer.bit_offset + inner.bit_offset, inner.bitfield_size)
