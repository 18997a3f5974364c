"""A table for people: aligned columns, numbers to the right, `-` for what is not known.

The widths fit what the columns usually hold (an IPv4 address, a port, a state); a longer value pushes its row to the
right instead of being cut: a cut address is a wrong address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, BinaryIO

from tcpscope.output import Column, printable

_WIDTHS = {"address": 15, "comm": 15, "time": 27, "bool": 5, "errno": 12}
_NAMED = {"pid": 7, "uid": 5, "lport": 5, "rport": 5, "family": 2, "netns": 10, "cookie": 8, "role": 8,
          "old_state": 11, "new_state": 11, "state": 11, "in_state_us": 12, "cause": 18, "answer": 10, "tx_bytes": 10,
          "rx_bytes": 10}  # fmt: skip
_HEADERS = {"family": "IP", "in_state_us": "IN STATE(us)", "accept_queue": "ACCEPTQ", "accept_limit": "LIMIT",
            "limit_from": "LIMIT FROM", "syn_queue": "SYNQ", "accepts_per_s": "ACCEPT/s", "since_accept_ms": "LAST(ms)",
            "oldest_wait_ms": "WAIT(ms)", "rx_queue_bytes": "RECV-Q", "tx_queue_bytes": "SEND-Q"}  # fmt: skip


class Sink:
    def __init__(self, columns: Sequence[Column], stream: BinaryIO, header: bool) -> None:
        self._stream = stream
        self._header = header
        self._cells = [_Cell(column) for column in columns]
        self._stacks = [index for index, column in enumerate(columns) if column.kind == "stack"]
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
            for index in self._stacks:
                lines.extend(f"    {frame}" for frame in values[index] or ())
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
        self.header = _HEADERS.get(column.name, f"{title}({column.unit})" if column.unit else title)
        if column.kind == "time":
            self.header = "TIME"
        self.width = max(_NAMED.get(column.name, _WIDTHS.get(column.kind, column.width)), len(self.header))
        if column.kind == "stack":
            self.header, self.width = "", 0
        self.right = column.kind in ("int", "float")

    def pad(self, text: str) -> str:
        return text.rjust(self.width) if self.right else text.ljust(self.width)

    def template(self, kind: type) -> str | None:
        """What `text` does, for the operator %, and without `printable`; None for what % cannot do."""
        if self.kind == "stack":
            return None
        width = self.width if self.right else -self.width
        if kind is type(None):
            return "%.0s" + self.pad("-")
        return {int: f"%{width}d", str: f"%{width}s",
                float: f"%{width}.{6 if self.kind == 'time' else 1}f"}.get(kind)  # fmt: skip

    def text(self, value: Any) -> str:
        if self.kind == "stack":
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
