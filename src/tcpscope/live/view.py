"""How rows are looked at: which ones, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tcpscope.output.screen import Cell


class View:
    """Rows that have all of the `words`, sorted by a cell, or in the order of the tool.

    A word must be part of a cell, in upper or lower case. NAME=TEXT asks for one cell: its title, or the column's name.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = tuple(cells)
        self.by: Cell | None = None
        self.descending = True
        self.words = ""

    def sort_by(self, cell: Cell | None) -> None:
        """By this cell, numbers from the largest and text from A; the other way round if it is sorted by it already."""
        if cell is self.by:
            self.descending = not self.descending
        else:
            self.by, self.descending = cell, cell is None or cell.right

    def rows(self, rows: Sequence[Any]) -> list[Any]:
        chosen = [row for row in rows if self._has_all(row)] if self.words.split() else list(rows)
        if self.by is None:
            return chosen
        name = self.by.names[0]
        known = [row for row in chosen if getattr(row, name) is not None]
        known.sort(key=self._order(known, self.by), reverse=self.descending)
        return known + [row for row in chosen if getattr(row, name) is None]  # not known: last, either way

    def _order(self, rows: Sequence[Any], cell: Cell) -> Any:
        if cell.right:
            return lambda row: tuple(getattr(row, name) for name in cell.names)
        return lambda row: cell.text(row).casefold()

    def _has_all(self, row: Any) -> bool:
        texts = [cell.text(row).casefold() for cell in self.cells]
        return all(self._has(word.casefold(), texts) for word in self.words.split())

    def _has(self, word: str, texts: Sequence[str]) -> bool:
        name, equals, text = word.partition("=")
        asked = [at for at, cell in enumerate(self.cells) if equals and name in _names(cell)]
        if asked:
            return any(text in texts[at] for at in asked)
        return any(word in each for each in texts)


def _names(cell: Cell) -> set[str]:
    return {cell.header.casefold(), *cell.names}
