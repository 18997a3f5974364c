"""JSON lines: one object per row. Keys are the names of the columns; `null` means "not known"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from tcpscope.output import Column


class Sink:
    def __init__(self, columns: Sequence[Column], stream: BinaryIO, header: bool) -> None:
        self._write = stream.write
        self._encoder = msgspec.json.Encoder()

    def rows(self, rows: Sequence[Any]) -> None:
        self._write(self._encoder.encode_lines(rows))

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        self._write(self._encoder.encode({name: values}) + b"\n")
