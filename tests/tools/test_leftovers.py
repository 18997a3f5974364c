"""What a hundred thousand connections leave behind: nothing in the tables, and nothing in the memory of the tools."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tcpscope.filters import Filter
from tcpscope.lab.hosts import Lab
from tcpscope.session import Session
from tests.conftest import RunningTool, until
from tests.lacks import functions_cannot_be_hooked
from tests.puppets import Puppet
from tests.tables import left

EVENTS = ("attempt", "accepted", "life", "action", "transition")
STEP = 20_000
NOT_SHOWN_AT_MOST = 5
"""Ends of sockets in tasks for which a kernel runs no program (tests/record/unseen.py)."""


# Both ends in one thread, over the loopback: TIME_WAIT is spread over many addresses, or local ports would run out.
LOOP = r"""
listener = socket.socket()
listener.bind(("0.0.0.0", 7777))
listener.listen()
reset = struct.pack("ii", 1, 0)
def loop(begin, end):
    for number in range(begin, end):
        address = f"127.0.1.{number % 60 + 1}"
        ends = [socket.create_connection((address, 7777)), listener.accept()[0]]
        if number % 4 == 0:
            ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        if number % 4 == 1:
            ends[0].send(b"never read")
        if number % 2:
            ends.reverse()
        for each in ends:
            each.close()
        if number % 10 == 0:
            with socket.socket() as refused:
                refused.connect_ex((address, 7778))
"""


@pytest.mark.parametrize("number", [pytest.param(2000, marks=pytest.mark.kernel), 100_000])
def test_nothing_is_left_in_the_tables(lab: Lab, number: int) -> None:
    """The events are not read here: that they are lost does not matter to the tables."""
    puppet = Puppet(lab.client, "loop")
    at_most = NOT_SHOWN_AT_MOST if functions_cannot_be_hooked() else 0
    sessions = {event: Session(event, event, Filter()) for event in EVENTS}
    try:
        puppet.do(LOOP)
        assert left(sessions["life"], lab.client) == 1
        for begin in range(0, number, STEP):
            puppet.do("loop(begin, end)", begin=begin, end=min(begin + STEP, number))
        puppet.do("listener.close()")
        for event, session in sessions.items():
            until(lambda session=session: left(session, lab.client) <= at_most, f"empty tables of '{event}'")
            assert session.account().seen >= number
            assert session.account().table_full == 0
    finally:
        for session in sessions.values():
            session.end()
            session.close()


def rss_kib(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def test_the_memory_of_the_tools_does_not_grow(lab: Lab) -> None:
    """After the first connections everything has the size that it keeps."""
    puppet = Puppet(lab.client, "loop")
    puppet.do(LOOP)
    here = "--netns", str(lab.client.inode), "-o", "json", "-v"
    quiet = {"stdout": subprocess.DEVNULL}
    with (
        RunningTool("connect", *here, **quiet) as connect,
        RunningTool("connlat", "--histogram", "-i", "1", *here, **quiet) as connlat,
        RunningTool("connect", "--count", *here, **quiet) as count,
        RunningTool("life", *here, **quiet) as life,
    ):
        tools = connect, connlat, count, life
        for tool in tools:
            os.kill(tool.pid, signal.SIGSTOP)
        puppet.do("loop(begin, end)", begin=0, end=STEP)  # more than they read at once, from full buffers
        for tool in tools:
            os.kill(tool.pid, signal.SIGCONT)
        sizes = []
        for begin in range(STEP, 100_000, STEP):
            puppet.do("loop(begin, end)", begin=begin, end=begin + STEP)
            sizes.append([rss_kib(tool.pid) for tool in tools])
        assert max(last - first for first, last in zip(sizes[0], sizes[-1], strict=True)) < 1024, sizes
        for tool in tools:
            seen = int(tool.stop().stderr.split("seen ")[1].split()[0])
            assert seen >= 100_000
