"""Every tool with a reader that pauses, that stops and that goes away: all rows or a counted loss, and an end."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.tool import find, names
from tests.conftest import RunningTool, until

pytestmark = pytest.mark.root

MANY = 300
ENDS_SECONDS = 60.0  # it has to be one, and other processes may have the processor; forever is what fails here
ALL = [*names(), "diagnose"]
EVENTS = ("states", "connect", "accept", "life", "connlat")
"""Tools with a row or more for each connection."""


def connect(lab: Lab, number: int) -> None:
    """So many connections from the client to the server, one after the other."""
    listener = lab.server.socket(socket.AF_INET)
    listener.bind((lab.server.ipv4, 0))
    listener.listen(8)
    for _ in range(number):
        client = lab.client.run(socket.create_connection, listener.getsockname())
        child, _ = listener.accept()
        client.close()
        child.close()
    listener.close()


def small_pipe(blocking: bool) -> tuple[int, int]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write, blocking)
    return read, write


def is_full(write: int) -> bool:
    poll = select.poll()
    poll.register(write, select.POLLOUT)
    return not poll.poll(0)


def read_while(read: int, tool: RunningTool) -> str:
    """What the tool writes, until it has ended."""
    pieces = []
    os.set_blocking(read, False)
    while True:
        ended = tool.process.poll() is not None
        while select.select([read], [], [], 0.01)[0] and (piece := os.read(read, 1 << 16)):
            pieces.append(piece)
        if ended:
            return b"".join(pieces).decode()


@contextmanager
def running(*words: str, write: int, **options: object) -> Iterator[RunningTool]:
    with RunningTool(*words, stdout=write, **options) as tool:
        yield tool


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    ("name", "format_"), [*((name, "json") for name in EVENTS), ("states", "table"), ("states", "csv")]
)
def test_a_reader_that_pauses(lab: Lab, name: str, format_: str, blocking: bool) -> None:
    """It gets all rows, and no broken line."""
    read, write = small_pipe(blocking)
    words = (name, "--netns", f"{lab.client.inode},{lab.server.inode}", "-o", format_, "--verbose")
    with running(*words, write=write, env={"PYTHONUNBUFFERED": "1"}) as tool:
        connect(lab, MANY)
        until(lambda: is_full(write), "a full pipe")
        connect(lab, 10)
        tool.process.send_signal(signal.SIGINT)
        text = read_while(read, tool)
        done = tool.wait()
    os.close(read), os.close(write)
    lines = text.splitlines()[format_ != "json" :]
    assert done.status == 0, done.stderr
    seen, shown, filtered, lost = (int(word) for word in done.stderr.split() if word.isdigit())
    assert (seen, lost) == (shown + filtered, 0), done.stderr
    assert len(lines) == shown > MANY
    if format_ == "json":
        assert all(isinstance(json.loads(line), dict) for line in lines)
    else:
        assert len({len(line.split()) if format_ == "table" else line.count(",") for line in lines}) <= 2


@pytest.mark.parametrize(
    ("name", "how", "blocking"),
    [
        *((name, "SIGTERM", True) for name in EVENTS),
        *(("states", how, blocking) for how in ("SIGINT", "duration") for blocking in (True, False)),
    ],
)
def test_a_reader_that_stops(lab: Lab, name: str, blocking: bool, how: str) -> None:
    """The tool ends, and counts what was not written."""
    read, write = small_pipe(blocking)
    filters = ("--netns", f"{lab.client.inode},{lab.server.inode}")
    duration = ("-d", "2") if how == "duration" else ()
    with running(name, *filters, *duration, "-o", "json", "--strict", write=write) as tool:
        connect(lab, MANY)
        until(lambda: is_full(write), "a full pipe")
        began = time.monotonic()
        if not duration:
            tool.process.send_signal(signal.Signals[how])
        done = tool.wait(ENDS_SECONDS)
        assert time.monotonic() - began < ENDS_SECONDS
    os.set_blocking(read, False)
    text = os.read(read, 1 << 20).decode()
    os.close(read), os.close(write)
    seen, shown, filtered, lost = (
        int(word) for word in done.stderr.split("tcpscope: seen")[1].splitlines()[0].split() if word.isdigit()
    )
    assert seen == shown + filtered + lost
    assert lost and text.endswith("\n") and text.count("\n") == shown
    assert "the reader of standard output stopped reading" in done.stderr
    assert done.status == 5


@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, signal.SIGTERM) for name in ALL), *(("states", number) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_nobody_reads_anything(name: str, number: int) -> None:
    """Standard output and standard error are one full pipe. The tool ends at a signal nevertheless."""
    read, write = small_pipe(blocking=True)
    os.set_blocking(write, False)
    os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    with running(name, "-o", "json", write=write, stderr=write, ready=False) as tool:
        until(lambda: is_caught(tool.pid, signal.SIGHUP), "a run")  # only runs catch it
        tool.process.send_signal(number)
        status = tool.process.wait(ENDS_SECONDS)
    os.close(read), os.close(write)
    assert status == 0


def is_caught(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal, or has ended."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return lines["State"][0] == "Z" or bool(int(lines["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("name", [name for name in ALL if name == "diagnose" or not find(name).once])
def test_a_reader_that_has_gone(name: str) -> None:
    """It is noticed without a row."""
    read, write = os.pipe()
    with running(name, "--lport", "1", "-o", "json", write=write) as tool:
        os.close(write)
        os.close(read)
        done = tool.wait(ENDS_SECONDS)
    assert done.status == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", [["features"], ["features", "--json"], ["lab", "list"], ["--help"], ["list", "--help"]], ids=" ".join
)
@pytest.mark.parametrize("closed", ["stdout", "stderr", "reader"])
def test_commands_that_only_print(words: list[str], closed: str) -> None:
    """A closed standard stream, or a reader that is gone, is no traceback."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-P", "-m", "tcpscope", *words]
    if closed == "reader":
        done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE)
    else:
        number = {"stdout": 1, "stderr": 2}[closed]
        done = subprocess.run(["sh", "-c", f'exec "$@" {number}>&-', "sh", *argv], capture_output=True)
    os.close(write)
    assert done.returncode == (1 if closed == "stdout" else 0)
    assert b"Traceback" not in (done.stdout or b"") + done.stderr
    assert closed != "stderr" or done.stdout
