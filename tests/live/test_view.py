"""Which rows are shown, and in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.live.view import View
from tcpscope.output import Column
from tcpscope.output.screen import Cell, cells_of

COLUMNS = (
    Column("bytes", title="TX_BYTES"),
    Column("comm", "comm"),
    Column("raddr", "address"),
    Column("rport"),
)


def row(bytes: int | None, comm: str | None, raddr: str = "10.0.0.1", rport: int = 80) -> Any:
    return SimpleNamespace(bytes=bytes, comm=comm, raddr=raddr, rport=rport)


A, B, C, D = row(30, "nginx"), row(9, "Envoy", "10.0.0.2"), row(None, "curl", "2001:db8::1", 443), row(100, None)
ROWS = [A, B, C, D]


def view(words: str = "") -> View:
    made = View(cells_of(COLUMNS))
    made.words = words
    return made


def cell(view: View, name: str) -> Cell:
    (found,) = (cell for cell in view.cells if name in cell.names)
    return found


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("", ROWS),
        ("  ", ROWS),
        ("NGINX", [A]),
        ("10.0.0", [A, B, D]),
        ("10.0.0 envoy", [B]),
        ("envoy nginx", []),
        ("comm=e", [B]),
        ("remote=[2001", [C]),
        ("raddr=:443", [C]),
        ("rport=10.0.0.2:80", [B]),
        ("tx_bytes=30", [A]),
        ("bytes=30", [A]),
        ("30", [A]),
        ("nothing=30", []),
    ],
)
def test_words(words: str, left: list[Any]) -> None:
    assert view(words).rows(ROWS) == left


def test_without_a_choice_the_order_is_the_tools() -> None:
    assert view().rows(ROWS) == ROWS


def test_numbers_by_size_largest_first_and_what_is_not_known_last() -> None:
    shown = view()
    shown.sort_by(cell(shown, "bytes"))
    assert shown.rows(ROWS) == [D, A, B, C]
    shown.sort_by(cell(shown, "bytes"))
    assert shown.rows(ROWS) == [B, A, D, C]


def test_text_from_a_in_upper_and_lower_case() -> None:
    shown = view()
    shown.sort_by(cell(shown, "comm"))
    assert shown.rows(ROWS) == [C, B, A, D]


def test_equal_rows_keep_their_order() -> None:
    shown = view()
    shown.sort_by(cell(shown, "raddr"))
    assert shown.rows([D, A, B]) == [D, A, B]


def test_back_to_the_order_of_the_tool() -> None:
    shown = view()
    shown.sort_by(cell(shown, "comm"))
    shown.sort_by(None)
    assert shown.rows(ROWS) == ROWS
