"""bpf/owner.bpf.h: whose a socket is. In PID namespaces, where a test can also choose the PIDs of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

PORT = 8000


class Inside:
    """A puppet that is process 1 of a PID namespace."""

    def __init__(self, lab: Lab) -> None:
        self.puppet = Puppet(
            lab.server, "inside", prefix=["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        )
        assert self.puppet.ask("os.getpid()") == 1
        children = Path(f"/proc/{self.puppet.pid}/task/{self.puppet.pid}/children").read_text()
        self.pid = int(children)
        self.enter = ("nsenter", "--target", str(self.pid), "--pid", "--mount")


# A process makes a listener and a connection. Its child gets a lower PID, as after an overflow of the numbers.
FAMILY = """
import signal
def forked(comm, last_pid, act):
    open("/proc/sys/kernel/ns_last_pid", "w").write(str(last_pid))
    if pid := os.fork():
        return pid
    open("/proc/self/comm", "w").write(comm)
    act()
    os.write(write, b"x")
    signal.pause()
def parent():
    global listener, end
    listener = socket.create_server((address, PORT))
    end = socket.create_connection(listener.getsockname())
    forked("child", 500, lambda: None)
read, write = os.pipe()
pid = forked("parent", 1000, parent)
assert os.read(read, 1) + os.read(read, 1) == b"xx"
"""


@pytest.fixture
def inside(lab: Lab) -> Iterator[Inside]:
    inside = Inside(lab)
    yield inside
    inside.puppet.kill()


@pytest.mark.every_kernel
def test_a_pid_is_that_of_the_callers_namespace(lab: Lab, run_tool: type[RunningTool], inside: Inside) -> None:
    """Of new sockets and of older ones. Rows have the PIDs of the first namespace."""
    inside.puppet.do("listener = socket.create_server((address, PORT))", address=lab.server.ipv4, PORT=PORT)
    outside = Puppet(lab.server, "outside")
    outside.do("other = socket.create_server((address, PORT))", address=lab.server.ipv4, PORT=PORT + 1)
    netns = ("--netns", str(lab.server.inode))
    with run_tool("connect", "--pid", "1", "-n", "2", *netns, prefix=inside.enter) as tool:
        for puppet in (outside, inside.puppet):
            for port in (PORT, PORT + 1):
                puppet.do("socket.create_connection((address, port))", address=lab.server.ipv4, port=port)
        tool.wait_for(lambda rows: len(rows) > 1, timeout=30)
        done = tool.wait()
    assert [(row["pid"], row["comm"], row["rport"]) for row in done.rows] == [
        (inside.pid, "inside", port) for port in (PORT, PORT + 1)
    ]
    assert done.stderr.count("rows have the PIDs of the first PID namespace") == 1
    with run_tool("list", "--pid", "1", *netns, prefix=inside.enter, ready=False) as tool:
        done = tool.wait()
    assert [(row["pid"], row["lport"]) for row in done.rows if row["state"] == "LISTEN"] == [(inside.pid, PORT)]


def test_listeners_that_are_held_outside(lab: Lab, run_tool: type[RunningTool], inside: Inside) -> None:
    """The walk over open files does not see them. Of those that are newer than the tool its listen() tells."""
    outside = Puppet(lab.server, "outside")
    netns = ("--netns", str(lab.server.inode))
    with run_tool("queue", "-i", "0.1", *netns, prefix=inside.enter) as tool:
        outside.do("listener = socket.create_server((address, PORT))", address=lab.server.ipv4, PORT=PORT)
        for _ in range(3):  # after another walk, too
            seen = len(tool.rows)
            rows = tool.wait_for(lambda rows, seen=seen: len(rows) > seen + 3)
        inside.puppet.kill()
    assert {(row["lport"], row["pid"], row["comm"]) for row in rows} == {(PORT, outside.pid, "outside")}
    assert "rows have the PIDs of the first PID namespace" in tool.stderr


def test_of_a_tool_that_uses_the_common_table(lab: Lab, run_tool: type[RunningTool], inside: Inside) -> None:
    puppets = Puppet(lab.server, "outside"), inside.puppet
    with run_tool("top", "--pid", "1", "-i", "0.1", "--netns", str(lab.server.inode), prefix=inside.enter) as tool:
        for puppet in puppets:
            puppet.do("listener = socket.create_server((address, 0))", address=lab.server.ipv4)
            puppet.do("socket.create_connection(listener.getsockname()).sendall(bytes(100))")
        rows = tool.wait_for(lambda rows: rows, timeout=30)
        inside.puppet.kill()
    assert {(row["pid"], row["comm"]) for row in rows} == {(inside.pid, "inside")}


@pytest.mark.every_kernel
def test_of_several_holders_the_one_that_started_first(lab: Lab, run_tool: type[RunningTool], inside: Inside) -> None:
    """A socket that is older than the tool: who opened it is not known, but a parent starts before its children."""
    inside.puppet.do(FAMILY, address=lab.server.ipv4, PORT=PORT)
    netns = ("--netns", str(lab.server.inode))
    with run_tool("list", *netns, prefix=inside.enter, ready=False) as tool:
        rows = tool.wait().rows
        listed = {row["comm"] for row in rows if row["comm"]}
        holders = [[holder["comm"] for holder in row["holders"]] for row in rows if row["comm"]]
    with run_tool("life", "--live", *netns, prefix=inside.enter) as tool:
        (row,) = tool.wait_for(lambda rows: [row for row in rows if row["role"] == "ACTIVE"])
        inside.puppet.kill()
    assert holders == [["parent", "child"]] * 2
    assert (listed, row["comm"]) == ({"parent"}, "parent")
