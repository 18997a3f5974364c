"""The kernel's counters of each network namespace: whose they are when processes come and go."""

from __future__ import annotations

import os
import resource
import subprocess
import time
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


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_namespace_that_begins_later_is_read_by_a_process_with_a_socket_there() -> None:
    before = files()
    read = Counters(Request(filter=Filter()))
    opened, moving = files(), Moving()
    try:
        pid = moving.process.pid
        opened += 2  # those of the process
        assert moving.first not in read.namespaces
        read.meet([(moving.first + 1, pid, comm(pid))])  # it is in another one
        assert files() == opened
        read.meet([(moving.first, pid, comm(pid))])
        read.meet([(moving.first, pid, comm(pid))])
        read._read()
        assert files() == opened + 2
        assert read.now(moving.first, "IpDefaultTTL") == TTL
        assert read.grown(moving.first, "IpDefaultTTL") == TTL  # it was zero before, as counters are
        assert list(read.blind_spots()) == []
    finally:
        moving.end()
    read._read()
    assert read.grown(moving.first, "IpDefaultTTL") is None
    read.run.close()
    assert files() == before


@pytest.mark.parametrize("how", ["read before", "forgotten"])
def test_a_namespace_that_is_met_again_or_late_did_not_begin_at_zero(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    read, moving = Counters(Request(filter=Filter())), Moving()
    try:
        pid = moving.process.pid
        if how == "forgotten":
            read.forget(time.monotonic())
        else:
            read.meet([(moving.first, pid, comm(pid))])
            read._read()
            with monkeypatch.context() as patched:  # the process that was asked has ended, and others have not
                patched.setattr(counters._Open, "read", lambda files: {})
                read._read()
            assert read.now(moving.first, "IpDefaultTTL") is None
            read._met.clear()
        read.meet([(moving.first, pid, comm(pid))])
        read._read()
        assert read.now(moving.first, "IpDefaultTTL") == TTL
        assert read.grown(moving.first, "IpDefaultTTL") is None
    finally:
        moving.end()
        read.run.close()


@pytest.mark.parametrize("how", ["a process", "a mount", "hidden"])
def test_of_a_namespace_that_may_be_older_it_is_not_known_what_was_before(
    moving: Moving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    own, pid = Filter(), moving.process.pid
    seen = netns.visible()
    if how != "a process":
        others = {inode: each for inode, each in seen.namespaces.items() if inode != moving.first}
        seen = netns.Visible(others, hidden_processes=0)
    hidden = [Path("/proc", str(pid))] if how == "hidden" else []
    if how == "a mount":
        mounts = tmp_path / "mountinfo"
        mounts.write_text(f"22 42 0:4 net:[{moving.first}] /run/docker/netns/1 rw shared:4 - nsfs nsfs rw\n")
        monkeypatch.setattr(counters, "_MOUNTINFO", mounts)
    with monkeypatch.context() as patched:
        patched.setattr(netns, "visible", lambda: seen)
        patched.setattr(netns, "processes", dict)
        patched.setattr(netns, "hidden", lambda: hidden)
        read = Counters(Request(filter=own))
    read.meet([(moving.first, pid, comm(pid))])
    read._read()
    assert read.now(moving.first, "IpDefaultTTL") == TTL
    assert read.grown(moving.first, "IpDefaultTTL") is None
    assert [str(moving.first) in note for note in read.blind_spots()] == [True]
    read.forget(time.monotonic())  # what the rules look at begins after the first reading
    read._read()
    assert read.grown(moving.first, "IpDefaultTTL") == 0
    assert list(read.blind_spots()) == []
    read.run.close()


def test_a_process_that_may_not_be_seen_is_not_asked_of_a_namespace_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a socket there, and has left it."""
    own = netns.inode_of("/proc/self/ns/net")
    read = Counters(Request(filter=Filter()))
    monkeypatch.setattr(counters, "is_in", lambda pid, inode, comm: True)
    read.meet([(own + 1, os.getpid(), "python3")])
    read._read()
    assert own + 1 not in read.namespaces
    read.run.close()


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
