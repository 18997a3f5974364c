"""Nothing that is written is lost in silence, whatever the reader and the descriptor do."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from tcpscope import writing
from tcpscope.output import Column, formats, open_sink, screen
from tcpscope.stop import Stop
from tcpscope.writing import Output, complaint

LINE = b"%07d\n"
MANY = b"".join(LINE % number for number in range(100_000))  # more than any pipe or socket buffer


@pytest.fixture(params=["pipe", "socket", "pty"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Where to read, and where to write."""
    if request.param == "pipe":
        read, write = os.pipe()
    elif request.param == "socket":
        read, write = (end.detach() for end in socket.socketpair())
    else:
        read, write = os.openpty()
        tty.setraw(write)
    yield read, write
    for end in (read, write):
        os.close(end)


@pytest.fixture(autouse=True)
def no_run() -> Iterator[None]:
    """The run of a test is that test's."""
    yield
    Output.stop = None


@pytest.fixture
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        Output.stop = stop
        yield stop


@contextmanager
def when_full(write: int, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` as soon as `write` takes no more."""
    full, left = select.poll(), threading.Event()
    full.register(write, select.POLLOUT)

    def wait() -> None:
        while full.poll(0) and not left.wait(0.001):
            pass
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def read_all(descriptor: int) -> bytes:
    """What is there now."""
    os.set_blocking(descriptor, False)
    pieces = []
    while select.select([descriptor], [], [], 0)[0] and (piece := os.read(descriptor, 1 << 20)):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_pauses_gets_everything(ends: tuple[int, int], stop: Stop, blocking: bool) -> None:
    read, write = ends
    os.set_blocking(write, blocking)
    output, taken = Output(write), []
    writer = threading.Thread(target=lambda: taken.append(output.write(MANY)))
    writer.start()
    got = b""
    while len(got) < len(MANY):  # it waits until the buffer is full, and takes a little only
        full = select.poll()
        full.register(write, select.POLLOUT)
        while full.poll(0) and len(got) + 65536 < len(MANY) and writer.is_alive():
            writer.join(0.0001)
        got += os.read(read, 30_000)
    writer.join()
    assert (got, taken, output.lost, complaint(output)) == (MANY, [len(MANY)], 0, "")


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("end", ["signal", "duration"])
def test_a_reader_that_stops_does_not_hold_us(ends: tuple[int, int], blocking: bool, end: str) -> None:
    read, write = ends
    os.set_blocking(write, blocking)
    with Stop(0.1 if end == "duration" else None) as stop:
        Output.stop = stop
        stop.begin()
        if end == "signal":
            when = when_full(write, lambda: os.kill(os.getpid(), signal.SIGTERM))
        else:
            when = nullcontext()
        output = Output(write)
        with when:
            taken = output.write(MANY)
        began = time.monotonic()
        assert output.write(MANY) == 0
        assert time.monotonic() - began < writing.PATIENCE_SECONDS  # it does not wait again
    assert taken and taken + output.lost == 2 * len(MANY)
    assert read_all(read) == MANY[:taken]
    assert f"{output.lost} bytes were not written" in complaint(output)


def test_a_terminal_that_says_it_is_writable_and_takes_nothing(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while another process writes to it."""
    read, write = os.openpty()
    stop.stop()
    with Output(write) as output, monkeypatch.context() as patch:
        refusing = Mock(side_effect=BlockingIOError)
        patch.setattr(os, "write", refusing)
        assert output.write(LINE) == 0
        assert 1 < refusing.call_count < 1000  # it tries again, but not all the time
    assert output.lost == len(LINE)
    os.close(read), os.close(write)


def open_ones() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


def test_only_what_was_opened_is_closed() -> None:
    """A master is no terminal to open again: that would make a new one."""
    read, write = os.openpty()
    before = open_ones()
    for end, more in ((write, 1), (read, 0)):
        output = Output(end)
        assert len(open_ones()) == len(before) + more
        assert os.get_blocking(end)
        output.close()
        output.close()
        assert open_ones() == before
    os.close(read), os.close(write)


def test_a_terminal_that_cannot_be_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of another user, after su."""
    read, write = os.openpty()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", Mock(side_effect=PermissionError))
        output = Output(write)
    assert output.write(b"a line") == 6
    assert os.read(read, 100) == b"a line"
    os.close(read), os.close(write)


def test_a_pipe_holds_whole_lines(stop: Stop) -> None:
    read, write = os.pipe()
    stop.stop()
    output = Output(write)
    taken = output.write(b"x" * 10 + b"\n" + MANY)
    assert MANY and (b"x" * 10 + b"\n" + MANY)[:taken].endswith(b"\n")
    assert not output.cut and "incomplete" not in complaint(output)
    os.close(read), os.close(write)


def test_a_line_that_is_cut_is_told(stop: Stop) -> None:
    read, write = os.pipe()
    stop.stop()
    output = Output(write)
    output.write(b"x" * 1_000_000)
    assert "the last line is incomplete" in complaint(output)
    os.close(read), os.close(write)


def test_a_reader_that_has_gone(ends: tuple[int, int], stop: Stop) -> None:
    read, write = ends
    output = Output(write)
    nothing = os.open(os.devnull, os.O_RDONLY)
    error = OSError if os.isatty(write) else BrokenPipeError  # a terminal says EIO
    with when_full(write, lambda: os.dup2(nothing, read)), pytest.raises(error):
        output.write(MANY)
    os.close(nothing)
    assert not complaint(output)


def test_a_signal_that_raises_ends_all_writing() -> None:
    """As SIGINT does while no run has begun. Python flushes at its exit, and must not wait then."""
    read, write = os.pipe()
    output = Output(write)
    interrupt = when_full(write, lambda: os.kill(os.getpid(), signal.SIGINT))
    with interrupt, pytest.raises(KeyboardInterrupt):
        output.write(MANY)
    assert output.write(b"more\n") == 0
    assert read_all(read).endswith(b"\n")
    os.close(read), os.close(write)


@pytest.mark.parametrize("format_", [*formats(), "screen"])
def test_every_format_tells_how_many_rows_are_missing(stop: Stop, format_: str) -> None:
    read, write = os.pipe()
    columns = [Column("number", width=7), Column("stack", "stack")]
    rows = [SimpleNamespace(number=number, stack=["below", "é"]) for number in range(10_000, 20_000)]
    if format_ == "json":
        import msgspec

        row = msgspec.defstruct("Row", [("number", int), ("stack", list[str])])
        rows = [row(each.number, each.stack) for each in rows]
    stream: Any = Output(write)
    sink = screen.Sink(columns, stream, True) if format_ == "screen" else open_sink(format_, columns, stream)
    stop.stop()
    missing = sink.rows(rows)
    assert 0 < missing < len(rows)
    text = read_all(read).decode()
    first = rows[len(rows) - missing].number  # that is missing, if not its beginning is there
    assert str(first - 1) in text and str(first + 1) not in text
    assert sink.rows(rows) == len(rows)
    os.close(read), os.close(write)


def test_a_file_gets_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "rows").open("wb") as file:
        sizes: list[int] = []
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(len(data)) or real(fd, data))
        assert Output(file.fileno()).write(MANY) == len(MANY)
    assert sizes == [len(MANY)]


def test_an_empty_pipe_is_filled_at_once(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write for each 4 KB would cost as much as the rows."""
    stop.stop()
    read, write = os.pipe()
    sizes: list[int] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(len(data)) or real(fd, data))
    capacity = fcntl.fcntl(write, fcntl.F_GETPIPE_SZ)
    assert Output(write).write(MANY) == sizes[0] == capacity - capacity % len(LINE % 0)
    os.close(read), os.close(write)
