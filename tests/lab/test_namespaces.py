"""Namespaces end with their owner, and sweeping never takes a living one's."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tcpscope.errors import NotPermittedError
from tcpscope.lab.namespaces import NAMES, Namespace, start_time, sweep

LIVES = """
import sys
from tcpscope.lab.namespaces import Namespace
namespace = Namespace("test")
print(namespace.name, flush=True)
sys.stdin.read()
"""


def references(inode: int) -> list[str]:
    """Whoever keeps the namespace: threads in it, and mounts of it."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with suppress(OSError):  # it has ended meanwhile
            for thread in (process / "task").iterdir():
                link = thread / "ns/net"
                with suppress(OSError):
                    if link.stat().st_ino == inode:
                        found.append(str(link))
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return found + [line for line in mounts if f"net:[{inode}]" in line]


@pytest.mark.root
def test_worker_lives_in_the_namespace() -> None:
    namespace = Namespace("test")
    try:
        ours = Path("/proc/thread-self/ns/net").stat().st_ino
        assert namespace.run(lambda: Path("/proc/thread-self/ns/net").stat().st_ino) == namespace.inode
        assert namespace.path.stat().st_ino == namespace.inode != ours
        with namespace.run(socket.socket) as made:  # made there, used here
            assert made.connect_ex(("127.0.0.1", 9)) != 0  # its loopback device is down: not ours
        with pytest.raises(ZeroDivisionError):
            namespace.run(lambda: 1 // 0)
        assert namespace.run(namespace.run, int, "7") == 7  # from inside of the worker
    finally:
        namespace.close()
    assert not namespace.path.exists()
    assert references(namespace.inode) == []


@pytest.mark.root
def test_two_namespaces_of_one_name_cannot_be() -> None:
    first = Namespace("twin")
    try:
        with pytest.raises(Exception, match="File exists"):
            Namespace("twin")
        assert first.path.stat().st_ino == first.inode
    finally:
        first.close()


@pytest.mark.root
def test_killed_owner_is_swept_and_a_living_one_is_not() -> None:
    def start() -> tuple[subprocess.Popen[str], str]:
        owner = subprocess.Popen(
            [sys.executable, "-c", LIVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert owner.stdout is not None
        return owner, owner.stdout.readline().strip()

    (killed, dead), (living, alive) = start(), start()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        inode = (NAMES / dead).stat().st_ino
        assert references(inode) != []  # the name keeps it
        assert dead in sweep()
        assert not (NAMES / dead).exists()
        assert references(inode) == []
        assert (NAMES / alive).stat().st_ino != 0
        assert references((NAMES / alive).stat().st_ino) != []
    finally:
        for owner in (killed, living):
            owner.kill()
            owner.communicate()
        sweep()
    assert not (NAMES / alive).exists()


@pytest.mark.root
def test_sweep_looks_at_start_time_and_lock() -> None:
    NAMES.mkdir(exist_ok=True)
    pid, start = os.getpid(), start_time(os.getpid())
    assert start is not None
    reused = NAMES / f"tcpscope-{pid}-{start + 1}-1-test"  # another process had our number
    elsewhere = NAMES / f"tcpscope-{pid}-{start + 2}-1-test"  # its owner lives where we cannot see it
    ours = NAMES / f"tcpscope-{pid}-{start}-99-test"
    foreign = NAMES / f"tcpscope-something-else-{pid}"
    files = (reused, elsewhere, ours, foreign)
    try:
        for file in files:
            file.touch()
        with elsewhere.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            assert set(sweep()) & {file.name for file in files} == {reused.name}
        assert elsewhere.name in sweep()
        assert ours.exists()
        assert foreign.exists()
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def test_start_time_of_a_process() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        started = start_time(child.pid)
        mine = start_time(os.getpid())
        assert started is not None and mine is not None
        assert started >= mine
    finally:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(child.pid) is None  # a zombie owns nothing
        child.wait()
    assert start_time(child.pid) is None


def test_without_privilege_the_error_names_it() -> None:
    code = """
from tcpscope.lab.namespaces import Namespace
try:
    Namespace("test")
except Exception as error:
    print(type(error).__name__, error.exit_status, *error.capabilities)
"""
    bare = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
    done = subprocess.run([*bare, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [NotPermittedError.__name__, "4", "CAP_SYS_ADMIN"]
