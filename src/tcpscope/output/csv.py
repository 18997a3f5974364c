"""CSV (RFC 4180): a line of names, then a line per row. An empty field means "not known".

A list (`stack`, `holders`) is one field whose parts are separated by `;`. The parts of a `histogram` are FROM-TO:COUNT.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, BinaryIO

from tcpscope.output import Column, printable


class Sink:
    def __init__(self, columns: Sequence[Column], stream: BinaryIO, header: bool) -> None:
        self._stream = stream
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text)
        names = [column.name for column in columns]
        self._values = attrgetter(*names) if len(names) > 1 else lambda row: (getattr(row, names[0]),)
        if header:
            self._writer.writerow(names)
            self._flush()

    def rows(self, rows: Sequence[Any]) -> int:
        self._writer.writerows(map(_cells, map(self._values, rows)))
        return self._flush()

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """CSV has no place for anything but rows."""

    def _flush(self) -> int:
        """Returns how many lines the stream did not take."""
        lines = self._text.getvalue().encode()
        self._text.seek(0)
        self._text.truncate()
        return lines.count(b"\n", self._stream.write(lines))


def _cells(values: Sequence[Any]) -> list[Any]:
    """The fields of a row. A process chooses its own name and the reader may be a terminal, so text is escaped."""
    cells = (";".join(map(_part, v)) if isinstance(v, list) else v for v in values)
    return [printable(cell) if isinstance(cell, str) else cell for cell in cells]


def _part(value: Any) -> str:
    return "{}-{}:{}".format(*value) if isinstance(value, list) else str(value)
