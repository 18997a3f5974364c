"""The output formats: one module each, with a class `Sink(columns, stream, header)`. The directory is the list.

A sink writes batches of rows (msgspec structs whose attributes are the columns), with one write per batch. Its stream
takes all, or says how many bytes it took (writing.py).
"""

from __future__ import annotations

import importlib
import pkgutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, BinaryIO, Protocol

import msgspec

from tcpscope.schema import Field


class Column(msgspec.Struct, frozen=True):
    """One column of the output. If an event's C struct has the field, all of this comes from there.

    nullable      its value may be None, which means "not known"
    title, width  in a table: its title, if that is not the name, and the width of most values
    enum, labels  name of a C enum, and its values
    hidden        a screen shows it only when it is asked for all columns
    """

    name: str
    kind: str = "int"
    unit: str = ""
    doc: str = ""
    nullable: bool = False
    title: str = ""
    width: int = 0
    enum: str = ""
    labels: tuple[str, ...] = ()
    hidden: bool = False

    @classmethod
    def of(cls, field: Field) -> Column:
        labels = tuple(field.labels.values()) if field.labels else ()
        width = field.width or max(map(len, labels), default=0)
        return cls(
            field.name,
            "list" if field.counts else field.kind,
            field.unit,
            field.doc,
            field.unknown is not None,
            field.title,
            width,
            field.enum,
            labels,
        )


class Sink(Protocol):
    """What every format has."""

    def rows(self, rows: Sequence[Any]) -> int:
        """Write these rows. Returns how many the stream did not take."""

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a record that is not a row (the account), if the format has a place for it."""


def formats() -> list[str]:
    """The names of the formats."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("histogram", "screen"))


def open_sink(format_: str, columns: Iterable[Column], stream: BinaryIO, header: bool = True) -> Sink:
    """A sink that writes `columns` to `stream` in the format called `format_`."""
    module = importlib.import_module(f"{__name__}.{format_}")
    sink: Sink = module.Sink(tuple(columns), stream, header)
    return sink


def endpoint(address: str, port: int | str) -> str:
    """ADDRESS:PORT, as ss writes it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def write_lines(stream: BinaryIO, titles: Sequence[str], rows: Sequence[str]) -> int:
    """Write titles, and rows of one or more lines. Returns how many rows the stream did not take as a whole."""
    text = "\n".join([*titles, *rows, ""]).encode()
    taken = stream.write(text)
    if taken == len(text):
        return 0
    ends = list(accumulate(len(f"{piece}\n".encode()) for piece in (*titles, *rows)))
    return sum(end > taken for end in ends[len(titles) :])


def printable(text: str) -> str:
    """Escape what moves or hides text: control characters, marks of direction, line separators.

    A process may have a line break or a terminal's escape sequence in its name.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_json(lines: bytes) -> bytes:
    """The same for lines of JSON, in JSON's own escapes: the values stay what they are."""
    if lines.isascii() and b"\x7f" not in lines:
        return lines  # the encoder has escaped the control characters below 0x20
    text = lines.decode()
    if text.replace("\n", "").isprintable():
        return lines
    return "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text).encode()


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def width(text: str) -> int:
    """How many columns of a terminal the text takes: two for a wide character, none for a combining one."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


@cache
def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def padded(text: str, columns: int, right: bool = False) -> str:
    """The text with spaces to this width, behind it, or with `right` before it."""
    spaces = " " * (columns - width(text))
    return spaces + text if right else text + spaces


def cut(text: str, columns: int) -> str:
    """The text, cut to this width, with a mark where it was cut."""
    if width(text) <= columns:
        return text
    kept, room = "", columns - 1
    for character in text:
        room -= _character_width(character)
        if room < 0:
            break
        kept += character
    return kept + ">"
