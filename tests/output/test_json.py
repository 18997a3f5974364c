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


def test_the_formats() -> None:
    assert formats() == ["csv", "json", "table"]
