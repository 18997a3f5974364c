"""Network namespaces, against ones made with ip(8) and unshare(1), and a made-up /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpscope import filters
from tcpscope.errors import UsageError
from tcpscope.kernel import netns


@pytest.fixture
def made() -> Iterator[str]:
    """The name of a network namespace that exists for the test."""
    name = f"tcpscope-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def inode_of_process(pid: int | str) -> int:
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def test_our_own_comes_first() -> None:
    inode, own = next(iter(netns.visible().namespaces.items()))
    assert inode == own.inode == inode_of_process("self") == netns.inode_of(own.path)


@pytest.mark.kernel
def test_a_named_one(made: str) -> None:
    inode = int(
        subprocess.run(
            ["ip", "netns", "exec", made, "stat", "-Lc", "%i", "/proc/self/ns/net"],
            check=True,
            capture_output=True,
        ).stdout
    )
    assert netns.visible().namespaces[inode] == netns.Namespace(inode, f"/run/netns/{made}", made)
    assert netns.inode_of(f"/run/netns/{made}") == inode
    assert filters.parse_netns(made) == inode


@pytest.mark.kernel
def test_one_that_only_a_process_holds() -> None:
    """The process says when it is in its namespace, and stays in it until its input ends."""
    command = ["unshare", "--net", "sh", "-c", "echo here; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"here\n"
        inode = inode_of_process(process.pid)
        assert inode != inode_of_process("self")
        found = netns.visible().namespaces[inode]
        assert found == netns.Namespace(inode, f"/proc/{process.pid}/ns/net")
        assert netns.inode_of(found.path) == filters.parse_netns(f"pid:{process.pid}") == inode
        process.stdin.close()
        process.wait()
    assert inode not in netns.visible().namespaces


HOLDERS = {
    "a process": "held = None",
    "an open file": "held = os.open('/proc/thread-self/ns/net', os.O_RDONLY); home()",
    "a socket": "held = socket.socket(); home()",
    "a thread": "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(); home()",
}
HOLDS = """
import ctypes, os, socket, threading, time
ours = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
enter = ctypes.CDLL(None, use_errno=True).setns
def home():
    assert enter(ours, 0) == 0
assert ctypes.CDLL(None).unshare(0x40000000) == 0
print(os.stat("/proc/thread-self/ns/net").st_ino, flush=True)
{hold}
print("held", flush=True)
input()
"""


@pytest.mark.kernel
@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_holds_one_it_exists(holder: str) -> None:
    """And no longer than that. Who has only heard its number cannot tell one holder from another."""
    command = [sys.executable, "-c", HOLDS.format(hold=HOLDERS[holder])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        inode = int(process.stdout.readline())
        assert process.stdout.readline() == b"held\n"
        assert (inode in netns.visible().namespaces) == (holder == "a process")
        assert netns.exists(inode) is True
        assert filters.parse_netns(inode) == inode
        process.communicate(b"\n")
    if netns.visible().hidden_processes:  # who may not look at all processes cannot tell
        assert netns.exists(inode) is None
        with pytest.warns(UserWarning, match=f"network namespace {inode} is not found; not all processes can be"):
            assert filters.parse_netns(inode) == inode
        return
    assert netns.exists(inode) is False
    with pytest.raises(UsageError, match=f"no network namespace {inode}; "):
        filters.parse_netns(inode)


@pytest.mark.kernel
def test_a_mount_elsewhere_holds_one(tmp_path: Path) -> None:
    """In a mount namespace of its own, where nobody but its process sees it."""
    script = (
        f"mount -t tmpfs none {tmp_path} && touch {tmp_path}/held && unshare --net={tmp_path}/held true && "
        f"stat -Lc %i {tmp_path}/held && read line"
    )
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        inode = int(process.stdout.readline())
        assert inode not in netns.visible().namespaces
        assert netns.exists(inode) is True
        process.communicate(b"\n")


def test_without_privilege_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = netns.visible()
    monkeypatch.setattr(netns, "visible", lambda: netns.Visible(visible.namespaces, 1))
    assert netns.exists(2**32 - 1) is None
    assert netns.exists(inode_of_process("self")) is True


def test_a_number_that_no_namespace_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Namespaces have larger numbers. So it is refused even if not all processes can be read."""
    visible = netns.visible()
    assert min(visible.namespaces) > netns._FIRST_INODE
    monkeypatch.setattr(netns, "visible", lambda: netns.Visible(visible.namespaces, 1))
    assert netns.exists(123) is False


def test_what_is_gone_and_what_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for process, inode in (("self", 1), ("10", 1), ("11", 2), ("12", 2), ("13", 3), ("15", 4)):
        (tmp_path / process / "ns").mkdir(parents=True)
        (tmp_path / process / "ns/net").symlink_to(f"net:[{inode}]")
    (tmp_path / "14/ns").mkdir(parents=True)  # gone between the listing and the look
    (tmp_path / "sys").mkdir()
    readlink = Path.readlink

    def denied(path: Path) -> Path:
        if path.parts[-3] == "13":
            raise PermissionError(path)
        if path.parts[-3] == "15":
            return Path()  # 5.10 says it like this
        return readlink(path)

    monkeypatch.setattr(netns, "PROC", tmp_path)
    monkeypatch.setattr(netns, "NAMED", tmp_path / "none")
    monkeypatch.setattr(netns, "inode_of", lambda path: 1)
    monkeypatch.setattr(Path, "readlink", denied)
    seen = netns.visible()
    assert seen.hidden_processes == 2
    assert set(seen.namespaces) == {1, 2}
    assert seen.namespaces[1].path == f"{tmp_path}/self/ns/net"
    assert seen.namespaces[2].path in (f"{tmp_path}/11/ns/net", f"{tmp_path}/12/ns/net")


def test_files_in_run_netns_that_are_no_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stale").touch()
    (tmp_path / "zwei").symlink_to("/proc/self/ns/net")
    (tmp_path / "eins").symlink_to("/proc/self/ns/net")
    monkeypatch.setattr(netns, "NAMED", tmp_path)
    own = inode_of_process("self")
    assert netns.visible().namespaces[own] == netns.Namespace(own, "/proc/self/ns/net", "eins")
    assert {seen.name for seen in netns.visible().namespaces.values()} <= {"eins", None}


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/null", "/proc/self/ns/mnt", "/no/such/file"])
def test_what_opens_no_network_namespace(path: str) -> None:
    with pytest.raises(OSError):
        netns.inode_of(path)


def test_it_is_opened_by_another_process_if_the_first_one_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or has entered another namespace. What nobody holds any more is no error."""
    own = inode_of_process("self")
    assert own == netns.own()
    for stale in ("/proc/2147483647/ns/net", "/proc/self/status"):
        fd = netns.opened(netns.Namespace(own, stale))
        assert fd is not None
        try:
            assert os.fstat(fd).st_ino == own
        finally:
            os.close(fd)
    tries = []
    gone = netns.Namespace(1, "/proc/self/ns/net")
    monkeypatch.setattr(netns, "visible", lambda: tries.append(1) or netns.Visible({1: gone}, 0))
    assert netns.opened(gone) is None
    assert 1 <= len(tries) <= 5
    monkeypatch.setattr(netns, "visible", lambda: netns.Visible({}, 0))
    assert netns.opened(gone) is None
