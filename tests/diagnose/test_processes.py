"""What /proc says of a process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tcpscope.diagnose import processes
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules import accept_stalled
from tcpscope.diagnose.wording import is_in
from tcpscope.filters import cgroup_mount
from tcpscope.kernel import netns
from tcpscope.schema import comm_text
from tests.conftest import until
from tests.test_sampling import LISTENER


def test_this_process() -> None:
    own = processes.read(os.getpid())
    assert (own.pid, own.comm) == (os.getpid(), Path("/proc/self/comm").read_text().strip())
    assert own.state == "R"
    assert own.does is None
    assert own.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_its_threads() -> None:
    go = threading.Event()
    other = threading.Thread(target=go.wait)
    other.start()
    try:
        found = processes.threads(os.getpid())
        assert found.total() == threading.active_count() >= 2
        until(lambda: {state for state, _ in processes.threads(os.getpid())} == {"R", "S"}, "the thread that waits")
    finally:
        go.set()
        other.join()
    assert not processes.threads(0x7FFFFFFF)


def test_its_children() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        try:
            until(lambda: (child.pid, "sleep") in _children(), "the name")
        finally:
            child.kill()
    assert child.pid not in {pid for pid, _ in _children()}
    assert processes.children(0x7FFFFFFF) is None


def _children() -> list[tuple[int, str]]:
    return [(each.pid, each.comm) for each in processes.children(os.getpid()) or []]


@pytest.mark.parametrize("name", [b"caf\xc3\xa9-serveur-\xc3", b"a\\b ) (c"])
def test_a_name_of_any_bytes(name: bytes) -> None:
    """The kernel cuts a name after 15 bytes, in the middle of a character too. Programs of BPF see the same bytes."""
    code = "import sys; open('/proc/self/comm', 'wb').write(bytes.fromhex(sys.argv[1])); print(flush=True); input()"
    command = [sys.executable, "-c", code, name.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout
            child.stdout.readline()
            seen = comm_text(name.ljust(16, b"\0"))
            own = processes.read(child.pid, seen)
            assert (own.comm, own.state in ("R", "S")) == (seen, True)
            assert (child.pid, seen) in _children()
            assert is_in(child.pid, netns.own(), seen)
        finally:
            child.kill()


def test_a_stopped_one() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        try:
            child.send_signal(signal.SIGSTOP)
            until(lambda: processes.read(child.pid).is_stopped, "the stop")
            assert processes.read(child.pid).does == "is in state T (stopped)"
        finally:
            child.kill()


@pytest.mark.root
def test_one_in_a_frozen_cgroup() -> None:
    cgroup = cgroup_mount() / f"tests.frozen.{os.getpid()}"
    cgroup.mkdir()
    try:
        with subprocess.Popen(["sleep", "600"]) as child:
            try:
                (cgroup / "cgroup.procs").write_text(str(child.pid))
                assert processes.read(child.pid).does is None
                (cgroup / "cgroup.freeze").write_text("1")
                until(lambda: processes.read(child.pid).frozen, "the freezer")
                assert processes.read(child.pid).does == "is in a frozen cgroup"
            finally:
                (cgroup / "cgroup.freeze").write_text("0")
                child.kill()
    finally:
        until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), "the end of the process")
        cgroup.rmdir()


def test_one_that_is_gone_has_the_name_that_is_given() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    assert processes.read(child.pid, "nginx").name == f"nginx (PID {child.pid})"


def test_another_one_under_the_number_is_not_described() -> None:
    found = processes.read(os.getpid(), "someone-else")
    assert (found.comm, found.state) == ("someone-else", None)


def test_an_inner_pid_namespace_has_others_under_these_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.pidns, "inner", lambda: 4026532999)
    assert processes.read(os.getpid()) == processes.Process(os.getpid(), "?")
    own = Path("/proc/self/comm").read_text().strip()
    assert processes.read(os.getpid(), own) == processes.Process(os.getpid(), own)
    assert processes.files(os.getpid()) is None


def test_nobody_has_no_limit_of_open_files() -> None:
    unlimited = resource.RLIM_INFINITY
    with pytest.raises((ValueError, PermissionError)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (unlimited, unlimited))


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("0::/system.slice/nginx.service", "nginx (PID 7, nginx.service)"),
        ("0::/user.slice/user-0.slice/session-3.scope", "nginx (PID 7, session-3.scope)"),
        (f"0::/system.slice/docker-{'ab12' * 16}.scope", f"nginx (PID 7, container {'ab12' * 3})"),
        (f"0::/kubepods.slice/pod1/{'0f' * 32}", f"nginx (PID 7, container {'0f' * 6})"),
        ("0::/", "nginx (PID 7)"),
    ],
)
def test_the_unit_or_container(cgroup: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "stat").write_text("7 (nginx) S 1 7 7 0")
    (folder / "cgroup").write_text(f"{cgroup}\n")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes.read(7).name == name


A, B = "ab12" * 16, "0f" * 32


@pytest.mark.parametrize(
    ("cgroup", "command"),
    [
        (f"/system.slice/docker-{A}.scope", "docker unpause ab12ab12ab12"),
        (f"/docker/{A}", "docker unpause ab12ab12ab12"),
        (f"/docker/{A}/kubepods.slice/cri-containerd-{B}.scope", "docker unpause ab12ab12ab12"),
        (f"/machine.slice/libpod-{A}.scope", "cat /proc/7/cgroup"),
        (f"/machine.slice/libpod-{A}.scope/docker/{B}", "cat /proc/7/cgroup"),
        (f"/kubepods.slice/cri-containerd-{A}.scope", "cat /proc/7/cgroup"),
        ("/system.slice/nginx.service", "systemctl thaw -- nginx.service"),
        ("/a/x; reboot #.service", "systemctl thaw -- 'x; reboot #.service'"),
        ("/a/--host=there.service", "systemctl thaw -- --host=there.service"),
        ("/a", "cat /proc/7/cgroup"),
    ],
)
def test_what_lets_a_frozen_one_go_on(
    cgroup: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "stat").write_text("7 (nginx) S 1 7 7 0")
    (folder / "cgroup").write_text(f"0::{cgroup}\n")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(processes, "_is_frozen", lambda path: path == cgroup)
    history = History(LISTENER, LISTENER)
    (remedy,) = accept_stalled._remedies(history, [processes.read(7)], [], 1)
    assert remedy.command == command
