"""The table: aligned, nothing cut, `-` for what is not known."""

import io
from types import SimpleNamespace
from typing import Any

from tcpscope.output import Column, open_sink

COLUMNS = (
    Column("pid", width=7),
    Column("comm", "comm"),
    Column("raddr", "address"),
    Column("sent_bytes", unit="bytes"),
)


def table(*rows: dict[str, Any], columns: tuple[Column, ...] = COLUMNS, header: bool = True) -> list[str]:
    stream = io.BytesIO()
    sink = open_sink("table", columns, stream, header)
    sink.rows([])
    sink.rows([SimpleNamespace(**row) for row in rows])
    return stream.getvalue().decode().splitlines()


def test_columns_are_aligned() -> None:
    lines = table(
        {"pid": 1, "comm": "init", "raddr": "192.0.2.1", "sent_bytes": 5},
        {"pid": 4194304, "comm": "fifteen-letters", "raddr": "::1", "sent_bytes": 1234567},
    )
    assert lines == [
        "    PID COMM            RADDR           SENT(bytes)",
        "      1 init            192.0.2.1                 5",
        "4194304 fifteen-letters ::1                 1234567",
    ]


def test_wide_characters_are_aligned() -> None:
    lines = table(
        {"pid": 1, "comm": "日本", "raddr": "192.0.2.1", "sent_bytes": 5},
        {"pid": 2, "comm": "e\u0301\u202e", "raddr": "192.0.2.1", "sent_bytes": 5},
        {"pid": 3, "comm": "日本語日本語日本", "raddr": "192.0.2.1", "sent_bytes": 5},
    )
    assert lines[1:] == [
        "      1 日本             192.0.2.1                 5",
        "      2 e\u0301\\u202e          192.0.2.1                 5",
        "      3 日本語日本語日本 192.0.2.1                 5",
    ]


def test_an_address_is_never_cut() -> None:
    long = "2001:db8:1111:2222:3333:4444:5555:6666"
    assert long in table({"pid": 1, "comm": "a", "raddr": long, "sent_bytes": 0})[1]


LONG = "2001:db8:1111:2222:3333:4444:5555:6666"
SHORT = "192.0.2.1"


def in_batches(stream: io.BytesIO, *batches: list[str]) -> list[str]:
    """What is written for batches of rows with these remote addresses; the column's title and the port's end agree."""
    sink = open_sink("table", (*COLUMNS, Column("rport")), stream)
    sink.rows([])
    for addresses in batches:
        rows = [{"pid": 1, "comm": "a", "raddr": each, "sent_bytes": 5, "rport": 443} for each in addresses]
        sink.rows([SimpleNamespace(**row) for row in rows])
    return stream.getvalue().decode().splitlines()


def test_a_long_value_widens_its_column() -> None:
    """For its batch and for all later ones. Titles come once."""
    titles, *rows = in_batches(io.BytesIO(), [SHORT], [LONG, SHORT], [SHORT])
    assert "RADDR" in titles and not any("RADDR" in row for row in rows)
    assert [len(row) for row in rows] == [57, 80, 80, 80]


def test_titles_fit_what_comes_with_them() -> None:
    stream = io.BytesIO()
    open_sink("table", COLUMNS, stream).rows([SimpleNamespace(pid=1, comm="a", raddr=LONG, sent_bytes=5)])
    titles, row = stream.getvalue().decode().splitlines()
    assert len(titles) == len(row)


def test_a_number_widens_its_column_too() -> None:
    lines = table({"pid": 1, "comm": "a", "raddr": "::1", "sent_bytes": 10**15}, columns=COLUMNS[::-1])
    assert lines[1].startswith(f"{10**15} ::1 ")


def test_a_list_and_a_last_column_move_nothing() -> None:
    columns = (Column("pid"), Column("holders", "list"), Column("comm", "comm"))
    stream = io.BytesIO()
    sink = open_sink("table", columns, stream)
    for holders, comm in ((["a(1)"], "a"), (["a(1)"] * 40, "b" * 20), (["a(1)"], "c")):
        sink.rows([SimpleNamespace(pid=1, holders=holders, comm=comm)])
    lines = stream.getvalue().decode().splitlines()
    assert [line.split()[-1][0] for line in lines] == ["C", "a", "b", "c"]
    assert lines[3] == "  1 a(1)    c"


def test_unknown_is_not_zero() -> None:
    row = table({"pid": None, "comm": None, "raddr": None, "sent_bytes": 0})[1]
    assert row.split() == ["-", "-", "-", "0"]


def test_a_name_cannot_write_to_the_terminal() -> None:
    """A process may call itself anything, also a line of its own or an escape sequence."""
    lines = table({"pid": 1, "comm": "a\n\x1b[2Jé", "raddr": "::1", "sent_bytes": 0})
    assert len(lines) == 2
    assert lines[1].split() == ["1", "a\\n\\x1b[2Jé", "::1", "0"]
    (line,) = table({"holders": ["a\nb(1)"]}, columns=(Column("holders", "list"),), header=False)
    assert line == "a\\nb(1)"


def test_titles_once_or_not_at_all() -> None:
    row = {"pid": 1, "comm": "a", "raddr": "::1", "sent_bytes": 0}
    assert len(table(row, row)) == 3
    assert len(table(row, header=False)) == 1
    assert table() == ["    PID COMM            RADDR           SENT(bytes)"]


def test_title_and_width_of_a_column() -> None:
    columns = Column("accept_queue", title="ACCEPTQ"), Column("state", "enum", width=11), Column("wait_us", unit="us")
    assert table(columns=columns) == ["ACCEPTQ STATE       WAIT(us)"]


def test_a_distribution_is_drawn_below_its_row() -> None:
    columns = (Column("count"), Column("histogram", "distribution", "us"))
    lines = table({"count": 3, "histogram": [[1, 1, 1], [2, 3, 2]]}, {"count": 0, "histogram": []}, columns=columns)
    assert [line.split()[:4] for line in lines] == [
        ["COUNT"],
        ["3"],
        [],
        ["us", ":", "count", "distribution"],
        ["1", "->", "1", ":"],
        ["2", "->", "3", ":"],
        [],
        ["0"],
    ]


def test_a_stack_stands_below_its_row() -> None:
    columns = (Column("pid"), Column("stack", "stack"))
    lines = table({"pid": 7, "stack": ["tcp_v4_rcv+0x1", "ip_rcv+0x2"]}, {"pid": 8, "stack": None}, columns=columns)
    assert [line.strip() for line in lines] == ["PID", "7", "tcp_v4_rcv+0x1", "ip_rcv+0x2", "8"]
    lines = table({"pid": 7, "stack": ["tcp_v4_rcv+0x1"]}, {"pid": 8, "stack": None}, columns=columns[::-1])
    assert lines == ["PID", "  7", "    tcp_v4_rcv+0x1", "  8"]
    assert table({"stack": ["f"]}, columns=columns[1:]) == ["", "", "    f"]


def test_kinds() -> None:
    columns = (Column("ok", "bool"), Column("rate", "float"), Column("time", "time"), Column("holders", "list"))
    line = table({"ok": True, "rate": 2.25, "time": 1.5, "holders": ["a(1)", "b(2)"]}, columns=columns)[1]
    assert line.split() == ["yes", "2.2", "1.500000", "a(1),", "b(2)"]


def test_statistics_have_no_place() -> None:
    stream = io.BytesIO()
    open_sink("table", COLUMNS, stream).record("stats", {"seen": 1})
    assert stream.getvalue() == b""
