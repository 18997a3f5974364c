"""A table for people: aligned columns, numbers to the right, `-` for what is not known.

The widths fit what the columns usually hold (an IPv4 address, a port, a state); a longer value pushes its row to the
right instead of being cut: a cut address is a wrong address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, BinaryIO

from tcpscope.output import Column, printable
from tcpscope.output.histogram import draw

_WIDTHS = {"address": 15, "comm": 15, "time": 27, "bool": 5, "errno": 12}

_BELOW: dict[str, Callable[[Any, str], list[str]]] = {
    "stack": lambda frames, unit: [f"    {frame}" for frame in frames],
    "distribution": lambda octaves, unit: ["", *draw(octaves, unit), ""],
}
"""Kinds of columns whose values are lines of their own below the row."""


class Sink:
    def __init__(self, columns: Sequence[Column], stream: BinaryIO, header: bool) -> None:
        self._stream = stream
        self._header = header
        self._cells = [_Cell(column) for column in columns]
        self._below = [
            (index, _BELOW[column.kind], column.unit) for index, column in enumerate(columns) if column.kind in _BELOW
        ]
        names = [column.name for column in columns]
        self._values = attrgetter(*names) if len(names) > 1 else lambda row: (getattr(row, names[0]),)
        self._templates: dict[tuple[type, ...], str | None] = {}

    def rows(self, rows: Sequence[Any]) -> None:
        lines = []
        if self._header:
            self._header = False
            lines.append(" ".join(cell.pad(cell.header) for cell in self._cells).rstrip())
        for row in rows:
            values = self._values(row)
            lines.append(self._line(values))
            for index, drawn, unit in self._below:
                lines.extend(drawn(values[index], unit) if values[index] else ())
        if lines:
            self._stream.write("\n".join([*lines, ""]).encode())

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """The statistics stand on stderr; a table has no place for them."""

    def _line(self, values: tuple[Any, ...]) -> str:
        """One format for the whole line, made once for each combination of types, is three times as fast as cells."""
        types = tuple(map(type, values))
        try:
            template = self._templates[types]
        except KeyError:
            parts = [cell.template(kind) for cell, kind in zip(self._cells, types, strict=True)]
            template = self._templates[types] = " ".join(filter(None, parts)) if all(parts) else None
        line = template % values if template else ""
        if not line.isprintable() or not line:
            line = " ".join(cell.text(value) for cell, value in zip(self._cells, values, strict=True))
        return line.rstrip()


class _Cell:
    def __init__(self, column: Column) -> None:
        self.name = column.name
        self.kind = column.kind
        title = column.name.removesuffix(f"_{column.unit}").replace("_", " ").upper()
        unit = f"({column.unit})" if column.unit and column.kind != "time" else ""
        self.header = column.title or f"{title}{unit}"
        self.width = max(column.width or _WIDTHS.get(column.kind, 0), len(self.header))
        if column.kind in _BELOW:
            self.header, self.width = "", 0
        self.right = column.kind in ("int", "float")

    def pad(self, text: str) -> str:
        return text.rjust(self.width) if self.right else text.ljust(self.width)

    def template(self, kind: type) -> str | None:
        """What `text` does, for the operator %, and without `printable`; None for what % cannot do."""
        if self.kind in _BELOW:
            return None
        width = self.width if self.right else -self.width
        if kind is type(None):
            return "%.0s" + self.pad("-")
        return {int: f"%{width}d", str: f"%{width}s", float: f"%{width}.{6 if self.kind == 'time' else 1}f"}.get(kind)

    def text(self, value: Any) -> str:
        if self.kind in _BELOW:
            return ""
        if value is None:
            return self.pad("-")
        if value is True or value is False:
            return self.pad("yes" if value else "no")
        if isinstance(value, float):
            return self.pad(f"{value:.6f}" if self.kind == "time" else f"{value:.1f}")
        if isinstance(value, list):
            return self.pad(printable(", ".join(map(str, value))))
        return self.pad(printable(str(value)))
