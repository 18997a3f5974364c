"""JSON lines: one object per row. Keys are the names of the columns; `null` means "not known".

Control characters, marks of direction and line separators in text are escaped: the reader may be a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from tcpscope.output import Column, printable_json


class Sink:
    def __init__(self, columns: Sequence[Column], stream: BinaryIO, header: bool) -> None:
        self._write = stream.write
        self._encoder = msgspec.json.Encoder()

    def rows(self, rows: Sequence[Any]) -> int:
        lines = printable_json(self._encoder.encode_lines(rows))
        return lines.count(b"\n", self._write(lines))

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        self._write(printable_json(self._encoder.encode({name: values}) + b"\n"))
