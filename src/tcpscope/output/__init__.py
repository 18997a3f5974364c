"""Where rows go. One module per format; the directory is the list. Each has `Sink(columns, stream, header)`.

A sink gets rows (msgspec structs whose attributes are the columns) and writes them whole: one write per batch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import msgspec

from tcpscope.schema import Field


class Column(msgspec.Struct, frozen=True):
    """One column of the output. All of it comes from the event's C struct where there is one.

    nullable      None where it is not known
    title, width  in a table: what stands above it, if not the name, and how wide most values are
    enum, labels  C name of an enum, and its values
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

    @classmethod
    def of(cls, field: Field) -> Column:
        labels = tuple(field.labels.values()) if field.labels else ()
        width = max(map(len, labels)) if labels else field.width
        return cls(
            field.name,
            field.kind,
            field.unit,
            field.doc,
            field.unknown is not None,
            field.title,
            width,
            field.enum,
            labels,
        )


class Sink(Protocol):
    """What every format offers."""

    def rows(self, rows: Sequence[Any]) -> None:
        """Write these rows."""

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Write something that is no row (the statistics) where the format has a place for it."""


def formats() -> list[str]:
    """The names of the formats."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("histogram",))


def open_sink(format_: str, columns: Iterable[Column], stream: BinaryIO, header: bool = True) -> Sink:
    """A sink that writes `columns` to `stream` in the format called `format_`."""
    module = importlib.import_module(f"{__name__}.{format_}")
    sink: Sink = module.Sink(tuple(columns), stream, header)
    return sink


def printable(text: str) -> str:
    """A process may call itself anything: a line of its own, or an escape sequence that repaints the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
