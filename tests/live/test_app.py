"""The live screen, driven by textual's pilot: keys go in, what is on the screen comes out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import msgspec
import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from tcpscope import live
from tcpscope.errors import TcpscopeError, UsageError
from tcpscope.live.app import Screen
from tcpscope.output import Column
from tcpscope.request import Request
from tcpscope.run import Batch, Run
from tcpscope.session import Stats
from tcpscope.stop import Stop
from tcpscope.tool import Tool, find
from tests.conftest import DEADLINE

COLUMNS = (
    Column("time", "time"),
    Column("tx_bytes", width=9),
    Column("comm", "comm"),
    Column("raddr", "address", doc="remote address"),
    Column("rport"),
    Column("laddr", "address"),
    Column("cookie", hidden=True),
    Column("values", "distribution", "us"),
)
Row = msgspec.defstruct("Row", [(column.name, Any) for column in COLUMNS])


def row(tx_bytes: int | None, comm: str, raddr: str = "10.0.0.1") -> Any:
    return Row(None, tx_bytes, comm, raddr, 80, "192.0.2.1", 4711, [(1, 1, 7)])


class Given(Run):
    """Yields the batches that `give` hands over."""

    repeats = "connection"
    important = ("tx_bytes", "comm", "raddr")

    def __init__(self) -> None:
        super().__init__(COLUMNS)
        self.waiting: list[Batch] = []
        self.error: TcpscopeError | None = None
        self.ended_by = ""

    def give(self, *rows: Any) -> None:
        self.waiting.append(Batch("snapshot", rows, self.stats.seen))
        self.stats.seen += 1

    def poll(self) -> Iterator[Batch]:
        if self.error:
            raise self.error
        while self.waiting:
            yield self.waiting.pop(0)

    def end(self) -> Iterator[Batch]:
        self.ended_by = threading.current_thread().name
        yield from ()

    def account(self) -> Stats:
        return self.stats

    @property
    def pause(self) -> float:
        return 0.01


class Shown:
    """What stands on the screen."""

    def __init__(self, app: Screen, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    @property
    def above(self) -> str:
        return str(self.app.screen_stack[0].query_one("#above", Static).render())

    @property
    def notes(self) -> str:
        return str(self.app.screen_stack[0].query_one("#notes", Static).render())

    @property
    def table(self) -> DataTable[Any]:
        return cast("DataTable[Any]", self.app.screen_stack[0].query_one(DataTable))

    @property
    def titles(self) -> list[str]:
        return [str(column.label) for column in self.table.ordered_columns]

    @property
    def rows(self) -> list[list[str]]:
        return [[str(cell) for cell in self.table.get_row_at(at)] for at in range(self.table.row_count)]

    def column(self, title: str) -> list[str]:
        if title not in self.titles:
            return []
        at = self.titles.index(title)
        return [row[at] for row in self.rows]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.above!r} {self.titles} {self.rows}"
            await self.pilot.pause(0.01)


def play(
    body: Callable[[Given, Shown], Awaitable[None]], size: tuple[int, int] = (80, 24), **wanted: Any
) -> tuple[Given, Screen, Stop]:
    """Run `body` while the screen shows a run."""
    run = Given()
    stop = Stop(wanted.get("duration"))
    app = Screen(find("top"), Request(output="screen", time="local", **wanted), run, stop)

    async def played() -> None:
        async with app.run_test(size=size) as pilot:
            shown = Shown(app, pilot)
            await shown.until(lambda: "waiting" in shown.above, "the beginning")
            await body(run, shown)
            stop.stop()
            await shown.until(lambda: not app.is_running, "the end")

    asyncio.run(played())
    stop.close()
    return run, app, stop


THREE = (row(30, "nginx"), row(5, "envoy", "10.0.0.2"), row(None, "curl", "2001:db8::1"))


def test_rows_in_the_order_of_the_tool_and_in_its_words() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.give(*THREE)
        await shown.until(lambda: shown.rows, "the rows")
        assert shown.column("REMOTE") == ["10.0.0.1:80", "10.0.0.2:80", "[2001:db8::1]:80"]
        assert shown.column("TX BYTES") == ["30", "5", "-"]
        assert "3 connections" in shown.above
        run.give(THREE[0])
        await shown.until(lambda: len(shown.rows) == 1, "the next picture")
        assert "1 connection" in shown.above
        assert "1 connections" not in shown.above

    run, _, _ = play(body)
    assert run.ended_by not in ("", "MainThread")


def test_columns_that_fit_and_all_of_them() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.give(*THREE)
        await shown.until(lambda: shown.rows, "the rows")
        assert shown.titles == ["TX BYTES", "COMM", "REMOTE"]
        await shown.pilot.press("w")
        assert shown.titles == ["TX BYTES", "COMM", "REMOTE", "LADDR", "COOKIE"]
        await shown.pilot.press("w")
        await shown.pilot.resize_terminal(120, 24)
        await shown.until(lambda: "LADDR" in shown.titles, "room for all")
        assert "COOKIE" not in shown.titles

    play(body, size=(52, 24))


def test_sorting() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.give(*THREE)
        await shown.until(lambda: shown.rows, "the rows")
        await shown.pilot.press(">")
        assert shown.titles[0] == "TX BYTESv"
        assert shown.column("TX BYTESv") == ["30", "5", "-"]
        await shown.pilot.press("r")
        assert shown.column("TX BYTES^") == ["5", "30", "-"]
        run.give(row(1, "new"), *THREE)
        await shown.until(lambda: len(shown.rows) == 4, "a further picture in that order")
        assert shown.column("TX BYTES^") == ["1", "5", "30", "-"]
        await shown.pilot.press(">")
        assert shown.column("COMM^") == ["curl", "envoy", "new", "nginx"]
        await shown.pilot.press("<", "<")
        assert shown.titles[:2] == ["TX BYTES", "COMM"]
        assert shown.column("COMM") == ["new", "nginx", "envoy", "curl"]
        await shown.pilot.click(DataTable, offset=(16, 0))
        assert shown.column("COMM^") == ["curl", "envoy", "new", "nginx"]

    play(body)


def test_filter() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.give(*THREE)
        await shown.until(lambda: shown.rows, "the rows")
        await shown.pilot.press("slash", *"10.0.0.", "enter")
        assert shown.column("COMM") == ["nginx", "envoy"]
        assert "2 of 3 connections  with 10.0.0." in shown.above
        run.give(*THREE, row(1, "other"))
        await shown.until(lambda: "3 of 4" in shown.above, "a further picture with that filter")
        await shown.pilot.press("q")  # a key again, no letter of the filter
        await shown.until(lambda: not shown.app.is_running, "the end")

    play(body)


def test_pause_and_look_back() -> None:
    async def body(run: Given, shown: Shown) -> None:
        for number in range(4):
            run.give(row(number, "nginx"))
            await shown.until(lambda number=number: shown.column("TX BYTES") == [str(number)], "a picture")
        await shown.pilot.press("space")
        run.give(row(4, "nginx"))
        await shown.until(lambda: shown.app.pictures.newest.number == 4, "a picture behind")  # type: ignore[union-attr]
        assert shown.column("TX BYTES") == ["3"]
        assert "PAUSED" in shown.above
        await shown.pilot.press("[", "[")
        assert shown.column("TX BYTES") == ["1"]
        await shown.pilot.press("]", "]", "]", "]", "]")
        assert shown.column("TX BYTES") == ["4"]
        assert "PAUSED" in shown.above  # it stays there
        await shown.pilot.press("[", "escape")
        assert shown.column("TX BYTES") == ["4"]
        assert "PAUSED" not in shown.above
        run.give(row(5, "nginx"))
        await shown.until(lambda: shown.column("TX BYTES") == ["5"], "live again")

    play(body)


def test_all_of_a_row() -> None:
    """Also what a table has no place for."""

    async def body(run: Given, shown: Shown) -> None:
        run.give(*THREE)
        await shown.until(lambda: shown.rows, "the rows")
        await shown.pilot.press("down", "enter")
        await shown.until(lambda: len(shown.app.screen_stack) == 2, "the row")
        texts = [
            widget.render_line(at).text for widget in shown.app.screen.query(Static) for at in range(widget.size.height)
        ]
        text = "\n".join(texts)
        for words in ("envoy", "10.0.0.2", "4711", "remote address", "distribution"):
            assert words in text
        await shown.pilot.press("escape")
        assert len(shown.app.screen_stack) == 1

    play(body)


def test_more_rows_than_a_screen_takes() -> None:
    """They are all sorted and searched."""

    async def body(run: Given, shown: Shown) -> None:
        run.give(*(row(number, f"worker{number}") for number in range(3000)))
        await shown.until(lambda: shown.rows, "the rows")
        assert len(shown.rows) == 250
        assert "3,000 connections, the first 250" in shown.above
        await shown.pilot.press(">")
        assert shown.column("TX BYTESv")[0] == "2999"
        await shown.pilot.press("slash", *"worker2998", "enter")
        assert shown.column("COMM") == ["worker2998"]

    play(body)


def test_what_is_lost_and_what_cannot_be_seen() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.notes += ["something cannot be seen", "something cannot be seen"]
        run.give(*THREE)
        await shown.until(lambda: shown.rows, "the rows")
        assert shown.notes == "something cannot be seen"
        run.stats.lost = 1234
        run.give(*THREE)
        await shown.until(lambda: "1,234 events lost" in shown.above, "the loss")

    play(body)


def test_text_is_no_markup() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.give(row(1, "[red]x[/red]\x1b[31m"))
        await shown.until(lambda: shown.rows, "the row")
        assert shown.column("COMM") == ["[red]x[/red]\\x1b[31m"]

    play(body)


@pytest.mark.parametrize("keys", ["q", "ctrl+c"])
def test_the_user_ends_it(keys: str) -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.give(*THREE)
        await shown.until(lambda: shown.rows, "the rows")
        await shown.pilot.press(keys)
        await shown.until(lambda: not shown.app.is_running, "the end")

    run, _, stop = play(body)
    assert stop.stopped
    assert run.over


def test_it_ends_after_its_duration() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.give(*THREE)
        shown.app._stop.begin()
        await shown.until(lambda: not shown.app.is_running, "the end")

    play(body, duration=0.2)


def test_an_error_of_the_run_ends_it_and_is_raised() -> None:
    async def body(run: Given, shown: Shown) -> None:
        run.error = TcpscopeError("no memory")
        await shown.until(lambda: not shown.app.is_running, "the end")

    _, app, _ = play(body)
    assert str(app._failure) == "no memory"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("retrans", {"count": False}, "-o screen; prints rows as events come; groups repeat: --count"),
        ("queue", {"events": True}, "-o screen; prints rows as events come"),
        ("top", {}, "-o screen; needs a terminal, and standard input is not one"),
    ],
)
def test_what_it_cannot_show(
    name: str, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    tool: Tool = find(name)
    defaults = {option.name: option.unset for option in tool.options}
    with (tmp_path / "file").open("w+") as file, pytest.raises(UsageError) as error:
        monkeypatch.setattr("sys.__stdin__", file)
        live.check(tool, Request(output="screen", options=defaults | options))
    assert str(error.value).startswith(words)


@pytest.mark.root
@pytest.mark.parametrize("how", ["hangup", "SIGTERM"])
def test_it_ends_with_its_terminal(how: str) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "tcpscope", "list", "-i", "0.1", "-o", "screen"]
    tool = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    try:
        shown = b""
        while b"LOCAL" not in shown:
            shown += os.read(ours, 1 << 16)
        if how == "hangup":
            os.close(ours)
            tool.send_signal(signal.SIGHUP)  # which the kernel sends if it is the controlling terminal
        else:
            tool.terminate()
            with contextlib.suppress(OSError):  # EIO: it has closed its end
                while os.read(ours, 1 << 16):
                    pass
            os.close(ours)
        assert tool.wait(DEADLINE) is not None
    finally:
        tool.kill()
        tool.wait()
