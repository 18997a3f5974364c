"""Rows put together: the events are made here, so that what must come out is known. No kernel is needed."""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope import run as running
from tcpscope import summary
from tcpscope.errors import UsageError
from tcpscope.kernel.spec import Spec
from tcpscope.output import Column
from tcpscope.request import Request
from tcpscope.run import Batch, Run
from tcpscope.schema import Clock
from tcpscope.session import Stats
from tcpscope.show import show
from tcpscope.stop import Stop
from tcpscope.summary import Summary
from tcpscope.tool import Tool

ATTEMPT = Spec.of("attempt").layout("attempt")
COUNT = Summary("count", "", ("comm", "outcome"))
LATENCY = Summary("histogram", "", ("outcome",), "latency_us")
NOT_KNOWN = 2**64 - 1
OUTCOMES = {"ESTABLISHED": 0, "REFUSED": 1, "TIMED_OUT": 2}


def event(comm: str = "web", outcome: str = "ESTABLISHED", latency_us: int = 100, rport: int = 80) -> bytes:
    data = bytearray(ATTEMPT.size)
    values = {"comm": comm.encode(), "outcome": OUTCOMES[outcome], "latency_us": latency_us, "rport": rport}
    for name, value in values.items():
        field = ATTEMPT.field(name)
        struct.pack_into(f"<{field.format}", data, field.offset, value)
    return bytes(data)


class Given(Run):
    """Events that are given, a batch at each poll, and a clock that goes on by a second then."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        decoder = ATTEMPT.select(names).decoder(Clock("none"))
        super().__init__([Column.of(field) for field in decoder.fields])
        self._source, self._decode = source, decoder.rows
        self._left = list(source.batches)
        self.stats = source.stats

    def poll(self) -> Iterator[Batch]:
        records = self._left.pop(0)
        self.done = not self._left
        self._source.now += 1
        self.stats.shown += len(records)
        yield Batch("event", self._decode(b"".join(records)))

    def end(self) -> Iterator[Batch]:
        yield from ()

    @property
    def pause(self) -> float:
        return 0

    def account(self) -> Stats:
        return self.stats


class Source(Tool):
    """A tool whose events are given, which `what` puts together."""

    what = COUNT

    def __init__(self, *batches: list[bytes], monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.batches = batches
        self.now = 0.0
        self.stats = Stats()
        if monkeypatch:
            monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: self.now))

    def columns(self, request: Request) -> tuple[Column, ...]:
        return self.what.columns([Column.of(field) for field in ATTEMPT.fields], request)

    def open(self, request: Request) -> Run:
        return self.what.open(request, self.columns(request), lambda names: Given(self, names))


def run(what: Summary, source: Source, **request: Any) -> str:
    """What is written. There is nothing attached, and no privilege to give up."""
    source.what = what
    stream = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcpscope.show.begin", lambda *_: None)
        show(source, Request(**{"output": "json", "time": "none"} | request), stream)
    return stream.getvalue().decode()


def rows(*arguments: Any, **request: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*arguments, **request).splitlines()]


def test_counts_of_each_kind() -> None:
    source = Source([event(), event("db")], [], [event("db"), event("db", "REFUSED")])
    assert rows(COUNT, source) == [
        {"comm": "db", "outcome": "ESTABLISHED", "count": 2, "total": True},
        {"comm": "db", "outcome": "REFUSED", "count": 1, "total": True},
        {"comm": "web", "outcome": "ESTABLISHED", "count": 1, "total": True},
    ]


def test_by_one_column() -> None:
    source = Source([event(), event("db"), event("db")])
    assert rows(COUNT, source, options={"by": "comm"}) == [
        {"comm": "db", "count": 2, "total": True},
        {"comm": "web", "count": 1, "total": True},
    ]


def test_by_what_is_not_known() -> None:
    """It is a kind of its own."""
    found = rows(COUNT, Source([event(""), event(""), event("db")]), options={"by": "comm, comm"})
    assert found == [{"comm": None, "count": 2, "total": True}, {"comm": "db", "count": 1, "total": True}]


def test_by_the_value_itself() -> None:
    found = rows(LATENCY, Source([event(latency_us=5), event(latency_us=5), event()]), options={"by": "latency_us"})
    assert [(row["latency_us"], row["count"], row["max_us"]) for row in found] == [(5, 2, 5), (100, 1, 100)]


def test_most_first_and_no_more_than_asked_for() -> None:
    source = [event("a"), *[event("b")] * 3, *[event("c")] * 2]
    found = rows(COUNT, Source(source), options={"by": "comm"}, max_events=2)
    assert [(row["comm"], row["count"]) for row in found] == [("b", 3), ("c", 2)]


def test_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two seconds what came in them, the rest at the end, then everything."""
    batches = [[event()], [event(), event("db")], [], [], [event("db")]]
    found = rows(COUNT, Source(*batches, monkeypatch=monkeypatch), options={"by": "comm"}, interval=2.0)
    assert [(row["comm"], row["count"], row["total"]) for row in found] == [
        ("web", 2, False),
        ("db", 1, False),
        ("db", 1, False),
        ("db", 2, True),
        ("web", 2, True),
    ]


def test_a_stop_at_the_end_of_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been in an interval is not in the next one too."""
    source = Source([event()], [event(), event("db")], [event("db")], monkeypatch=monkeypatch)
    source.what = COUNT
    found = []
    with Stop() as stop, source.open(Request(interval=2.0, time="none", options={"by": "comm"})) as opened:
        for batch in opened.batches(stop):
            found.extend((row.comm, row.count, row.total) for row in batch.rows)
            if batch.kind == "interval":
                stop.stop()
    assert found == [(comm, 2, total) for total in (False, True) for comm in ("db", "web")]


def test_distribution() -> None:
    """Values are exact below 8; those that are not known are counted, and change nothing else."""
    values = [*range(1, 6), NOT_KNOWN]
    events = [event(latency_us=us) for us in values]
    (row,) = rows(LATENCY, Source(events[:3], events[3:]))
    assert row == {
        "outcome": "ESTABLISHED",
        "count": 6,
        "min_us": 1,
        "p50_us": 3,
        "p90_us": 5,
        "p99_us": 5,
        "max_us": 5,
        "mean_us": 3.0,
        "histogram": [[1, 1, 1], [2, 3, 2], [4, 7, 2]],
        "total": True,
    }


def test_zero_is_a_value() -> None:
    (row,) = rows(LATENCY, Source([event(latency_us=0)]))
    assert (row["min_us"], row["max_us"], row["mean_us"], row["histogram"]) == (0, 0, 0.0, [[0, 0, 1]])


def test_nothing_known() -> None:
    (row,) = rows(LATENCY, Source([event(latency_us=NOT_KNOWN)] * 2))
    assert row["count"] == 2
    assert [row[name] for name in ("min_us", "p50_us", "max_us", "mean_us")] == [None] * 4
    assert row["histogram"] == []


def test_each_kind_has_its_own_values() -> None:
    source = Source([event(latency_us=1), event(outcome="REFUSED", latency_us=1000), event(latency_us=3)])
    assert [(row["outcome"], row["min_us"], row["max_us"]) for row in rows(LATENCY, source)] == [
        ("ESTABLISHED", 1, 3),
        ("REFUSED", 1000, 1000),
    ]


def test_the_largest_of_each_connection() -> None:
    """The groups of one connection stand together, and what is not known is not the largest. Other groups have none."""
    what = Summary("summary", "", ("comm", "outcome"), "latency_us", of_one=("comm",))
    events = [
        event("web", latency_us=1),
        event("db", latency_us=7),
        event("web", "REFUSED", latency_us=900),
        event("db", "REFUSED", latency_us=3),
        event("idle", latency_us=NOT_KNOWN),
    ]
    found = rows(what, Source(events))
    assert [(row["comm"], row["outcome"], row["largest"]) for row in found] == [
        ("db", "ESTABLISHED", True),
        ("db", "REFUSED", False),
        ("idle", "ESTABLISHED", False),
        ("web", "REFUSED", True),
        ("web", "ESTABLISHED", False),
    ]
    assert [row["largest"] for row in rows(what, Source(events), options={"by": "outcome"})] == [None, None]
    assert "->" not in run(what, Source(events), output="table")


def test_drawn_in_a_table() -> None:
    """Below each kind that has values; the column with the numbers is for machines."""
    source = Source([event(latency_us=1), event(latency_us=3), event(outcome="REFUSED", latency_us=NOT_KNOWN)])
    lines = run(LATENCY, source, output="table").splitlines()
    assert [line.split()[0] for line in lines if line] == ["OUTCOME", "ESTABLISHED", "us", "1", "2", "REFUSED"]
    assert "HISTOGRAM" not in lines[0]
    assert [line.count("*") for line in lines if "->" in line] == [40, 40]


def test_a_count_is_not_drawn() -> None:
    lines = run(COUNT, Source([event()]), output="table").splitlines()
    assert [" ".join(line.split()) for line in lines] == ["COMM OUTCOME COUNT TOTAL", "web ESTABLISHED 1 yes"]


def test_nothing_came() -> None:
    """The titles say that all is well."""
    assert run(COUNT, Source([], []), output="table").split() == ["COMM", "OUTCOME", "COUNT", "TOTAL"]
    assert rows(COUNT, Source([])) == []
    assert rows(LATENCY, Source([])) == []


def test_columns_are_chosen() -> None:
    found = rows(COUNT, Source([event(), event("db")]), columns=("count", "comm"))
    assert [list(row) for row in found] == [["count", "comm"]] * 2
    text = run(LATENCY, Source([event()]), output="csv", columns=("max_us", "outcome"))
    assert list(csv.reader(io.StringIO(text))) == [["max_us", "outcome"], ["100", "ESTABLISHED"]]
    with pytest.raises(UsageError, match="unknown column 'laddr'"):
        run(COUNT, Source([]), columns=("laddr",))


def test_time_of_a_row() -> None:
    assert all(row["time"] >= 0 for row in rows(COUNT, Source([event()]), time="elapsed"))
    assert rows(COUNT, Source([event()]), time="iso")[0]["time"].endswith("Z")


@pytest.mark.parametrize(
    ("by", "error"),
    [
        (" , ", "--by is empty"),
        ("time", "--by has 'time'"),
        ("comm,time", "--by has 'time'"),
        ("com", "unknown column 'com'"),
        ("count", "unknown column 'count'"),
    ],
)
def test_wrong_usage(by: str, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        run(COUNT, Source([event()]), options={"by": by})


def test_kinds_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes when there are kinds enough is lost, and counted; a kind that is there already goes on."""
    monkeypatch.setattr(summary, "MAX_KINDS", 2)
    batches = [event("a"), event("b")], [event("a"), event("c"), event("d"), event("c")]
    source = Source(*batches)
    rows = [json.loads(line) for line in run(COUNT, source).splitlines()]
    assert {row["comm"]: row["count"] for row in rows} == {"a": 2, "b": 1}
    assert (source.stats.shown, source.stats.lost) == (3, 3)


def test_kinds_without_end_in_intervals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that an interval shows are not lost, though the total has no room for their kind."""
    monkeypatch.setattr(summary, "MAX_KINDS", 2)
    batches = [event("a"), event("b")], [], [], [event("c"), event("d"), event("e"), event("d")], []
    source = Source(*batches, monkeypatch=monkeypatch)
    found = rows(COUNT, source, options={"by": "comm"}, interval=2.0)
    shown = [{row["comm"]: row["count"] for row in found if row["total"] is total} for total in (False, True)]
    assert shown == [{"a": 1, "b": 1, "c": 1, "d": 2}, {"a": 1, "b": 1}]
    assert (source.stats.shown, source.stats.lost) == (5, 1)
    assert "4 rows of further groups are in the intervals only, not in the total" in capsys.readouterr().err
