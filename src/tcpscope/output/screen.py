"""A table on a terminal: no line is longer than the terminal, and the answer is there at 80 columns.

The most important columns that fit are shown, in their usual order. Each end of a connection is one column,
ADDRESS:PORT. Microseconds are shown as milliseconds. When a longer value comes (an IPv6 address), its column grows,
columns that do not fit any more are left out, and the titles are printed again. A value is not cut. Only a list, a
stack, and a column that is wider than the terminal are, with the mark `>`.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, BinaryIO, TextIO

from tcpscope import output
from tcpscope.output import Column
from tcpscope.output.table import BELOW, text_of, title_of

_USUAL = {"address": 15, "errno": 12, "comm": 12, "time": 12, "list": 20, "end": 21}
"""Widths of most values, by kind; `end` is an address with its port."""
_UNKNOWN_SIZE = os.terminal_size((80, 24))
"""The size to take for a terminal that reports none, such as a serial line."""
WIDTH = "TCPSCOPE_TABLE_WIDTH"
"""A variable of the environment: our caller (the lab) shows our output on a terminal, with room for so many columns."""


class Sink:
    """Writes the rows as lines of a table. `important` names columns, the most important first; the others follow.

    wide      all columns, however long the lines
    alarming  a column -> whether a value of it is bad news, which is red where the terminal has colours
    """

    def __init__(
        self,
        columns: Sequence[Column],
        stream: BinaryIO,
        header: bool,
        important: Sequence[str] = (),
        wide: bool = False,
        alarming: Mapping[str, Callable[[Any], Any]] | None = None,
        width: Callable[[], int | None] | None = None,
    ) -> None:
        self._stream, self._header, self._wide = stream, header, wide
        self._width = width or (lambda: width_of(stream))
        self._cells = cells_of(columns)
        self._below = [column for column in columns if column.kind in BELOW]
        self._by_importance = by_importance(self._cells, important)
        self._alarming = alarming if alarming and has_colours(stream) else {}
        self._titles = ""

    def rows(self, rows: Sequence[Any]) -> int:
        """Write these rows, and the titles above them if a column stands in another place now."""
        titles, wholes = self._lines(rows, self._wide)
        return output.write_lines(self._stream, titles, ["\n".join(whole) for whole in wholes])

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """A table has no place for the account."""

    def page(self, rows: Sequence[Any]) -> list[str]:
        """The lines of a table of its own, with its titles. Those of a wide table are cut too."""
        self._titles = ""
        titles, wholes = self._lines(rows, False)
        return list(chain(titles, *wholes))

    def _lines(self, rows: Sequence[Any], longer: bool) -> tuple[list[str], list[list[str]]]:
        """The line of titles, if it is due, and the lines of each row; `longer` than the terminal if they are."""
        width = self._width() or _UNKNOWN_SIZE.columns
        table = [{cell: cell.text(row) for cell in self._cells} for row in rows]
        for cell in self._cells:
            if cell.kind != "list":
                cell.width = max(cell.width, *(output.width(texts[cell]) for texts in table), 0)
        chosen = self._cells if self._wide else that_fit(self._by_importance, width, self._cells)
        titles = " ".join(cell.pad(cell.header) for cell in chosen).rstrip()
        above = [titles] if self._header and titles != self._titles else []
        self._titles = titles
        wholes = []
        for row, texts in zip(rows, table, strict=True):
            lines = [" ".join(cell.pad(texts[cell]) for cell in chosen).rstrip()]
            if self._alarming and output.width(lines[-1]) <= width:
                lines[-1] = " ".join(self._painted(cell, row, texts[cell]) for cell in chosen).rstrip()
            for column in self._below:
                if value := getattr(row, column.name):
                    lines += BELOW[column.kind](value, column.unit)
            wholes.append(lines)
        if longer:
            return above, wholes
        return [cut(line, width) for line in above], [[cut(line, width) for line in lines] for lines in wholes]

    def _painted(self, cell: Cell, row: Any, text: str) -> str:
        bad = any(name in self._alarming and self._alarming[name](getattr(row, name)) for name in cell.names)
        return cell.pad(text).replace(text, red(text), 1) if bad else cell.pad(text)


def size_of(stream: TextIO | BinaryIO) -> os.terminal_size:
    """The size of the terminal that `stream` writes to."""
    size = os.get_terminal_size(stream.fileno())
    return size if size.columns and size.lines else _UNKNOWN_SIZE


def width_of(stream: TextIO | BinaryIO) -> int | None:
    """The columns of the terminal that shows what is written to `stream`. None: a file or a pipe."""
    if stream.isatty():
        return size_of(stream).columns
    given = os.environ.get(WIDTH, "")
    return int(given) if given.isdecimal() and given.isascii() and int(given) else None


def filled(line: str, stream: TextIO | BinaryIO, indent: int = 0) -> str:
    """The line, in several where the terminal that shows `stream` is narrower. `indent`: of all but the first."""
    width = width_of(stream)
    if not width or len(line) <= width:
        return line
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def cut(line: str, width: int) -> str:
    """The line, cut to the width, with a mark where it was cut. One with colours fits already."""
    return line if "\x1b" in line else output.cut(line, width)


def understands_escapes(stream: TextIO | BinaryIO) -> bool:
    """Whether the stream is a terminal that can clear a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colours(stream: TextIO | BinaryIO) -> bool:
    """Whether the stream is a terminal with colours, and the user wants them (https://no-color.org)."""
    return understands_escapes(stream) and not os.environ.get("NO_COLOR")


_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


def red(text: str) -> str:
    return f"{_RED}{text}{_PLAIN}"


def height_of(line: str, columns: int) -> int:
    """How many lines of a terminal this one takes, which folds what is longer than it."""
    return max(1, -(-output.width(line.replace(_RED, "").replace(_PLAIN, "")) // columns))


def milliseconds(us: float) -> str:
    """Microseconds as milliseconds, with four digits, or as many as there are."""
    return f"{us / 1000:.{3 if us < 10_000 else 2 if us < 100_000 else 1 if us < 1_000_000 else 0}f}"


class Cell:
    """A column of the screen, which shows these columns of a row: one, or an address and its port."""

    def __init__(self, kind: str, header: str, names: tuple[str, ...], width: int = 0, right: bool = False) -> None:
        self.kind, self.header, self.names, self.right = kind, header, names, right
        self.width = max(width or _USUAL.get(kind, 0), len(header))

    def pad(self, text: str) -> str:
        return output.padded(text, self.width, self.right)

    def text(self, row: Any) -> str:
        return text_of(getattr(row, self.names[0]), self.kind)


class _Milliseconds(Cell):
    def text(self, row: Any) -> str:
        us = getattr(row, self.names[0])
        return "-" if us is None else milliseconds(us)


class _End(Cell):
    def text(self, row: Any) -> str:
        address, port = (getattr(row, name) for name in self.names)
        if address is None:
            return "-"
        return output.endpoint(address, "-" if port is None else port or "*")


_ENDS = {"laddr": ("lport", "LOCAL"), "raddr": ("rport", "REMOTE")}


def cells_of(columns: Sequence[Column]) -> list[Cell]:
    """What a terminal shows on the line of a row: an address and its port are one cell."""
    return [cell for column in columns if (cell := _cell(column, columns))]


def by_importance(cells: Sequence[Cell], important: Sequence[str]) -> list[Cell]:
    """The cells, those of the columns `important` first."""
    order = {name: at for at, name in enumerate(dict.fromkeys(important))}
    return sorted(cells, key=lambda cell: min(order.get(name, len(order)) for name in cell.names))


def that_fit(by_importance: Sequence[Cell], width: int, cells: Sequence[Cell], gap: int = 1) -> list[Cell]:
    """The most important cells that fit side by side, in the order of `cells`. There is always one."""
    chosen: set[Cell] = set()
    room = width + gap
    for cell in by_importance:
        if cell.width + gap <= room or not chosen:
            chosen.add(cell)
            room -= cell.width + gap
    return [cell for cell in cells if cell in chosen]


def _cell(column: Column, columns: Sequence[Column]) -> Cell | None:
    """The cell of a column. None for a port that stands behind its address, and for what stands below the row."""
    names = [each.name for each in columns]
    if column.kind in BELOW or any(column.name == port and end in names for end, (port, _) in _ENDS.items()):
        return None
    port, title = _ENDS.get(column.name, ("", ""))
    if port in names:
        return _End("end", title, (column.name, port))
    right = column.kind in ("int", "float")
    if column.unit == "us" and right:
        return _Milliseconds(column.kind, title_of(column).replace("(us)", "(ms)"), (column.name,), right=True)
    return Cell(column.kind, title_of(column), (column.name,), column.width, right)
