"""What a live screen has shown in the last minutes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SECONDS = 900
ROWS = 200_000


@dataclass(frozen=True)
class Picture:
    """Rows of one moment: a snapshot, or the groups of an interval.

    number  counts up from picture to picture
    at_s    when it was taken, by a clock that does not jump
    time    the same for the user; empty if he wants none
    """

    number: int
    at_s: float
    time: str
    rows: Sequence[Any]


class Pictures:
    """The newest picture, and those before it: at most so many `seconds` back, and so many `rows` in all."""

    def __init__(self, seconds: float = SECONDS, rows: int = ROWS) -> None:
        self._seconds, self._most = seconds, rows
        self._kept: list[Picture] = []
        self._rows = 0

    def add(self, picture: Picture) -> None:
        self._kept.append(picture)
        self._rows += len(picture.rows)
        while len(self._kept) > 1 and (self._rows > self._most or picture.at_s - self._kept[0].at_s > self._seconds):
            self._rows -= len(self._kept.pop(0).rows)

    @property
    def newest(self) -> Picture | None:
        return self._kept[-1] if self._kept else None

    def beside(self, picture: Picture, steps: int) -> Picture:
        """The picture so many steps later (negative: earlier), or the last one there is in that direction.

        `picture` may be one that is not kept any more.
        """
        at = bisect_left(self._kept, picture.number, key=lambda kept: kept.number)
        if at < len(self._kept) and self._kept[at].number != picture.number and steps > 0:
            steps -= 1  # it stood before the first one
        return self._kept[min(max(at + steps, 0), len(self._kept) - 1)]
