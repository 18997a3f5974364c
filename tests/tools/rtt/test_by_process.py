"""`rtt` of one process alone: one that is there before the tool."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool, until
from tests.tools.rtt.site import route

pytestmark = pytest.mark.kernel

EXCHANGES = 4
KINDS = {"4": socket.AF_INET, "6": socket.AF_INET6}


def listen(lab: Lab, family: str) -> socket.socket:
    listener = lab.server.socket(KINDS[family])
    listener.bind((lab.server.address(KINDS[family]), 0))
    listener.listen()
    return listener


def connection(lab: Lab, listener: socket.socket) -> tuple[int, int]:
    """It is over when its ports are returned, the server's first."""
    near = lab.client.socket(listener.family)
    near.connect(listener.getsockname()[:2])
    far, _ = listener.accept()
    ports = far.getsockname()[1], near.getsockname()[1]
    for _ in range(EXCHANGES):
        near.sendall(b"request")
        assert far.recv(100) == b"request"
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
    near.close()
    assert far.recv(1) == b""
    far.close()
    until(lambda: not any(found.rport == ports[1] for found in lab.server.sockets()), "its end")
    return ports


def test_whose_samples(lab: Lab) -> None:
    for host in lab.hosts:
        host.sysctl("tcp_early_retrans", 0)
        for family in KINDS:
            host.run(subprocess.run, route(host.ipv4, family), check=True)
    listeners = {family: listen(lab, family) for family in KINDS}
    here, netns = f"-p {os.getpid()}", ("--netns", str(lab.server.inode))
    wanted = {here: ["4", "6"], "-p 1": [], f"--laddr 192.0.2.0/24 {here}": ["4"]}
    with ExitStack() as stack:
        tools = [
            stack.enter_context(RunningTool("rtt", "--by", "connection", *words.split(), *netns, ready=False))
            for words in wanted
        ]
        for tool in tools:
            tool.wait_until_ready()
        ports = {family: connection(lab, listener) for family, listener in listeners.items()}
        done = [tool.stop() for tool in tools]
    assert [host.counters()["TcpRetransSegs"] for host in lab.hosts] == [0, 0]
    samples = 1 + EXCHANGES + 1
    for (words, families), run in zip(wanted.items(), done, strict=True):
        assert run.status == 0, run.stderr
        found = {(row["lport"], row["rport"]): row["count"] for row in run.rows if row["total"]}
        assert found == {ports[family]: samples for family in families}, words
        stats = run.stats
        assert stats is not None
        assert (stats["shown"], stats["lost"]) == (samples * len(families), 0)
        assert stats["seen"] == stats["shown"] + stats["filtered"]
        # Other traffic of the machine is filtered, too.
        assert stats["filtered"] >= samples * (len(KINDS) - len(families))
