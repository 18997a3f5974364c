"""What /proc says of a process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tcpscope.diagnose import Remedy, processes
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules import accept_stalled
from tcpscope.diagnose.wording import is_in
from tcpscope.filters import cgroup_mount
from tcpscope.kernel import netns
from tcpscope.kernel.features import has_capability
from tcpscope.schema import comm_text
from tests.conftest import until
from tests.test_sampling import LISTENER


def test_this_process() -> None:
    own = processes.read(os.getpid())
    assert (own.pid, own.comm) == (os.getpid(), Path("/proc/self/comm").read_text().strip())
    assert own.state == "R"
    assert own.does is None
    assert (own.open_files, own.open_files_hard) == resource.getrlimit(resource.RLIMIT_NOFILE)


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


def raised(soft: int, hard: int, proposed: int, number: int = 1) -> tuple[Remedy, list[tuple[int, int]], str]:
    """The remedy for processes with these limits; their limits after its command, and what the command has said."""
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(number)]
    try:
        for child in children:
            resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (soft, hard))
        remedy = processes.more_files([processes.read(child.pid) for child in children], proposed, "More files.")
        assert remedy.command
        done = subprocess.run(["sh", "-c", remedy.command], stderr=subprocess.PIPE, text=True)
        limits = [resource.prlimit(child.pid, resource.RLIMIT_NOFILE) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return remedy, limits, done.stderr


@pytest.mark.parametrize("number", [1, 2])
def test_the_proposed_limit_below_the_hard_one(number: int) -> None:
    remedy, limits, said = raised(64, 500, 128, number)
    assert (limits, said) == ([(128, 500)] * number, "")
    assert (remedy.present, remedy.proposed, remedy.risk) == (64, 128, None)


def raises_both() -> None:
    """The limits are one number, as systemd and Docker set them. Without CAP_SYS_RESOURCE the kernel says so."""
    remedy, limits, said = raised(64, 64, 128)
    assert remedy.risk == "The hard limit is 64: to raise it needs CAP_SYS_RESOURCE."
    if has_capability("CAP_SYS_RESOURCE"):
        assert (limits, said) == ([(128, 128)], "")
    else:
        assert limits == [(64, 64)]
        assert "Operation not permitted" in said
        assert "cannot exceed" not in said


def test_the_proposed_limit_above_the_hard_one() -> None:
    raises_both()


@pytest.mark.root
@pytest.mark.kernel
def test_the_proposed_limit_above_the_hard_one_as_root() -> None:
    raises_both()


def test_the_hard_limit_of_another_one_stays() -> None:
    one, other = (processes.Process(pid, "proxy", open_files=64, open_files_hard=pid) for pid in (100, 500))
    command = processes.more_files([one, other], 128, "More files.").command
    assert command == "for pid in 100 500; do prlimit --pid $pid --nofile=128:500; done"


@pytest.mark.parametrize(("most", "first"), [(127, "sysctl -w fs.nr_open=128 && "), (128, ""), (None, "")])
def test_more_than_any_process_may_have(monkeypatch: pytest.MonkeyPatch, most: int | None, first: str) -> None:
    monkeypatch.setattr(processes, "_nr_open", lambda: most)
    full = processes.Process(7, "proxy", open_files=64, open_files_hard=64)
    assert processes.more_files([full], 128, "More files.").command == f"{first}prlimit --pid 7 --nofile=128:128"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"unit": "nginx.service"}, "LimitNOFILE=128 in nginx.service."),
        ({"unit": "session-3.scope"}, "LimitNOFILE=128 in a unit, ulimit -n 128 in a shell."),
        ({"unit": "docker.service", "container": "ab12", "by_docker": True}, "--ulimit nofile=128 of its container."),
        ({"unit": "kubelet.service", "container": "ab12"}, "ulimit -n 128 in a shell."),
    ],
)
def test_where_the_limit_is_set_for_the_next_start(where: dict[str, Any], words: str) -> None:
    full = processes.Process(7, "proxy", open_files=64, open_files_hard=64, **where)
    assert processes.more_files([full], 128, "More files.").what.endswith(words)


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
