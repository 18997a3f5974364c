"""Reads what an event consists of from the BTF of its object, and decodes records to rows.

The C struct is the only description of an event. Its fields have tags (see `bpf/output.bpf.h`):

    doc:TEXT       what the field means; a field without it is internal and not shown
    unit:TEXT      us, ns, bytes, ...; the field's name ends with it, too
    kind:TEXT      how to read the bytes: address, comm, time, stack, errno, function, tcp_flags
    named_by:TEXT  an enum of the running kernel, whose enumerators name the value, and a prefix that is left out
    derived_by:TEXT  an enum of the object: values for which the kernel has no name, shown as DERIVED:NAME
    subsystems:TEXT  the same for the upper half of a value, whose lower half then has no name
    may_lack:NAME  on a struct in the struct: of this field of it, zero means "not known" here
    not_counted:   the kernel does not count by it: it is no column to group by
    unknown:TEXT   zero or max (all bits set): the value that means "not known"; it becomes None
    title:TEXT     title of the column in a table, if it is not the name
    width:NUMBER   width of that column

Nested structs are flattened, so fields that all events share are described once.

`Layout.whole` reads a struct without such tags (`tcpscope run`): all of its fields, arrays as lists, also bit fields
and unions. Arrays of `char` are text. Of two fields with one name each has the names of its structs before its own.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from tcpscope.errors import BtfError, UsageError, did_you_mean
from tcpscope.filters import address_text
from tcpscope.kernel import btf as B
from tcpscope.kernel.clock import monotonic_ns

Row = msgspec.Struct
DERIVED = "DERIVED:"
"""Before a name that is not the kernel's."""

_FORMATS = {
    (1, False): "B",
    (2, False): "H",
    (4, False): "I",
    (8, False): "Q",
    (1, True): "b",
    (2, True): "h",
    (4, True): "i",
    (8, True): "q",
}


class Field(msgspec.Struct, frozen=True):
    """One column: `name` as in JSON, `offset` and `size` in bytes, `format` as the struct module writes it.

    counted  whether the kernel can count by it
    bits     of a bit field: its first bit after `offset`, and how many it has
    counts   of an array: for each dimension, the outermost first, how many elements, and the bytes from one to the next
    element  size of its elements in bytes, whose kind is `kind`
    """

    name: str
    offset: int
    size: int
    format: str
    kind: str
    unit: str
    doc: str
    unknown: int | bytes | None
    labels: dict[int, str] | None
    title: str = ""
    width: int = 0
    enum: str = ""
    named_by: str = ""
    and_by: str = ""
    derived: dict[int, str] | None = None
    subsystems: str = ""
    subsystem_labels: dict[int, str] | None = None
    signed: bool = False
    counted: bool = True
    bits: tuple[int, int] | None = None
    counts: tuple[tuple[int, int], ...] = ()
    element: int = 0

    @property
    def type(self) -> Any:
        """The Python type of a value."""
        if self.kind == "stack":
            return list[str] | None
        if self.counts:
            return list[Any]
        plain: Any = {"int": int, "bool": bool}.get(self.kind, str)
        return plain if self.unknown is None else plain | None


class Layout(msgspec.Struct, frozen=True):
    """A struct of an event: `size` bytes per record, `fields` in the order of the C struct."""

    name: str
    size: int
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, btf: B.Btf, name: str, internal: bool = False) -> Layout:
        """The layout of struct `name`: the fields with a doc tag; with `internal` all fields."""
        outer = btf.struct(name)
        fields = _flatten(btf, outer, 0)
        return cls(name, outer.size, tuple(field for field in fields if field.doc or internal))

    @classmethod
    def whole(cls, btf: B.Btf, name: str) -> Layout:
        """The layout of struct `name` with all fields, tagged or not. BtfError if one cannot be read."""
        outer = btf.struct(name)
        found = list(_leaves(btf, outer, 0, (), ()))
        names = Counter(field.name for _, field in found)
        fields: dict[str, Field] = {}
        for path, field in found:
            unique = field.name if names[field.name] == 1 else "_".join((*path, field.name))
            while unique in fields:
                unique += "_"
            fields[unique] = msgspec.structs.replace(field, name=unique)
        return cls(name, outer.size, tuple(fields.values()))

    def field(self, name: str) -> Field:
        """The field called `name`. UsageError if there is none."""
        for field in self.fields:
            if field.name == name:
                return field
        names = [field.name for field in self.fields]
        raise UsageError(f"unknown column '{name}'", did_you_mean(name, names) or f"there are {', '.join(names)}")

    def named(self, enumerators: Callable[[str], Mapping[int, str]]) -> Layout:
        """With the running kernel's names where fields have the tag `named_by`. `enumerators` reads an enum."""
        return msgspec.structs.replace(self, fields=tuple(_named(field, enumerators) for field in self.fields))

    def select(self, names: Iterable[str]) -> Layout:
        """The layout with only these fields, in this order."""
        return Layout(self.name, self.size, tuple(self.field(name) for name in names))

    def decoder(self, clock: Clock | None = None, *, raw: bool = False, frame: Callable[[int], str] = hex) -> Decoder:
        """A decoder of batches to rows. With `raw` the values are those of the C struct.

        `frame` gives the name of a stack frame's address.
        """
        return Decoder(self, clock or Clock(), raw, frame)


def _named(field: Field, enumerators: Callable[[str], Mapping[int, str]]) -> Field:
    if not field.named_by:
        return field

    def names(tag: str) -> dict[int, str]:
        enum, prefix = tag.split(" ")
        return {value: name.removeprefix(prefix) for value, name in enumerators(enum).items()}

    subsystems = names(field.subsystems) if field.subsystems else None
    others = (names(field.and_by) if field.and_by else {}) | (field.derived or {})
    return msgspec.structs.replace(field, labels=others | names(field.named_by), subsystem_labels=subsystems)


def _flatten(btf: B.Btf, outer: B.Struct, base: int, lacking: Collection[str] = ()) -> Iterable[Field]:
    for index, member in enumerate(outer.members):
        offset = base + member.bit_offset // 8
        type_ = btf.resolve(member.type_id)
        tags = dict(tag.split(":", 1) for tag in btf.decl_tags(outer.id, index) if ":" in tag)
        if isinstance(type_, B.Struct):
            yield from _flatten(btf, type_, offset, {*lacking, tags.get("may_lack", "")})
            continue
        if member.name.startswith("padding"):
            continue
        yield _field(btf, member, type_, offset, tags, lacking)


def _field(
    btf: B.Btf, member: B.Member, type_: B.Type, offset: int, tags: dict[str, str], lacking: Collection[str] = ()
) -> Field:
    """A member that is no struct, as its tags describe it."""
    size = btf.size_of(member.type_id)
    labels, enum = None, ""
    kind = tags.get("kind", "")
    if isinstance(type_, B.Enum):
        enum = type_.name
        labels = labels_of(btf.enumerators(type_))
        kind = "enum"
    elif "named_by" in tags:
        kind = "text"
    elif not kind:
        kind = "bool" if isinstance(type_, B.Int) and type_.is_bool else "int"
    signed = isinstance(type_, B.Int) and type_.signed
    scalar = not isinstance(type_, B.Array)
    unknown: int | bytes | None = None
    if member.name in lacking:
        tags["unknown"] = "zero"
    if "unknown" in tags:
        byte = b"\x00" if tags["unknown"] == "zero" else b"\xff"
        unknown = byte * size if not scalar else int.from_bytes(byte * size, "little", signed=signed)
    return Field(
        name="time" if kind == "time" else member.name,
        offset=offset,
        size=size,
        format=_FORMATS[size, signed] if scalar else f"{size}s",
        kind=kind,
        unit=tags.get("unit", ""),
        doc=tags.get("doc", ""),
        unknown=unknown,
        labels=labels,
        title=tags.get("title", ""),
        width=int(tags.get("width", 0)),
        enum=enum,
        named_by=tags.get("named_by", ""),
        and_by=tags.get("and_by", ""),
        derived=_derived(btf, tags["derived_by"]) if "derived_by" in tags else None,
        subsystems=tags.get("subsystems", ""),
        signed=signed,
        counted="not_counted" not in tags,
    )


_USUAL_WIDTHS = {1: 3, 2: 5, 4: 7, 8: 10}
"""Of numbers of so many bytes in a table, if nobody says it."""
_BYTES = ("address", "comm", "stack")
"""Kinds whose value is made of all bytes of an array."""


def _leaves(
    btf: B.Btf, outer: B.Struct, base: int, path: tuple[str, ...], counts: tuple[tuple[int, int], ...]
) -> Iterator[tuple[tuple[str, ...], Field]]:
    """All fields of a struct, each with the names of the structs in which it is. `counts`: of arrays of these structs.

    Of a struct in the struct, whose fields have docs, those without one are internal.
    """
    tagged = [
        dict(tag.split(":", 1) for tag in btf.decl_tags(outer.id, index) if ":" in tag)
        for index in range(len(outer.members))
    ]
    documented = bool(path) and any("doc" in tags for tags in tagged)
    for member, tags in zip(outer.members, tagged, strict=True):
        type_, own, type_id = btf.resolve(member.type_id), counts, member.type_id
        while isinstance(type_, B.Array) and not _is_value(btf, type_, tags.get("kind", "")):
            own = (*own, (type_.count, btf.size_of(type_.type_id)))
            type_id, type_ = type_.type_id, btf.resolve(type_.type_id)
        if any(not count for count, _ in own):  # a flexible array: no record has it
            continue
        offset = base + member.bit_offset // 8
        if isinstance(type_, B.Struct):
            yield from _leaves(btf, type_, offset, (*path, *filter(None, [member.name])), own)
        elif member.name and not member.name.startswith("padding") and ("doc" in tags or not documented):
            yield path, _leaf(btf, member, type_id, type_, offset, tags, own)


def _is_value(btf: B.Btf, array: B.Array, kind: str) -> bool:
    """Whether the array is one value: text (`char`), an address. An array of __u8 without a tag holds numbers."""
    element = btf.resolve(array.type_id)
    return isinstance(element, B.Int) and (element.name == "char" or kind in _BYTES)


def _leaf(
    btf: B.Btf,
    member: B.Member,
    type_id: int,
    type_: B.Type,
    offset: int,
    tags: dict[str, str],
    counts: tuple[tuple[int, int], ...],
) -> Field:
    if isinstance(type_, B.Array) and "kind" not in tags:
        tags["kind"] = "comm"  # text, up to its first NUL
    elif type_.kind is B.Kind.PTR and "kind" not in tags:
        tags["kind"] = "pointer"
    size = btf.size_of(type_id)
    if tags.get("kind") == "address" and size not in (4, 16):
        raise BtfError(f"field '{member.name}' is an address of {size} bytes", "an address has 4 or 16")
    if not isinstance(type_, B.Array) and (isinstance(type_, B.Float) or size not in (1, 2, 4, 8)):
        raise BtfError(f"field '{member.name}' is a {type_.kind.name} of {size} bytes, which cannot be shown")
    plain = B.Member(member.name, type_id, member.bit_offset)
    if isinstance(type_, B.Enum) and not type_.values:
        type_ = B.Int(0, B.Kind.INT, "", type_.size, 8 * type_.size, False, False, False)
    field = _field(btf, plain, type_, offset, tags)
    changed: dict[str, Any] = {}
    if field.kind == "int" and not tags.keys() & {"doc", "width"}:
        changed = {"width": _USUAL_WIDTHS[size]}
    elif field.kind == "pointer" and "width" not in tags:
        changed = {"width": len("0xffff888100000000")}
    if isinstance(type_, B.Enum) and type_.signed:
        changed |= {"signed": True, "format": _FORMATS[size, True]}
    if member.bitfield_size:
        first = member.bit_offset % 8
        size = (first + member.bitfield_size + 7) // 8
        changed |= {"bits": (first, member.bitfield_size), "size": size, "format": f"{size}s"}
    if counts:
        size = changed.get("size", field.size)
        length = sum((count - 1) * step for count, step in counts) + size
        changed |= {"counts": counts, "element": size, "size": length, "format": f"{length}s"}
    if field.name == "time" and (counts or member.bitfield_size):
        raise BtfError(f"field '{member.name}' is no single time")
    return msgspec.structs.replace(field, **changed)


def _derived(btf: B.Btf, enum: str) -> dict[int, str]:
    found = btf.find(enum, B.Kind.ENUM)
    assert found is not None
    return {value: f"{DERIVED}{name}" for value, name in labels_of(btf.enumerators(found)).items()}


def labels_of(enumerators: dict[int, str]) -> dict[int, str]:
    """Names of enumerators without their common prefix: STATE_LISTEN -> LISTEN."""
    names = list(enumerators.values())
    shared = len(os.path.commonprefix(names))  # noqa: RUF071 (these are no paths)
    prefix = names[0][:shared].rpartition("_")[0] + "_"
    return {value: name.removeprefix(prefix) for value, name in enumerators.items()}


class CounterArray:
    """A C array of 64-bit counters with one index per enum. The enumerator 0 is left out."""

    def __init__(self, *enums: Mapping[int, str]) -> None:
        sizes = [max(enum) + 1 for enum in enums]
        self._struct = struct.Struct(f"<{math.prod(sizes)}Q")
        self._places: dict[tuple[str, ...], int] = {}
        for index in itertools.product(*(sorted(set(enum) - {0}) for enum in enums)):
            at = 0
            for size, part in zip(sizes, index, strict=True):
                at = at * size + part
            self._places[tuple(enum[part] for enum, part in zip(enums, index, strict=True))] = at
        self._nothing = bytes(self._struct.size)

    def read(self, data: bytes) -> dict[tuple[str, ...], int]:
        """Names -> counter; those that are 0 are missing."""
        if data == self._nothing:
            return {}
        counters = self._struct.unpack(data)
        return {names: counters[at] for names, at in self._places.items() if counters[at]}


class _Cache(dict[Any, Any]):
    """A dict that computes a missing value. It is cleared when it has `limit` entries."""

    def __init__(self, compute: Callable[[Any], Any], limit: int = 1 << 14) -> None:
        self.compute = compute
        self.limit = limit

    def __missing__(self, key: Any) -> Any:
        if len(self) >= self.limit:
            self.clear()
        value = self[key] = self.compute(key)
        return value


class Clock:
    """Converts the kernel's monotonic time stamps.

    mode: "iso" (UTC, microseconds), "local" (time of day, milliseconds), "elapsed" (seconds since this clock was made)
    or "none".

    The offset of the wall clock changes when somebody sets the time, and while the machine is suspended. `read` checks
    it for a stamp that is 50 ms later than the last check. When it changed is not known, only that it was after the
    last check. So stamps of up to 50 ms after a change may have the old offset, and rows between the last check and the
    change get the new one. No row, no check: the last one may be long ago.
    """

    def __init__(self, mode: str = "iso") -> None:
        self.mode = mode
        self.start_ns = self._checked_ns = monotonic_ns()
        self._low_ns, self._high_ns = _offset_bounds()
        self._offset_ns, self._since_ns = (self._low_ns + self._high_ns) // 2, -1
        self._earlier: deque[tuple[int, int]] = deque(maxlen=64)  # offset, and until when it was that
        # Rows come nearly in order.
        self._milliseconds = _Cache(_local_milliseconds if mode == "local" else _iso_milliseconds, limit=64)

    def read(self, stamp_ns: int) -> str | float:
        """A time stamp in the clock's mode."""
        if self.mode == "elapsed":
            return (stamp_ns - self.start_ns) / 1e9
        if stamp_ns > self._checked_ns + _CHECK_NS:
            self._check()
        offset_ns = self._offset_ns
        if stamp_ns <= self._since_ns:
            offset_ns = next(offset for offset, until_ns in self._earlier if stamp_ns <= until_ns)
        millisecond, ns = divmod(stamp_ns + offset_ns, 1_000_000)
        text: str = self._milliseconds[millisecond]
        return text if self.mode == "local" else text + _MICROSECONDS[ns // 1000]

    def _check(self) -> None:
        """Look whether the offset has changed. It cannot be known when, only that it was after the last check."""
        low, high = _offset_bounds()
        if low > self._high_ns + _ROUNDING_NS or high < self._low_ns - _ROUNDING_NS:
            self._earlier.append((self._offset_ns, self._checked_ns))
            self._low_ns, self._high_ns = low, high
            self._offset_ns, self._since_ns = (low + high) // 2, self._checked_ns
        self._checked_ns = monotonic_ns()


_CHECK_NS = 50_000_000
_ROUNDING_NS = 1000


def _offset_bounds() -> tuple[int, int]:
    """Bounds of what the wall clock is ahead of the kernel's.

    The narrowest of a few, because the process may be interrupted between two readings.
    """
    found = []
    for _ in range(5):
        before, wall, after = monotonic_ns(), time.time_ns(), monotonic_ns()
        found.append((wall - after, wall - before))
    return min(found, key=lambda bounds: bounds[1] - bounds[0])


_MICROSECONDS = tuple(f"{us:03d}Z" for us in range(1000))  # formatting them each time costs a third of a row


def _iso_milliseconds(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms // 1000, UTC):%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}"


def _local_milliseconds(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms // 1000):%H:%M:%S}.{ms % 1000:03d}"


def comm_text(data: bytes) -> str:
    """A process name, up to its first NUL. Bytes that are not UTF-8 are escaped."""
    return data.partition(b"\0")[0].decode(errors="backslashreplace")


def errno_text(number: int) -> str:
    """ECONNREFUSED for 111, "none" for 0."""
    return errno.errorcode.get(number, str(number)) if number else "none"


_TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")


def tcp_flags_text(flags: int) -> str:
    """SYN|ACK for 18, "none" for 0."""
    return "|".join(name for bit, name in enumerate(_TCP_FLAGS) if flags >> bit & 1) or "none"


def _without_name(value: int, subsystems: Mapping[int, str] | None) -> str:
    """The number; SUBSYSTEM:NUMBER if its upper half is that of a subsystem."""
    if subsystems and (above := value >> 16):
        return f"{subsystems.get(above, above)}:{value & 0xFFFF}"
    return str(value)


class Decoder:
    """Decodes a batch of records to a list of rows. Rows are msgspec structs, which encode quickly.

    Its loop is compiled for the layout. A record costs one unpack and one constructor call.
    """

    def __init__(self, layout: Layout, clock: Clock, raw: bool = False, frame: Callable[[int], str] = hex) -> None:
        self._frame = frame
        fields = [f for f in layout.fields if not (f.kind == "time" and clock.mode == "none")]
        self.layout = layout
        self.fields = tuple(fields)
        names: dict[str, Any] = {}
        runs = _runs(fields)
        place = {i: (f"v{members[0]}", at) for at, _, _, members in runs for i in members}
        whole = {i for _, _, _, members in runs if len(members) > 1 for i in members}
        expressions = []
        for i, field in enumerate(fields):
            if not raw and (i in whole or field.counts or field.bits):
                variable, at = place[i]
                names[f"p{i}"] = self._part(field, field.offset - at, clock)
                expressions.append(f"p{i}({variable})")
            else:
                expressions.append(f"v{i}" if raw else self._expression(i, field, clock, names))
        columns = [(f.name, Any if raw else f.type | float if f.kind == "time" else f.type) for f in fields]
        self.row_type: type[Row] = msgspec.defstruct(layout.name.title().replace("_", ""), columns, gc=False)
        arguments = "".join(f"v{members[0]}, " for *_, members in runs)
        source = f"def decode(batch):\n    return [Row({', '.join(expressions)}) for ({arguments}) in unpack(batch)]\n"
        names |= {"Row": self.row_type, "unpack": struct.Struct(_format(layout.size, runs)).iter_unpack}
        exec(compile(source, f"<decoder of {layout.name}>", "exec"), names)
        self.rows: Callable[[bytes | memoryview], list[Any]] = names["decode"]

    def _part(self, field: Field, at: int, clock: Clock) -> Callable[[bytes], Any]:
        """Reads a field from bytes, in which it begins at `at`: an array, a bit field, or one of those that overlap."""
        one = self._element(field, clock)

        def read(data: bytes, at: int, counts: tuple[tuple[int, int], ...]) -> Any:
            if not counts:
                return one(data, at)
            (count, step), inner = counts[0], counts[1:]
            return [read(data, at + index * step, inner) for index in range(count)]

        return lambda data: read(data, at, field.counts)

    def _element(self, field: Field, clock: Clock) -> Callable[[bytes, int], Any]:
        size, unknown, signed = field.element or field.size, field.unknown, field.signed
        others: dict[str, Callable[[Any], Any]] = {"time": clock.read, "bool": bool}
        convert = self._conversion(field) or others.get(field.kind)
        is_bytes = field.kind in ("comm", "stack") or (field.kind == "address" and size != 4)
        first, width = field.bits or (0, 8 * size)

        def one(data: bytes, at: int) -> Any:
            value: Any = data[at : at + size]
            if not is_bytes:
                value = int.from_bytes(value, "little") >> first & (1 << width) - 1
                if signed and value >> width - 1:
                    value -= 1 << width
            if unknown is not None and value == unknown:
                return None
            return convert(value) if convert else value

        return one

    def _expression(self, i: int, field: Field, clock: Clock, names: dict[str, Any]) -> str:
        value = f"v{i}"
        convert = self._conversion(field)
        if convert is not None:
            unknown = field.unknown
            names[f"c{i}"] = _Cache(lambda v: None if v == unknown else convert(v))
            return f"c{i}[{value}]"
        if field.kind == "time":
            names["read"] = clock.read
            return f"read({value})"
        if field.kind == "bool":
            return (
                f"{value} != 0" if field.unknown is None else f"None if {value} == {field.unknown!r} else {value} != 0"
            )
        if field.unknown is None:
            return value
        if field.unknown == 0:
            return f"{value} or None"
        return f"None if {value} == {field.unknown!r} else {value}"

    def _conversion(self, field: Field) -> Callable[[Any], Any] | None:
        """What makes the value of the C struct the one of the row; None: it stays, or is a time or a bool."""
        if field.kind == "address":
            return address_text if (field.element or field.size) == 16 else _ipv4_text
        if field.kind == "comm":
            return comm_text
        if field.kind == "errno":
            return errno_text
        if field.kind == "stack":
            frame = self._frame
            return lambda v: [frame(a) for a in struct.unpack(f"<{len(v) // 8}Q", v) if a]
        if field.kind == "function":
            return self._frame
        if field.kind == "pointer":
            return hex
        if field.kind == "tcp_flags":
            return tcp_flags_text
        if field.labels is not None:
            labels, subsystems = field.labels, field.subsystem_labels
            return lambda v: labels.get(v) or _without_name(v, subsystems)
        return None


def _ipv4_text(value: int | bytes) -> str:
    """An IPv4 address of four bytes, or as a number in the order of the network (__be32)."""
    data = value.to_bytes(4, "little") if isinstance(value, int) else value
    return address_text(b"\0" * 10 + b"\xff\xff" + data)


_Run = tuple[int, int, str, tuple[int, ...]]
"""Bytes that are read as one: offset, size, format, and the numbers of the fields in them."""


def _runs(fields: Sequence[Field]) -> list[_Run]:
    """The fields in the order of the record; those that overlap (bit fields, unions) as one run of bytes."""
    runs: list[_Run] = []
    for index in sorted(range(len(fields)), key=lambda i: fields[i].offset):
        field = fields[index]
        if runs and field.offset < runs[-1][0] + runs[-1][1]:
            offset, size, _, members = runs.pop()
            size = max(size, field.offset + field.size - offset)
            runs.append((offset, size, f"{size}s", (*members, index)))
        else:
            runs.append((field.offset, field.size, field.format, (index,)))
    return runs


def _format(size: int, runs: Iterable[_Run]) -> str:
    """The struct format that reads only these runs of a record."""
    text, at = "<", 0
    for offset, length, format_, _ in runs:
        text += f"{offset - at}x{format_}"
        at = offset + length
    return f"{text}{size - at}x"
