"""What a live screen keeps, and where looking back leads."""

from __future__ import annotations

import pytest

from tcpscope.live.pictures import Picture, Pictures


def filled(*sizes: int, seconds: float = 100, rows: int = 100) -> Pictures:
    """A picture with so many rows every second."""
    pictures = Pictures(seconds, rows)
    for number, size in enumerate(sizes):
        pictures.add(Picture(number, float(number), "", [number] * size))
    return pictures


def numbers(pictures: Pictures) -> list[int]:
    """Of all that are kept, found by looking back from the newest."""
    assert pictures.newest
    found = [pictures.newest]
    while (earlier := pictures.beside(found[-1], -1)) is not found[-1]:
        found.append(earlier)
    return [picture.number for picture in reversed(found)]


@pytest.mark.parametrize(
    ("sizes", "limits", "kept"),
    [
        ([1, 1, 1], {}, [0, 1, 2]),
        ([1, 1, 1, 1, 1], {"seconds": 2}, [2, 3, 4]),
        ([4, 4, 4], {"rows": 10}, [1, 2]),
        ([4, 4, 11], {"rows": 10}, [2]),
        ([0, 0, 0], {"rows": 0}, [0, 1, 2]),
    ],
)
def test_limits(sizes: list[int], limits: dict[str, int], kept: list[int]) -> None:
    """By time, and by rows; the newest stays, however large it is."""
    assert numbers(filled(*sizes, **limits)) == kept


def test_steps() -> None:
    pictures = filled(1, 1, 1, 1)
    newest = pictures.newest
    assert newest
    assert pictures.beside(newest, -2).number == 1
    assert pictures.beside(newest, -9).number == 0
    assert pictures.beside(newest, 1) is newest
    assert pictures.beside(pictures.beside(newest, -3), 2).number == 2


def test_a_picture_that_is_not_kept_any_more() -> None:
    """Later is the first one that is; earlier, too: there is nothing before it."""
    pictures = filled(1, 1, 1, 1, 1, seconds=2)
    gone = Picture(0, 0.0, "", [])
    assert [pictures.beside(gone, steps).number for steps in (-1, 1, 2)] == [2, 2, 3]


def test_none_yet() -> None:
    assert Pictures().newest is None
