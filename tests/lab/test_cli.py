"""`tcpscope lab`: what it prints, what it leaves behind, how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tcpscope.errors import UsageError
from tcpscope.lab.cli import Interrupts, lab
from tcpscope.lab.namespaces import NAMES, start_time
from tcpscope.lab.scenario import load, names

RUN = [sys.executable, "-m", "tcpscope", "lab", "run"]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(lab, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def ours(pid: int) -> list[Path]:
    return list(NAMES.glob(f"tcpscope-{pid}-*"))


def test_list() -> None:
    lines = invoke("list").splitlines()
    assert [line.split()[0] for line in lines] == names()


@pytest.mark.parametrize("name", names())
def test_help_is_the_scenarios_own(name: str) -> None:
    text = invoke("run", name, "--help")
    for field in load(name).parameters():
        assert f"--{field.name.replace('_', '-')}" in text
    assert "--freeze" in text


def test_unknown_scenario() -> None:
    result = CliRunner().invoke(lab, ["run", "syn-flod"])
    assert isinstance(result.exception, UsageError)
    assert "did you mean 'syn-flood'" in str(result.exception)


@pytest.mark.root
def test_run_tells_what_was_done_and_what_was_counted() -> None:
    text = invoke(
        "run",
        "accept-overflow",
        "--backlog",
        "2",
        "--clients",
        "4",
        "--family",
        "6",
        "--freeze",
        "--synack-retries",
        "5",
    )
    assert "server | listen(fd, 2) on [2001:db8::2]:8080, never accepts" in text
    assert "client | 4 connects: 4 connected, 0 failed" in text
    assert "server | accept queue of the listener: 3, limit 2" in text
    overflows = re.search(r"^server \| TcpExtListenOverflows \+(\d+)$", text, re.MULTILINE)
    assert overflows and int(overflows[1]) >= 3  # last ACK, data and FIN of the fourth, and what came again
    assert "server | TcpOutRsts 0" in text  # what lives is not answered with a reset
    assert ours(os.getpid()) == []


@pytest.mark.root
def test_run_with_a_tool_beside() -> None:
    done = subprocess.run(
        [*RUN, "close-order", "--pause-ms", "1", "--", "states", "-o", "json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" | ") for line in done.stdout.splitlines()]
    events = [json.loads(text) for who, _, text in lines if who == "states" and text.startswith("{")]
    assert events
    assert {event["lport"] for event in events} == {8080}  # the server's namespace, and nothing else


@pytest.mark.root
def test_no_code_of_the_current_directory_is_run(tmp_path: Path) -> None:
    here, witness = tmp_path / "here", tmp_path / "imported"
    here.mkdir()
    for name in (*sys.stdlib_module_names, "click", "cffi", "msgspec", "pyroute2", "tcpscope"):
        (here / f"{name}.py").write_text(f"print(__name__, file=open({str(witness)!r}, 'a'))\n")
    command = [Path(sys.executable).with_name("tcpscope"), "lab", "run", "close-order", "--pause-ms", "1"]
    done = subprocess.run([*command, "--", "states", "-o", "json"], cwd=here, capture_output=True, text=True)
    assert not witness.exists(), witness.read_text().split()
    assert done.returncode == 0, done.stderr
    assert '"new_state":"CLOSE"' in done.stdout  # both hosts' programs and the tool have run


@pytest.mark.root
def test_a_tool_that_fails_gives_its_status() -> None:
    done = subprocess.run([*RUN, "close-order", "--", "states", "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--nonsense" in done.stdout  # its own words
    assert "'tcpscope states' ended with status 2" in done.stderr


@pytest.mark.root
@pytest.mark.parametrize("number", Interrupts.SIGNALS)
def test_signals_take_the_lab_down(number: signal.Signals) -> None:
    running = subprocess.Popen(
        [*RUN, "accept-overflow-serial", "--syn-retries", "6"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert running.stdout is not None
    server = 0
    for line in running.stdout:
        if "lab-server, pid" in line:
            server = int(line.rpartition(" ")[2].strip(")\n"))
        if "connect number 6" in line:  # it waits in the seventh for minutes
            break
    assert len(ours(running.pid)) == 2
    running.send_signal(number)
    _, errors = running.communicate()
    assert running.returncode == 1
    assert errors == "tcpscope: interrupted; the lab was removed\n"
    assert ours(running.pid) == []
    assert start_time(server) is None


@pytest.mark.root
def test_an_interrupt_at_any_time_leaves_nothing() -> None:
    """SIGINT comes at each call of a function that makes or removes the lab, one after the other."""
    code = """if True:
        import os, signal, sys
        from tcpscope.errors import TcpscopeError
        from tcpscope.lab import cli, hosts, namespaces

        class Nothing:
            name, title = str, ""
            def setup(self, lab):
                raise KeyboardInterrupt

        def trace(frame, event, _):
            global calls
            if frame.f_code.co_filename in (hosts.__file__, namespaces.__file__):
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGINT)

        at, calls = 0, 0
        while calls >= at:
            at, calls = at + 1, 0
            sys.settrace(trace)
            try:
                cli.play(Nothing(), (), False, False)
            except TcpscopeError as error:
                assert str(error) == "interrupted; the lab was removed", error
            sys.settrace(None)
            left = [path.name for path in namespaces.NAMES.glob(f"tcpscope-{os.getpid()}-*")]
            assert not left, (at, left)
        print("interrupted", at)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    assert int(done.stdout.rpartition("interrupted ")[2]) > 20


@pytest.mark.root
def test_without_proc() -> None:
    """It says so in one line, and does not wait for ever."""
    command = 'mount -t tmpfs none /proc && exec "$@" lab run syn-flood'
    words = ["unshare", "--mount", "sh", "-c", command, "sh", *RUN[:-2]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr == "tcpscope: there is no /proc/thread-self/ns/net; a lab needs /proc: mount it\n"


@pytest.mark.root
def test_kept_until_the_interrupt() -> None:
    running = subprocess.Popen(
        [*RUN, "syn-flood", "--backlog", "3", "--keep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert running.stdout is not None
    hint = next(line for line in running.stdout if "ip netns exec" in line)
    command = hint.partition(": ")[2].partition(";")[0].split()
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "LISTEN" in shown
    assert "SYN-RECV" in shown
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert (running.returncode, errors) == (0, "")
    assert ours(running.pid) == []


@pytest.mark.root
def test_clean() -> None:
    NAMES.mkdir(exist_ok=True)
    dead = NAMES / f"tcpscope-{os.getpid()}-1-7-server"
    dead.touch()
    assert f"removed {dead.name}" in invoke("clean")
    assert not dead.exists()


def test_without_privilege() -> None:
    bare = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
    done = subprocess.run([*bare, *RUN, "syn-flood"], capture_output=True, text=True)
    assert done.returncode == 4
    assert "CAP_SYS_ADMIN" in done.stderr
    assert done.stderr.count("\n") == 1
