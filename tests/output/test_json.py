"""JSON lines: one object per row, null for what is not known."""

import io
import json
from typing import Any

import msgspec

from tcpscope.output import Column, formats, open_sink

Row = msgspec.defstruct("Row", [("pid", Any), ("comm", Any)])
COLUMNS = (Column("pid"), Column("comm", "comm"))


def test_lines() -> None:
    stream = io.BytesIO()
    sink = open_sink("json", COLUMNS, stream)
    sink.rows([])
    sink.rows([Row(1, 'a"\n'), Row(None, "é")])
    sink.record("stats", {"seen": 2, "lost": 0})
    lines = stream.getvalue().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"pid": 1, "comm": 'a"\n'},
        {"pid": None, "comm": "é"},
        {"stats": {"seen": 2, "lost": 0}},
    ]


def test_what_a_process_has_in_its_name_cannot_move_the_cursor() -> None:
    stream = io.BytesIO()
    sink = open_sink("json", COLUMNS, stream)
    sink.rows([Row(1, "\x9b2J\u202e\u2028"), Row(2, "ü")])
    sink.record("stats", {"\x7f": 1})
    text = stream.getvalue().decode()
    assert text.splitlines() == [
        '{"pid":1,"comm":"\\u009b2J\\u202e\\u2028"}',
        '{"pid":2,"comm":"ü"}',
        '{"stats":{"\\u007f":1}}',
    ]


def test_the_formats() -> None:
    assert formats() == ["csv", "json", "table"]
