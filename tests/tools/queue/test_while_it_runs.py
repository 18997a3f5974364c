"""`queue` with what a recording cannot have: filters by numbers that are known only then, and a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import DEADLINE, RunningTool, until
from tests.lacks import refusals_cannot_be_seen
from tests.puppets import Puppet
from tests.tools.queue.refusals import BACKLOG

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a RST


def listening(lab: Lab, port: int) -> socket.socket:
    made = lab.server.socket(socket.AF_INET)
    made.bind((lab.server.ipv4, port))
    made.listen(BACKLOG)
    return made


def client_of(lab: Lab) -> socket.socket:
    made = lab.client.socket(socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return made


def fill(lab: Lab, port: int) -> None:
    """One more than the limit, and all of them wait for accept()."""
    for _ in range(BACKLOG + 1):
        client_of(lab).connect((lab.server.ipv4, port))
    queue = ("LISTEN", port, BACKLOG + 1)
    until(lambda: queue in [(s.state, s.lport, s.recv_q) for s in lab.server.sockets()], "a full accept queue")


@pytest.mark.kernel
def test_filters(lab: Lab, run_tool: type[RunningTool]) -> None:
    if refusals_cannot_be_seen():
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")
    listening(lab, 8000), listening(lab, 8001)
    fill(lab, 8000), fill(lab, 8001)
    wanted, other = client_of(lab), client_of(lab)
    wanted.bind(("0.0.0.0", 0))
    rport = wanted.getsockname()[1]
    filters = (("-R", str(rport)), ("-p", str(os.getpid())), ("-p", "1"))
    with ExitStack() as stack:
        tools = [
            stack.enter_context(run_tool("queue", "--events", "--netns", str(lab.server.inode), *words, ready=False))
            for words in filters
        ]
        for tool in tools:  # they start together
            tool.wait_until_ready()
        before = lab.server.counters()["TcpExtListenOverflows"]
        for made, port in ((wanted, 8000), (other, 8001)):
            made.setblocking(False)
            made.connect_ex((lab.server.ipv4, port))
        by_rport, by_pid, nothing = tools
        by_rport.wait_for(bool)
        by_pid.wait_for(lambda rows: {row["lport"] for row in rows} == {8000, 8001})
        wanted.close(), other.close()
        lab.flush()
        refused = lab.server.counters()["TcpExtListenOverflows"] - before
        for tool in tools:
            done = tool.stop()
            assert done.stats is not None
            assert done.stats["seen"] == done.stats["shown"] + done.stats["filtered"] >= refused >= 2
            assert done.stats["shown"] == len(done.rows)
    assert {row["rport"] for row in by_rport.done.rows} == {rport}
    assert len(by_pid.done.rows) == refused
    assert nothing.done.rows == []


@pytest.mark.kernel
def test_any_holder_will_do_and_all_are_shown(lab: Lab, run_tool: type[RunningTool]) -> None:
    parent = Puppet(lab.server, "parent")
    parent.do(
        "s = socket.create_server(('0.0.0.0', 8000)); child = os.fork()\nif not child: import signal; signal.pause()"
    )
    child = parent.ask("child")
    try:
        with run_tool("queue", "-d", "0.1", "-p", str(child)) as tool:
            (found,) = tool.wait().rows
    finally:
        os.kill(child, signal.SIGKILL)
    assert found["lport"] == 8000
    assert {held["pid"] for held in found["holders"]} == {parent.pid, child}


@pytest.mark.kernel
def test_refresh_on_a_terminal(lab: Lab) -> None:
    listening(lab, 8000)
    controller, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "tcpscope", "queue", "-i", "0.1", "--netns", str(lab.server.inode)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as tool:
        os.close(terminal)
        shown = b""

        def pages() -> list[bytes]:
            nonlocal shown
            if select.select([controller], [], [], 0.1)[0]:
                shown += os.read(controller, 1 << 16)
            return shown.split(b"\x1b[H\x1b[J")[1:]

        try:
            until(lambda: len(pages()) > 3, "the table, drawn again and again")
            page = pages()[1].decode().replace("\r", "").splitlines()
            assert page[1].split()[:2] == ["LOCAL", "PID"]
            assert any(lab.server.ipv4 in line and "8000" in line for line in page[2:])
            assert max(map(len, page)) <= 80
            fill(lab, 8000)
            until(lambda: b" 6 " in pages()[-2], "the full queue on the terminal")
            tool.send_signal(signal.SIGINT)
            assert tool.wait(DEADLINE) == 0
        finally:
            tool.kill()
            os.close(controller)
