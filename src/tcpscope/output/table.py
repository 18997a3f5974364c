"""A table in a file or a pipe: aligned columns, numbers to the right, `-` for what is not known. A terminal: screen.py.

It has all columns and one line of titles, so that awk finds what it looks for. A column is as wide as the values that
it usually holds (an IPv4 address, a port, a state). When a longer value comes (an IPv6 address), the column grows for
this batch of rows and for all later ones. A value is never cut: a cut address is a wrong address. A list does not widen
its column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, BinaryIO

from tcpscope.output import Column, padded, printable, width, write_lines
from tcpscope.output.histogram import draw

_WIDTHS = {"address": 15, "comm": 15, "time": 27, "bool": 5, "errno": 12}

BELOW: dict[str, Callable[[Any, str], list[str]]] = {
    "stack": lambda frames, unit: [f"    {frame}" for frame in frames],
    "distribution": lambda octaves, unit: ["", *draw(octaves, unit), ""],
}
"""Kinds of columns whose values are lines of their own below the row."""


class Sink:
    def __init__(self, columns: Sequence[Column], stream: BinaryIO, header: bool) -> None:
        self._stream = stream
        self._header = header
        self._cells = [_Cell(column) for column in columns]
        self._on_line = [(at, cell) for at, cell in enumerate(self._cells) if cell.kind not in BELOW]
        self._below = [
            (index, BELOW[column.kind], column.unit) for index, column in enumerate(columns) if column.kind in BELOW
        ]
        names = [column.name for column in columns]
        self._values = attrgetter(*names) if len(names) > 1 else lambda row: (getattr(row, names[0]),)
        self._templates: dict[tuple[type, ...], str | None] = {}
        self._titled = False

    def rows(self, rows: Sequence[Any]) -> int:
        cells = [self._values(row) for row in rows]
        lines = [self._line(values) for values in cells]
        if max(map(width, lines), default=0) > self._width:
            self._grow(cells)
            lines = [self._line(values) for values in cells]
        titles = []
        if self._header and not self._titled:
            self._titled = True
            titles.append(" ".join(cell.pad(cell.header) for _, cell in self._on_line).rstrip())
        if self._below:
            wholes = (self._whole(values, line) for values, line in zip(cells, lines, strict=True))
            lines = ["\n".join(map(str.rstrip, whole)) for whole in wholes]
        else:
            lines = list(map(str.rstrip, lines))
        return write_lines(self._stream, titles, lines)

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """The statistics stand on stderr; a table has no place for them."""

    @property
    def _width(self) -> int:
        """Characters of a line whose values all fit."""
        return max(0, sum(cell.width + 1 for _, cell in self._on_line) - 1)

    def _grow(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Widen each column to its longest value here."""
        for at, cell in self._on_line:
            if cell.kind != "list":
                cell.width = max(cell.width, *(width(cell.text(values[at])) for values in rows))
        self._templates.clear()

    def _whole(self, values: tuple[Any, ...], line: str) -> Iterator[str]:
        """The line, and what stands below it."""
        yield line
        for index, drawn, unit in self._below:
            if values[index]:
                yield from drawn(values[index], unit)

    def _line(self, values: tuple[Any, ...]) -> str:
        """One format for the whole line, made once for each combination of types, is three times as fast as cells."""
        types = tuple(map(type, values))
        try:
            template = self._templates[types]
        except KeyError:
            parts = [cell.template(kind) for cell, kind in zip(self._cells, types, strict=True)]
            template = self._templates[types] = " ".join(filter(None, parts)) if all(parts) else None
        line = template % values if template else ""
        if not line.isascii() or not line.isprintable() or not line:  # % counts characters, not columns
            line = " ".join(cell.text(values[at]) for at, cell in self._on_line)
        return line


class _Cell:
    def __init__(self, column: Column) -> None:
        self.kind = column.kind
        self.header = title_of(column)
        self.width = max(column.width or _WIDTHS.get(column.kind, 0), len(self.header))
        self.right = column.kind in ("int", "float")

    def pad(self, text: str) -> str:
        return padded(text, self.width, self.right)

    def template(self, kind: type) -> str | None:
        """What `text` does, for the operator %, and without `printable`; None for what % cannot do."""
        if self.kind in BELOW:
            return None
        size = self.width if self.right else -self.width
        if kind is type(None):
            return "%.0s" + self.pad("-")
        return {int: f"%{size}d", str: f"%{size}s", float: f"%{size}.{6 if self.kind == 'time' else 1}f"}.get(kind)

    def text(self, value: Any) -> str:
        return self.pad(text_of(value, self.kind))


def title_of(column: Column) -> str:
    """The title of a column, with its unit."""
    title = column.name.removesuffix(f"_{column.unit}").replace("_", " ").upper()
    unit = f"({column.unit})" if column.unit and column.kind != "time" else ""
    return column.title or f"{title}{unit}"


def text_of(value: Any, kind: str) -> str:
    """A value as a table shows it. Control characters in text are escaped."""
    if value is None:
        return "-"
    if value is True or value is False:
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6f}" if kind == "time" else f"{value:.1f}"
    return printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))
