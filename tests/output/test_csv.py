"""CSV that a CSV reader reads back."""

import csv
import io
from types import SimpleNamespace
from typing import Any

from tcpscope.output import Column, open_sink

COLUMNS = (Column("pid"), Column("comm", "comm"), Column("stack", "stack"))


def read_back(*rows: dict[str, Any], columns: tuple[Column, ...] = COLUMNS, header: bool = True) -> list[list[str]]:
    stream = io.BytesIO()
    sink = open_sink("csv", columns, stream, header)
    sink.rows([SimpleNamespace(**row) for row in rows])
    sink.record("stats", {"seen": 1})
    return list(csv.reader(io.StringIO(stream.getvalue().decode(), newline="")))


def test_names_then_rows() -> None:
    assert read_back({"pid": 1, "comm": "a", "stack": None}) == [["pid", "comm", "stack"], ["1", "a", ""]]
    assert read_back(header=False) == []


def test_what_needs_quotes() -> None:
    """A process may call itself anything."""
    for name in ('a,b"c', "'", "é"):
        assert read_back({"pid": None, "comm": name, "stack": ["f+0x1", "g+0x2"]})[1] == ["", name, "f+0x1;g+0x2"]


def test_lists_are_one_field() -> None:
    columns = (Column("holders", "list"), Column("histogram", "distribution", "us"))
    read = read_back({"holders": ["a(1)", "b(2)"], "histogram": [[16, 31, 1], [32, 63, 2]]}, columns=columns)
    assert read[1] == ["a(1);b(2)", "16-31:1;32-63:2"]
    assert read_back({"holders": [], "histogram": []}, columns=columns)[1] == ["", ""]


def test_what_would_repaint_the_terminal() -> None:
    for name, shown in (("\x1b]2;gone", "\\x1b]2;gone"), ("a\nb", "a\\nb"), ("\x9b2J", "\\x9b2J")):
        assert read_back({"pid": None, "comm": name, "stack": None})[1] == ["", shown, ""]


def test_one_column() -> None:
    assert read_back({"pid": 3}, columns=COLUMNS[:1]) == [["pid"], ["3"]]
