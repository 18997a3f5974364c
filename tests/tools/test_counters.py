"""The tools' rows against the kernel's counters, and what a hundred thousand connections leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tcpscope.filters import Filter
from tcpscope.lab.hosts import Host, Lab
from tcpscope.session import Session
from tests import left_out
from tests.conftest import RunningTool, until
from tests.puppets import Puppet
from tests.tables import left
from tests.tools.mix import Mix

EVENTS = ("attempt", "accepted", "life", "step", "transition")
STEP = 20_000


@pytest.mark.kernel
def test_a_mix_of_connections(lab: Lab) -> None:
    """Four tools at the same time over the same connections: what each has seen is what the kernel has counted."""
    client, server = lab.hosts
    mix = Mix(lab)
    with (
        RunningTool("connect", "--netns", str(client.inode)) as connect,
        RunningTool("accept", "--netns", str(server.inode)) as accept,
        RunningTool("life", "--port", str(mix.port)) as life,
        RunningTool("tracer", "--port", str(mix.port)) as tracer,
    ):
        before = {host: Counter(host.counters()) for host in lab.hosts}
        saw = mix.run(2000)
        connected = saw.errnos["none"]

        def ended(host: Host, tool: RunningTool, **wanted: str) -> int:
            return sum(row["netns"] == host.inode and wanted.items() <= row.items() for row in tool.rows)

        # A connection outlives its program: the last FIN may still be on its way.
        until(lambda: [ended(host, life) for host in lab.hosts] == [connected, connected], "the end of each connection")
        tools = {tool.argv[3]: tool.stop() for tool in (connect, accept, life, tracer)}
    counted = {host: Counter(host.counters()) - before[host] for host in lab.hosts}
    for done in tools.values():
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0

    rows = tools["connect"].rows
    errnos = Counter("given up" if row["outcome"] == "ABORTED" else row["errno"] for row in rows)
    assert errnos == saw.errnos
    assert sum(row["syn_sent"] for row in rows) == counted[client]["TcpActiveOpens"] == 2000
    failed = sum(row["outcome"] in ("REFUSED", "TIMED_OUT") for row in rows)
    assert failed == counted[client]["TcpAttemptFails"] > 0

    assert len(tools["accept"].rows) == counted[server]["TcpPassiveOpens"] == saw.accepted == connected

    for host in lab.hosts:
        rows = [row for row in tools["life"].rows if row["netns"] == host.inode]
        resets = sum(row["state"] in ("ESTABLISHED", "CLOSE_WAIT") for row in rows)
        assert resets == counted[host]["TcpEstabResets"] > 0
        steps = Counter(row["step"] for row in tools["tracer"].rows if row["netns"] == host.inode)
        assert steps == {"CONNECT" if host is client else "ACCEPT": connected, "CLOSE": connected}


# What a hundred thousand connections leave behind

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
    sessions = {event: Session("connections", event, Filter()) for event in EVENTS}
    try:
        puppet.do(LOOP)
        assert left(sessions["life"], lab.client) == ["connections", "listening"]
        for begin in range(0, number, STEP):
            puppet.do("loop(begin, end)", begin=begin, end=min(begin + STEP, number))
        puppet.do("listener.close()")
        for event, session in sessions.items():
            until(lambda session=session: not left(session, lab.client), f"empty tables of '{event}'")
            assert session.account().seen >= number
            assert session.account().table_full == 0
    finally:
        for session in sessions.values():
            session.end()
            left_out.note(session.account().missed)
            session.close()


def rss_kib(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def test_the_memory_of_the_tools_does_not_grow(lab: Lab) -> None:
    """After the first connections everything has the size that it keeps."""
    puppet = Puppet(lab.client, "loop")
    puppet.do(LOOP)
    here = "--netns", str(lab.client.inode), "-o", "json"
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
