"""The kernel's counters of each network namespace: whose they are when processes come and go."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpscope.diagnose import counters
from tcpscope.diagnose.counters import Counters
from tcpscope.filters import Filter
from tcpscope.kernel import netns
from tcpscope.request import Request
from tests.conftest import until

TTL = 77
"""net.ipv4.ip_default_ttl of the namespace, which /proc/net/snmp shows."""

MOVES = f"echo {TTL} > /proc/sys/net/ipv4/ip_default_ttl; echo; read x; exec unshare -n sleep 600"
"""It sets this in its namespace, waits for a line, and then leaves the namespace."""

pytestmark = pytest.mark.root


class Moving:
    """A process in a network namespace of its own."""

    def __init__(self) -> None:
        command = ["unshare", "-n", "sh", "-c", MOVES]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.first = self.inode

    @property
    def inode(self) -> int:
        return netns.inode_of(f"/proc/{self.process.pid}/ns/net")

    def move(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        until(lambda: self.inode != self.first, "its new namespace")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def moving() -> Iterator[Moving]:
    made = Moving()
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.end()


def files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_process_that_leaves_the_namespace_is_not_followed(moving: Moving) -> None:
    before = files()
    read = Counters(Request(filter=Filter(netns=(moving.first,))))
    assert read.namespaces == (moving.first,)
    assert files() == before + 2
    moving.move()
    read._read()
    assert read.now(moving.first, "IpDefaultTTL") == TTL
    assert read.grown(moving.first, "TcpOutSegs") == 0
    read.run.close()
    assert files() == before


def test_when_its_processes_are_gone_a_namespace_is_let_go(moving: Moving) -> None:
    before = files()
    read = Counters(Request(filter=Filter(netns=(moving.first,))))
    moving.end()
    read._read()
    assert read.now(moving.first, "IpDefaultTTL") is None
    assert read.grown(moving.first, "TcpOutSegs") is None
    assert read.namespaces == ()
    assert files() == before - 2  # those of the process, too
    read.run.close()


def test_they_take_a_quarter_of_the_files_that_may_be_opened(moving: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, number in ((7, 0), (8, 1), (16, 2), (resource.RLIM_INFINITY, 2)):
        monkeypatch.setattr(counters.resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        read = Counters(Request(filter=Filter(netns=(netns.inode_of("/proc/self/ns/net"), moving.first))))
        assert len(read.namespaces) == number
        read.run.close()


def test_of_a_watch_that_goes_on_the_last_minute_or_two_count(monkeypatch: pytest.MonkeyPatch) -> None:
    own = netns.inode_of("/proc/self/ns/net")
    read = Counters(Request(filter=Filter(netns=(own,))))
    now_s, value = 1000.0, 0
    monkeypatch.setattr(counters.time, "monotonic", lambda: now_s)
    read._first, read._middle = {own: {"TcpInSegs": 0}}, {own: (now_s, {"TcpInSegs": 0})}
    grown = []
    for _ in range(180):
        now_s, value = now_s + 1, value + 1
        read._last[own] = {"TcpInSegs": value}
        read.forget(now_s - 60)
        grown.append(read.grown(own, "TcpInSegs"))
    assert grown[:60] == list(range(1, 61))
    assert all(number is not None and 60 <= number <= 122 for number in grown[60:])
    read.run.close()
