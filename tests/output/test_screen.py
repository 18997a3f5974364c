"""The table on a terminal: what fits, most important first; ends in one column; milliseconds."""

import io
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.output import Column, width
from tcpscope.output.screen import Sink, milliseconds
from tcpscope.tool import find, names

COLUMNS = (
    Column("time", "time"),
    Column("pid", width=7),
    Column("comm", "comm"),
    Column("laddr", "address"),
    Column("lport"),
    Column("raddr", "address"),
    Column("rport"),
    Column("outcome", "enum", width=11),
    Column("latency_us", unit="us", title="LAT(us)"),
    Column("syn_retrans"),
)
IMPORTANT = ("outcome", "raddr", "latency_us", "comm", "time", "pid", "laddr")
ROW: dict[str, Any] = {
    "time": "12:34:56.789",
    "pid": 4194304,
    "comm": "curl",
    "laddr": "192.0.2.1",
    "lport": 65535,
    "raddr": "198.51.100.200",
    "rport": 443,
    "outcome": "ESTABLISHED",
    "latency_us": 1234,
    "syn_retrans": 0,
}
LONG = "2001:db8:1111:2222:3333:4444:5555:6666"


def screen(*rows: dict[str, Any], width: int = 80, **options: Any) -> list[str]:
    stream = io.BytesIO()
    sink = Sink(COLUMNS, stream, options.pop("header", True), IMPORTANT, width=lambda: width, **options)
    sink.rows([])
    for row in rows:
        sink.rows([SimpleNamespace(**ROW | row)])
    return stream.getvalue().decode().splitlines()


def test_what_fits_in_the_usual_order() -> None:
    assert screen({}) == [
        "TIME             PID COMM         REMOTE                OUTCOME     LAT(ms)",
        "12:34:56.789 4194304 curl         198.51.100.200:443    ESTABLISHED   1.234",
    ]
    assert screen({}, width=60) == [
        "COMM         REMOTE                OUTCOME     LAT(ms)",
        "curl         198.51.100.200:443    ESTABLISHED   1.234",
    ]
    assert "LOCAL" in screen(width=120)[0]
    assert "192.0.2.1:65535" in screen({}, width=120)[1]


def test_less_important_ones_that_fit_are_shown() -> None:
    """At 50 the process does not fit any more, but the PID does."""
    assert screen(width=50)[0].split() == ["PID", "REMOTE", "OUTCOME", "LAT(ms)"]


@pytest.mark.parametrize("width", [10, 30, 40, 60, 80, 100, 120, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    lines = screen({}, {"raddr": LONG, "laddr": LONG, "comm": "fifteen-letters"}, {"latency_us": 10**12}, width=width)
    assert max(map(len, lines)) <= width


def test_the_answer_is_there_with_a_long_address() -> None:
    *_, titles, row = screen({}, {"raddr": LONG, "laddr": LONG, "comm": "fifteen-letters"})
    assert f"[{LONG}]:443" in row
    assert titles.split() == ["COMM", "REMOTE", "OUTCOME", "LAT(ms)"]
    assert titles.index("REMOTE") == row.index("[")


def test_wide_shows_all() -> None:
    titles, row = screen({}, width=40, wide=True)
    assert titles.split()[-4:] == ["OUTCOME", "LAT(ms)", "SYN", "RETRANS"]
    assert "192.0.2.1:65535" in row


def test_titles_come_again_when_columns_move() -> None:
    lines = screen({}, {}, {"comm": "fifteen-letters"}, {})
    assert [line.split()[0] for line in lines] == ["TIME", ROW["time"], ROW["time"], "TIME", ROW["time"], ROW["time"]]
    assert "TIME" not in "".join(screen({}, header=False))


def test_ends() -> None:
    def ends(**row: Any) -> list[str]:
        return screen(row, width=200)[-1].split()[3:5]

    assert ends(laddr="::1", raddr=LONG) == ["[::1]:65535", f"[{LONG}]:443"]
    assert ends(raddr="0.0.0.0", rport=0) == ["192.0.2.1:65535", "0.0.0.0:*"]
    assert ends(laddr=None, lport=None, rport=None) == ["-", "198.51.100.200:-"]


def test_an_address_without_a_port_stays_as_it_is() -> None:
    stream = io.BytesIO()
    columns = (Column("raddr", "address"), Column("lport"))
    Sink(columns, stream, True, width=lambda: 80).rows([SimpleNamespace(raddr="::1", lport=7)])
    assert [line.split() for line in stream.getvalue().decode().splitlines()] == [["RADDR", "LPORT"], ["::1", "7"]]


MILLISECONDS = {
    0: "0.000",
    3.5: "0.004",
    41: "0.041",
    9_999: "9.999",
    12_345: "12.35",
    123_456: "123.5",
    1_234_567: "1235",
}


@pytest.mark.parametrize(("us", "text"), MILLISECONDS.items())
def test_milliseconds(us: float, text: str) -> None:
    assert milliseconds(us) == text


def test_unknown_and_zero() -> None:
    assert screen({"latency_us": None})[1].endswith(" -")
    assert screen({"latency_us": 0})[1].endswith(" 0.000")


def test_a_list_is_cut_at_the_edge() -> None:
    stream = io.BytesIO()
    sink = Sink((Column("pid"), Column("holders", "list")), stream, True, width=lambda: 30)
    sink.rows([SimpleNamespace(pid=1, holders=["nginx(1)"] * 9)])
    assert stream.getvalue().decode().splitlines() == ["PID HOLDERS", "  1 nginx(1), nginx(1), nginx>"]


def test_below_the_row() -> None:
    stream = io.BytesIO()
    columns = (Column("pid"), Column("stack", "stack"), Column("histogram", "distribution", "us"))
    row = SimpleNamespace(pid=1, stack=["a" * 90], histogram=[[1, 1, 1]])
    Sink(columns, stream, True, width=lambda: 80).rows([row])
    lines = stream.getvalue().decode().splitlines()
    assert lines[2] == "    " + "a" * 75 + ">"
    assert lines[-2].split()[:3] == ["1", "->", "1"]
    assert max(map(len, lines)) <= 80


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("env", "colours"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),  # no-color.org: an empty value does not count
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
    ids=str,
)
def test_bad_news_are_red(env: dict[str, str], colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    sink = Sink(COLUMNS, stream, True, IMPORTANT, alarming={"outcome": lambda o: o == "REFUSED"}, width=lambda: 80)
    sink.rows([SimpleNamespace(**ROW), SimpleNamespace(**ROW | {"outcome": "REFUSED"})])
    _, good, bad = stream.getvalue().decode().splitlines()
    assert "\x1b" not in good
    assert ("\x1b[31mREFUSED\x1b[0m    " in bad) == ("\x1b" in bad) == colours
    assert bad.replace("\x1b[31m", "").replace("\x1b[0m", "") == good.replace("ESTABLISHED", "REFUSED    ")


def test_what_is_not_known_is_no_bad_news() -> None:
    for name in names():
        for column, is_bad in find(name).alarming.items():
            assert is_bad(None) is False, (name, column)


def test_no_colours_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.BytesIO()
    Sink(COLUMNS, stream, True, alarming={"outcome": bool}, width=lambda: 80).rows([SimpleNamespace(**ROW)])
    assert b"\x1b" not in stream.getvalue()


def test_a_page_is_cut_and_its_colours_are_not() -> None:
    columns = (Column("outcome", "enum"), Column("pid", width=90))
    sink = Sink(columns, Terminal(), True, wide=True, alarming={"outcome": bool}, width=lambda: 20)
    assert sink.page([SimpleNamespace(outcome="REFUSED", pid=1)]) == ["OUTCOME            >"] * 1 + [
        "REFUSED            >"
    ]


def test_wide_characters_are_aligned_and_cut() -> None:
    lines = screen({"comm": "日本"}, {"comm": "e\u0301"}, {"comm": "\u202ea"}, width=60)
    assert [width(line.partition("198.")[0]) for line in lines[1:]] == [13, 13, 13]
    (_, line) = screen({"comm": "日本語日本語日本語"}, width=12)
    assert width(line) <= 12
