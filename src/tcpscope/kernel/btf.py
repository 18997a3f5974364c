"""Reads BTF, the type information of the kernel and of BPF objects.

The format is described in the kernel's Documentation/bpf/btf.rst and defined in include/uapi/linux/btf.h. A
blob is a header, a section of types and a section of NUL-terminated strings. The types are numbered from 1, in
the order of the section; 0 is `void`. A type is three 32-bit words (name, info, size or type), and then what
its kind adds.

    kernel = Btf.parse(Path("/sys/kernel/btf/vmlinux").read_bytes())
    kernel.field("tcp_sock", "srtt_us")               # Member(name='srtt_us', type_id=..., bit_offset=...)
    kernel.enum_value("LINUX_MIB_LISTENOVERFLOWS")    # its number on this kernel
    kernel.func_params("tcp_retransmit_skb")          # [('sk', ...), ('skb', ...), ('segs', ...)]

`Btf.parse` checks the whole blob, so later reads need no checks. It only notes where each type begins. A kernel
has a hundred thousand types, and a program needs some hundred: only these become objects.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import msgspec

from tcpscope.errors import BtfError

_MAGIC = 0xEB9F
_VERSION = 1
_HEADER = struct.Struct("<HBBIIIII")
_LAYOUT_HEADER = struct.Struct("<II")  # ends the header since Linux 7.2, which added the layout section
_LAYOUT = struct.Struct("<BBH")
_MAX_COUNT = 0xFFFFFF  # 16 bits before Linux 7.2; the other 8 were 0
_POINTER_SIZE = 8  # BTF does not say; all kernels tcpscope runs on have 64 bits


class Kind(IntEnum):
    """What a type is (`BTF_KIND_*`). `UNKNOWN` is any kind that is newer than this reader."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19
    UNKNOWN = 0xFF


_KINDS = {kind.value: kind for kind in Kind}
_MODIFIERS = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
_REFERRING = _MODIFIERS | {Kind.PTR, Kind.FUNC, Kind.FUNC_PROTO, Kind.VAR, Kind.DECL_TAG}
_SIZED = frozenset({Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.DATASEC, Kind.FLOAT, Kind.ENUM64})
_SIZED_BY_ANOTHER = _MODIFIERS | {Kind.VAR, Kind.ARRAY}


class _Tail(NamedTuple):
    """The words after the first three: how many once, how many per element, and which of these are ids."""

    once: int = 0
    each: int = 0
    name: int | None = None
    type: int | None = None


_TAILS = [_Tail()] * (Kind.ENUM64 + 1)
_TAILS[Kind.INT] = _Tail(once=1)
_TAILS[Kind.ARRAY] = _Tail(once=3)
_TAILS[Kind.STRUCT] = _Tail(each=3, name=0, type=1)
_TAILS[Kind.UNION] = _Tail(each=3, name=0, type=1)
_TAILS[Kind.ENUM] = _Tail(each=2, name=0)
_TAILS[Kind.FUNC_PROTO] = _Tail(each=2, name=0, type=1)
_TAILS[Kind.VAR] = _Tail(once=1)
_TAILS[Kind.DATASEC] = _Tail(each=3, type=0)
_TAILS[Kind.DECL_TAG] = _Tail(once=1)
_TAILS[Kind.ENUM64] = _Tail(each=3, name=0)


class Type(msgspec.Struct, frozen=True):
    """What every type has. The name of an anonymous type is empty."""

    id: int
    kind: Kind
    name: str


class Int(Type, frozen=True):
    """`BTF_KIND_INT`: `bits` of `size` bytes hold the value."""

    size: int
    bits: int
    signed: bool
    is_char: bool
    is_bool: bool


class Float(Type, frozen=True):
    """`BTF_KIND_FLOAT`."""

    size: int


class Ref(Type, frozen=True):
    """A pointer, typedef, const, volatile, restrict or type tag: it leads to another type."""

    type_id: int


class Array(Type, frozen=True):
    """`BTF_KIND_ARRAY`: `count` elements of type `type_id`."""

    type_id: int
    count: int


class Member(msgspec.Struct, frozen=True):
    """A member of a struct or union. `bitfield_size` is 0 for an ordinary one."""

    name: str
    type_id: int
    bit_offset: int
    bitfield_size: int = 0


class Struct(Type, frozen=True):
    """`BTF_KIND_STRUCT` or `BTF_KIND_UNION`: `size` bytes."""

    size: int
    members: tuple[Member, ...]


class Enum(Type, frozen=True):
    """`BTF_KIND_ENUM` or `BTF_KIND_ENUM64`: pairs of name and value, in the order of the source.

    Before clang 15 and Linux 6.0 signed enums are not marked as such: there -1 reads as 4294967295.
    """

    size: int
    signed: bool
    values: tuple[tuple[str, int], ...]


class Fwd(Type, frozen=True):
    """`BTF_KIND_FWD`: a struct or union that is declared and not defined."""

    is_union: bool


class Func(Type, frozen=True):
    """`BTF_KIND_FUNC`: `type_id` is its `FuncProto`; linkage 0 static, 1 global, 2 extern."""

    type_id: int
    linkage: int


class FuncProto(Type, frozen=True):
    """`BTF_KIND_FUNC_PROTO`: pairs of name and type id. A last pair `("", 0)` stands for `...`."""

    return_id: int
    params: tuple[tuple[str, int], ...]


class Var(Type, frozen=True):
    """`BTF_KIND_VAR`: a global variable; linkage 0 static, 1 global, 2 extern."""

    type_id: int
    linkage: int


class SectionVar(msgspec.Struct, frozen=True):
    """Where a variable lies in its section. clang leaves `offset` to the loader: it is in the ELF symbols."""

    type_id: int
    offset: int
    size: int


class Datasec(Type, frozen=True):
    """`BTF_KIND_DATASEC`: the variables of one ELF section. clang leaves `size` to the loader, too."""

    size: int
    variables: tuple[SectionVar, ...]


class DeclTag(Type, frozen=True):
    """`BTF_KIND_DECL_TAG`: `name` is the tag's text, on a member or parameter, or (-1) on the whole type."""

    type_id: int
    component_idx: int


class Btf:
    """The types of one BTF blob. Made by `Btf.parse`."""

    def __init__(self, words: array[int], strings: bytes, starts: array[int], kinds: bytes) -> None:
        self._words = words  # the type section
        self._strings = strings  # the string section
        self._starts = starts  # type id -> index of its first word
        self._kinds = kinds  # type id -> kind

    @classmethod
    def parse(cls, data: bytes) -> Btf:
        """Check a blob and index it. Raises `BtfError` and nothing else."""
        words, strings, tails = _split(data)
        btf = cls(words, strings, *_index(words, len(strings), tails))
        btf._check_cycles()
        return btf

    def __len__(self) -> int:
        """The number of types, `void` included: every id is below it."""
        return len(self._kinds)

    @property
    def types(self) -> Iterator[Type]:
        """Every type, in the order of ids, without `void`."""
        return map(self.type, range(1, len(self)))

    def type(self, type_id: int) -> Type:
        """The type with this id. BtfError if there is none."""
        kind = self._kind(type_id)
        if kind is Kind.VOID:
            return Type(0, kind, "void")
        name_at, info, third, *rest = self._words[self._starts[type_id] : self._starts[type_id + 1]]
        head = type_id, kind, self._text(name_at)
        count, flag = info & _MAX_COUNT, bool(info >> 31)
        match kind:
            case Kind.INT:
                bits, encoding = rest[0] & 0xFF, rest[0] >> 24
                return Int(*head, third, bits, bool(encoding & 1), bool(encoding & 2), bool(encoding & 4))
            case Kind.FLOAT:
                return Float(*head, third)
            case Kind.ARRAY:
                return Array(*head, type_id=rest[0], count=rest[2])
            case Kind.STRUCT | Kind.UNION:
                return Struct(*head, third, tuple(self._members(rest, flag)))
            case Kind.ENUM:
                return Enum(*head, third, flag, self._values(rest[::2], rest[1::2], 32 if flag else 0))
            case Kind.ENUM64:
                values = [low | high << 32 for low, high in zip(rest[1::3], rest[2::3], strict=True)]
                return Enum(*head, third, flag, self._values(rest[::3], values, 64 if flag else 0))
            case Kind.FWD:
                return Fwd(*head, is_union=flag)
            case Kind.FUNC:
                return Func(*head, third, linkage=count)
            case Kind.FUNC_PROTO:
                names = map(self._text, rest[::2])
                return FuncProto(*head, third, tuple(zip(names, rest[1::2], strict=True)))
            case Kind.VAR:
                return Var(*head, third, linkage=rest[0])
            case Kind.DATASEC:
                return Datasec(*head, third, tuple(map(SectionVar, rest[::3], rest[1::3], rest[2::3])))
            case Kind.DECL_TAG:
                return DeclTag(*head, third, component_idx=_signed(rest[0], 32))
            case Kind.UNKNOWN:
                return Type(*head)
        return Ref(*head, third)

    def names(self, kind: Kind) -> Iterator[str]:
        """The names of all types of this kind."""
        return (self._text(self._words[self._starts[type_id]]) for type_id in self._ids_of(kind))

    def find(self, name: str, kind: Kind) -> Type | None:
        """The first type of this kind with this name; None if there is none."""
        return next(self.find_all(name, kind), None)

    def find_all(self, name: str, kind: Kind) -> Iterator[Type]:
        """All types of this kind with this name. Two files of the kernel may define different types with one name."""
        for type_id in self._ids(name, self._by_name):
            if self._kinds[type_id] == kind:
                yield self.type(type_id)

    def struct(self, name: str) -> Struct:
        """The struct with this name. BtfError if there is none; `find` returns None then."""
        found = self.find(name, Kind.STRUCT)
        if not isinstance(found, Struct):
            raise BtfError(f"no struct '{name}' in this BTF")
        return found

    def field(self, struct_name: str, name: str) -> Member | None:
        """A member of a struct or union by name. As in C, it may be inside an anonymous member.

        `bit_offset` counts from the start of the named struct.
        """
        outer = self.find(struct_name, Kind.STRUCT) or self.find(struct_name, Kind.UNION)
        todo = [(outer, 0)]
        seen = set()
        for inner, base in todo:
            if not isinstance(inner, Struct) or inner.id in seen:
                continue
            seen.add(inner.id)
            for member in inner.members:
                bit_offset = base + member.bit_offset
                if member.name == name:
                    return Member(name, member.type_id, bit_offset, member.bitfield_size)
                if not member.name:
                    todo.append((self.resolve(member.type_id), bit_offset))
        return None

    def resolve(self, type_id: int) -> Type:
        """The type behind typedefs, const, volatile, restrict and type tags."""
        while self._kind(type_id) in _MODIFIERS:
            type_id = self._next(type_id)
        return self.type(type_id)

    def size_of(self, type_id: int) -> int:
        """The size in bytes, as C's `sizeof`. BtfError for a type that has no size."""
        count = 1
        while (kind := self._kind(type_id)) in _SIZED_BY_ANOTHER:
            if kind is Kind.ARRAY:
                count *= self._words[self._starts[type_id] + 5]
            type_id = self._next(type_id)
        if kind in _SIZED:
            return count * self._words[self._starts[type_id] + 2]
        if kind is Kind.PTR:
            return count * _POINTER_SIZE
        raise BtfError(f"type {type_id} has no size", f"it is a {kind.name}")

    def enumerators(self, enum: Type) -> dict[int, str]:
        """Value -> name of an `Enum`. Of several names for one value, the first."""
        if not isinstance(enum, Enum):
            raise BtfError(f"type {enum.id} has no enumerators", f"it is a {enum.kind.name}")
        names: dict[int, str] = {}
        for name, value in enum.values:
            names.setdefault(value, name)
        return names

    def enum_value(self, name: str) -> int | None:
        """The value of an enumerator of any enum, also of an anonymous one; None if there is none with this name."""
        for type_id in self._ids(name, self._by_enumerator):
            enum = self.type(type_id)
            if isinstance(enum, Enum):
                return dict(enum.values).get(name)
        return None

    def func_params(self, name: str) -> list[tuple[str, int]] | None:
        """The parameters of a function, as pairs of name and type id; None if there is no such function."""
        func = self.find(name, Kind.FUNC)
        proto = self.type(func.type_id) if isinstance(func, Func) else None
        return list(proto.params) if isinstance(proto, FuncProto) else None

    def decl_tags(self, type_id: int, component_idx: int = -1) -> tuple[str, ...]:
        """The `btf_decl_tag`s on a type, or on its member or parameter number `component_idx`."""
        return self._tags.get((type_id, component_idx), ())

    def _kind(self, type_id: int) -> Kind:
        if not 0 <= type_id < len(self):
            raise BtfError(f"no type with id {type_id} in this BTF", f"it has ids 0 to {len(self) - 1}")
        return _KINDS[self._kinds[type_id]]

    def _next(self, type_id: int) -> int:
        """The id of the type that decides the size of this one, which is in `_SIZED_BY_ANOTHER`."""
        return self._words[self._starts[type_id] + (3 if self._kinds[type_id] == Kind.ARRAY else 2)]

    def _ids_of(self, kind: Kind) -> Iterator[int]:
        type_id = self._kinds.find(kind)
        while type_id >= 0:
            yield type_id
            type_id = self._kinds.find(kind, type_id + 1)

    def _text(self, at: int) -> str:
        return self._strings[at : self._strings.index(0, at)].decode(errors="replace")

    def _members(self, rest: Sequence[int], flag: bool) -> Iterator[Member]:
        for name_at, type_id, offset in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            bitfield_size, bit_offset = (offset >> 24, offset & 0xFFFFFF) if flag else (0, offset)
            yield Member(self._text(name_at), type_id, bit_offset, bitfield_size)

    def _values(self, names: Iterable[int], values: Iterable[int], signed_bits: int) -> tuple[tuple[str, int], ...]:
        if signed_bits:
            values = [_signed(value, signed_bits) for value in values]
        return tuple(zip(map(self._text, names), values, strict=True))

    def _ids(self, name: str, index: array[int]) -> Iterator[int]:
        """The ids that an index holds under a name, which may also be the tail of a longer string."""
        wanted = name.encode() + b"\0"
        at = self._strings.find(wanted)
        while at >= 0:
            for entry in index[bisect_left(index, at << 32) : bisect_left(index, at + 1 << 32)]:
                yield entry & 0xFFFFFFFF
            at = self._strings.find(wanted, at + 1)

    @cached_property
    def _by_name(self) -> array[int]:
        """All named types, sorted: offset of the name << 32 | type id."""
        names = map(self._words.__getitem__, self._starts[1:-1])
        return array("Q", sorted([at << 32 | type_id for type_id, at in enumerate(names, 1) if at]))

    @cached_property
    def _by_enumerator(self) -> array[int]:
        """All enumerators, sorted: offset of the name << 32 | type id of the enum."""
        entries: list[int] = []
        for kind in (Kind.ENUM, Kind.ENUM64):
            each = _TAILS[kind].each
            for type_id in self._ids_of(kind):
                names = self._words[self._starts[type_id] + 3 : self._starts[type_id + 1] : each]
                entries += [at << 32 | type_id for at in names]
        return array("Q", sorted(entries))

    @cached_property
    def _tags(self) -> dict[tuple[int, int], tuple[str, ...]]:
        tags: dict[tuple[int, int], tuple[str, ...]] = {}
        for tag in map(self.type, self._ids_of(Kind.DECL_TAG)):
            if isinstance(tag, DeclTag):
                key = tag.type_id, tag.component_idx
                tags[key] = (*tags.get(key, ()), tag.name)
        return tags

    def _check_cycles(self) -> None:
        """Refuse types that refer to themselves: `resolve` and `size_of` would not end.

        A cycle has a link that does not lead to a lower id. So each walk starts at such a link.
        """
        walked = array("I", bytes(4 * len(self)))  # type id -> where the walk started that came by
        for kind in _SIZED_BY_ANOTHER:
            for start in self._ids_of(kind):
                if self._next(start) < start:
                    continue
                type_id = start
                while self._kinds[type_id] in _SIZED_BY_ANOTHER and not walked[type_id]:
                    walked[type_id] = start
                    type_id = self._next(type_id)
                if walked[type_id] == start:
                    raise BtfError(f"type {type_id} is defined by itself")


def _split(data: bytes) -> tuple[array[int], bytes, list[_Tail]]:
    """The words of the type section, the string section, and the tails of the kinds."""
    if len(data) < _HEADER.size:
        raise BtfError(f"BTF is cut short: {len(data)} bytes, its header alone has {_HEADER.size}")
    magic, version, flags, header_size, *sections = _HEADER.unpack_from(data)
    types_at, types_size, strings_at, strings_size = sections
    if (magic, version, flags) != (_MAGIC, _VERSION, 0):
        raise BtfError(
            f"BTF has magic {magic:#x}, version {version}, flags {flags:#x}",
            f"expected {_MAGIC:#x}, {_VERSION}, 0x0",
        )
    if not _HEADER.size <= header_size <= len(data):
        raise BtfError(f"BTF header claims {header_size} of {len(data)} bytes", "it has at least 24")

    def section(name: str, at: int, size: int) -> bytes:
        start = header_size + at
        if start + size > len(data):
            raise BtfError(f"BTF {name} section ends at byte {start + size} of {len(data)}")
        return data[start : start + size]

    strings = section("string", strings_at, strings_size)
    if not strings or strings[0] or strings[-1]:
        raise BtfError("BTF string section does not start and end with NUL")
    types = section("type", types_at, types_size)
    if types_size % 4:
        raise BtfError(f"BTF type section has {types_size} bytes", "expected a multiple of 4")
    words = array("I", types)
    if sys.byteorder == "big":
        words.byteswap()
    tails = _TAILS
    if header_size >= _HEADER.size + _LAYOUT_HEADER.size:
        layout = section("layout", *_LAYOUT_HEADER.unpack_from(data, _HEADER.size))
        tails = _TAILS + _newer_tails(layout)
    return words, strings, tails


def _newer_tails(layout: bytes) -> list[_Tail]:
    """The sizes of kinds that this reader does not know, to step over them."""
    if len(layout) % _LAYOUT.size:
        raise BtfError(f"BTF layout section has {len(layout)} bytes", "expected a multiple of 4")
    tails = []
    for once, each, _flags in _LAYOUT.iter_unpack(layout[len(_TAILS) * _LAYOUT.size :]):
        if once % 4 or each % 4:
            raise BtfError(f"BTF layout has a kind of {once} and {each} bytes", "expected multiples of 4")
        tails.append(_Tail(once // 4, each // 4))
    return tails


def _index(words: array[int], strings_size: int, tails: Sequence[_Tail]) -> tuple[array[int], bytes]:
    """Where each type starts (and, last, where all end), and its kind. Checks every offset and id."""
    starts = array("I", [0])
    kinds = bytearray([Kind.VOID])
    highest_name = highest_id = at = 0
    end = len(words)
    while at < end:
        info = words[at + 1] if at + 3 <= end else 0
        kind, count = info >> 24 & 0x7F, info & _MAX_COUNT
        if not 0 < kind < len(tails):
            raise BtfError(f"type {len(kinds)} is of unknown kind {kind}")
        once, each, name, type_ = tails[kind]
        elements = at + 3 + once
        after = elements + each * count
        if after > end:
            raise BtfError(f"type {len(kinds)} is cut short: it ends at word {after} of {end}")
        if words[at] > highest_name:
            highest_name = words[at]
        if kind in _REFERRING:
            highest_id = max(highest_id, words[at + 2])
        elif kind == Kind.ARRAY:
            highest_id = max(highest_id, words[at + 3], words[at + 4])
        if each and count:
            if name is not None:
                highest_name = max(highest_name, max(words[elements + name : after : each]))
            if type_ is not None:
                highest_id = max(highest_id, max(words[elements + type_ : after : each]))
        starts.append(at)
        kinds.append(kind if kind < len(_TAILS) else Kind.UNKNOWN)
        at = after
    starts.append(end)
    if highest_name >= strings_size:
        raise BtfError(f"a name at byte {highest_name} is outside of the {strings_size} bytes of strings")
    if highest_id >= len(kinds):
        raise BtfError(f"a type refers to type {highest_id}, of {len(kinds) - 1}")
    return starts, bytes(kinds)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
