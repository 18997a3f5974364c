"""Reads what an event consists of from the BTF of its object, and decodes records to rows.

The C struct is the only description of an event. Its fields have tags (see `bpf/output.bpf.h`):

    doc:TEXT       what the field means; a field without it is internal and not shown
    unit:TEXT      us, ns, bytes, ...; the field's name ends with it, too
    kind:TEXT      how to read the bytes: address, comm, time, stack, errno, function, tcp_flags
    named_by:TEXT  an enum of the running kernel, whose enumerators name the value, and a prefix that is left out
    derived_by:TEXT  an enum of the object: values for which the kernel has no name, shown as DERIVED:NAME
    subsystems:TEXT  the same for the upper half of a value, whose lower half then has no name
    may_lack:NAME  on a struct in the struct: of this field of it, zero means "not known" here
    unknown:TEXT   zero or max (all bits set): the value that means "not known"; it becomes None
    title:TEXT     title of the column in a table, if it is not the name
    width:NUMBER   width of that column

Nested structs are flattened, so fields that all events share are described once.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from tcpscope.errors import UsageError, did_you_mean
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
    """One column: `name` as in JSON, `offset` and `size` in bytes, `format` as the struct module writes it."""

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

    @property
    def type(self) -> Any:
        """The Python type of a value."""
        if self.kind == "stack":
            return list[str] | None
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
        yield Field(
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
        )


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
        expressions = [f"v{i}" if raw else self._expression(i, field, clock, names) for i, field in enumerate(fields)]
        columns = [(f.name, Any if raw else f.type | float if f.kind == "time" else f.type) for f in fields]
        self.row_type: type[Row] = msgspec.defstruct(layout.name.title().replace("_", ""), columns, gc=False)
        by_offset = sorted(range(len(fields)), key=lambda i: fields[i].offset)
        arguments = ", ".join(f"v{i}" for i in by_offset)
        source = f"def decode(batch):\n    return [Row({', '.join(expressions)}) for ({arguments},) in unpack(batch)]\n"
        names |= {"Row": self.row_type, "unpack": struct.Struct(_format(layout.size, fields)).iter_unpack}
        exec(compile(source, f"<decoder of {layout.name}>", "exec"), names)
        self.rows: Callable[[bytes | memoryview], list[Any]] = names["decode"]

    def _expression(self, i: int, field: Field, clock: Clock, names: dict[str, Any]) -> str:
        value = f"v{i}"
        convert: Callable[[Any], Any] | None = None
        if field.kind == "address":
            convert = address_text
        elif field.kind == "comm":
            convert = comm_text
        elif field.kind == "errno":
            convert = errno_text
        elif field.kind == "stack":
            frame = self._frame
            convert = lambda v: [frame(a) for a in struct.unpack(f"<{len(v) // 8}Q", v) if a]  # noqa: E731
        elif field.kind == "function":
            convert = self._frame
        elif field.kind == "tcp_flags":
            convert = tcp_flags_text
        elif field.labels is not None:
            labels, subsystems = field.labels, field.subsystem_labels
            convert = lambda v: labels.get(v) or _without_name(v, subsystems)  # noqa: E731
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


def _format(size: int, fields: Iterable[Field]) -> str:
    """The struct format that reads only `fields` of a record."""
    text, at = "<", 0
    for field in sorted(fields, key=lambda f: f.offset):
        text += f"{field.offset - at}x{field.format}"
        at = field.offset + field.size
    return f"{text}{size - at}x"
