"""`tcpscope TOOL -- COMMAND`: rows of the command and its children, from their first system call on, and its status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tcpscope.command import Command
from tcpscope.errors import TcpscopeError, UsageError
from tcpscope.filters import cgroup_mount
from tests.conftest import DEADLINE, CompletedRun, RunningTool, until

CONNECT = "import os, socket; s = socket.socket(); s.connect_ex(('127.0.0.1', {port})); s.close()"
ROWS = ("connect", "-o", "json", "--columns", "pid,comm,rport,outcome")


def cgroups(pid: int) -> list[Path]:
    """Those that this process has made."""
    return list(cgroup_mount().rglob(f"tcpscope.{pid}.*"))


def ports(done: CompletedRun) -> list[int]:
    return [json.loads(line)["rport"] for line in done.stdout.splitlines()]


@pytest.fixture
def closed() -> int:
    """A port on which nobody listens, for as long as the test runs: bound, not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]  # type: ignore[misc]


@pytest.mark.kernel
def test_its_connections_and_those_of_its_children(closed: int, run_tool: type[RunningTool]) -> None:
    """The first thing that it does is to connect. Others connect to the same port at the same time."""
    code = f"{CONNECT}\nif os.fork() == 0:\n    {CONNECT}\n    os._exit(0)\nos.wait(); raise SystemExit(7)"
    with run_tool(*ROWS, "--", sys.executable, "-I", "-S", "-c", code.format(port=closed)) as tool:
        for _ in range(20):
            with socket.socket() as other:
                assert other.connect_ex(("127.0.0.1", closed)) != 0
        done = tool.wait()
    assert done.status == 7
    assert ports(done) == [closed, closed]
    assert len({json.loads(line)["pid"] for line in done.stdout.splitlines()}) == 2
    assert cgroups(tool.pid) == []


UNIGNORED = ("env", "--default-signal=HUP,INT,QUIT,TERM")
"""Who starts the tests in the background of a shell has some of them ignored."""


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGQUIT, 131)]
)
def test_a_signal_is_for_the_command(number: int, status: int, run_tool: type[RunningTool], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with run_tool(
        *ROWS,
        *("--", "sh", "-c", f"echo $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 600"),
        prefix=UNIGNORED,
        process_group=0,  # not that of a terminal's foreground
    ) as tool:
        until(pid.exists, "the command")
        os.kill(tool.pid, number)
        assert tool.wait().status == status
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


LOADING = """
import os, signal, sys
from tcpscope import __main__, show

def begin(*arguments, real=show.begin):
    child = int(open(f"/proc/self/task/{{os.getpid()}}/children").read())
    os.kill(child if {to_child} else os.getpid(), {number})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    real(*arguments)

show.begin = begin
__main__.main()
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("number", "to_child", "status"),
    [(signal.SIGKILL, True, 137), (signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)],
)
def test_a_signal_before_the_command_is_started(number: int, to_child: bool, status: int, tmp_path: Path) -> None:
    """While the tool is loaded the child waits. A signal for the tool is for the command then, too."""
    made = tmp_path / "made"
    code = LOADING.format(number=int(number), to_child=to_child)
    argv = [*UNIGNORED, sys.executable, "-c", code, *ROWS, "--", "touch", str(made)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == "tcpscope: the command has ended before it was started\n"
    assert not made.exists()


COUNTING = """
import os, signal, sys
got = []
signal.signal(signal.SIGINT, lambda *_: (got.append("INT"), open(sys.argv[1] + ".got", "w")))
signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal's end
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
while "USR1" not in got:
    signal.pause()
open(sys.argv[1] + ".all.new", "w").write(" ".join(got))
os.rename(sys.argv[1] + ".all.new", sys.argv[1] + ".all")
"""
AT_A_TERMINAL = ("setsid", "--ctty", "sh", "-c", 'exec "$@" </dev/null', "sh")
"""Words before a command whose standard input is a terminal: it becomes that of the command, which does not read it."""


@pytest.mark.kernel
@pytest.mark.parametrize("apart", [False, True], ids=["", "apart"])
def test_ctrl_c_reaches_the_command_once(apart: bool, run_tool: type[RunningTool], tmp_path: Path) -> None:
    """The terminal sends it to the whole foreground. The tool passes it on to a command that has left that."""
    pid, all_ = tmp_path / "pid", tmp_path / "pid.all"
    words = [*(["setsid"] if apart else []), sys.executable, "-I", "-S", "-c", COUNTING, str(pid)]
    ours, theirs = os.openpty()
    with run_tool(*ROWS, "--", *words, prefix=AT_A_TERMINAL, stdin=theirs) as tool:
        until(pid.exists, "the command")
        child = int(pid.read_text())
        try:
            os.kill(tool.pid, signal.SIGSTOP)
            until(lambda: " T " in Path(f"/proc/{tool.pid}/stat").read_text(), "the tool's halt")
            os.write(ours, b"\x03")
            until(lambda: apart or pid.with_suffix(".got").exists(), "the terminal's signal")
            os.kill(tool.pid, signal.SIGTERM)  # the second one, which ends the tool
            os.kill(tool.pid, signal.SIGCONT)
            until(lambda: tool.process.poll() is not None, "the end of the tool")
            os.kill(child, signal.SIGUSR1)
            until(all_.exists, "the end of the command")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    os.close(ours), os.close(theirs)
    assert all_.read_text() == "INT USR1"


OTHER = """
import os, sys
os.setresuid(65534, 65534, 65534)
print("another user", flush=True)
sys.stdin.read()
"""


@pytest.mark.root
def test_a_signal_that_may_not_be_passed_on_ends_the_tool(run_tool: type[RunningTool]) -> None:
    """The command has become another user, and the tool has no CAP_KILL."""
    without = ("setpriv", "--bounding-set=-kill", "--inh-caps=-all", "--")
    words = (sys.executable, "-I", "-S", "-c", OTHER)
    read, write = os.pipe()
    with run_tool(*ROWS, "--stats", "--", *words, prefix=(*without, *UNIGNORED), stdin=read) as tool:
        os.close(read)
        try:
            until(lambda: tool.stdout, "the command")
            os.kill(tool.pid, signal.SIGTERM)
            until(lambda: tool.process.poll() is not None, "the end of the tool")
        finally:
            os.close(write)  # ends the command
        done = tool.wait()
    assert (done.status, done.rows) == (0, [])
    assert done.stats is not None


STUBBORN = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1] + ".got", "w"))
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
while True:
    signal.pause()
"""


@pytest.mark.kernel
def test_a_second_signal_ends_the_tool_and_leaves_the_command(run_tool: type[RunningTool], tmp_path: Path) -> None:
    """What goes on afterwards belongs to the cgroup above."""
    pid, above = tmp_path / "pid", Path("/proc/self/cgroup").read_text()
    with run_tool(*ROWS, "--", sys.executable, "-I", "-S", "-c", STUBBORN, str(pid)) as tool:
        until(pid.exists, "the command")
        child = int(pid.read_text())
        try:
            os.kill(tool.pid, signal.SIGTERM)
            until(pid.with_suffix(".got").exists, "the first signal")
            os.kill(tool.pid, signal.SIGTERM)
            until(lambda: tool.process.poll() is not None, "the end of the tool")
            assert Path(f"/proc/{child}/cgroup").read_text() == above
            assert cgroups(tool.pid) == []
        finally:
            os.kill(child, signal.SIGKILL)  # it has the tool's output open
        assert tool.wait().status == 0


WAITING = """
import os, sys
open(sys.argv[1]).read()
{connect}
raise SystemExit(3)
"""


@pytest.mark.kernel
@pytest.mark.parametrize(("most", "rows"), [(("-d", "0.1"), 0), (("-n", "1"), 1)])
def test_the_rows_end_and_not_the_command(
    most: tuple[str, str], rows: int, closed: int, run_tool: type[RunningTool], tmp_path: Path
) -> None:
    """The tool waits for the command, and has its status."""
    go = tmp_path / "go"
    os.mkfifo(go)
    connect = CONNECT.format(port=closed)
    code = (connect if rows else "") + WAITING.format(connect=connect)
    with run_tool(*ROWS, *most, "--", sys.executable, "-I", "-S", "-c", code, str(go)) as tool:
        try:
            until(lambda: _detached(tool.pid), "the end of the run")
            assert tool.process.poll() is None
        finally:
            until(lambda: _let_go(go), "the command to wait")
        done = tool.wait()
    assert (done.status, ports(done)) == (3, [closed] * rows)
    assert cgroups(tool.pid) == []


@pytest.mark.kernel
def test_a_signal_is_for_the_command_after_the_rows_too(run_tool: type[RunningTool]) -> None:
    with run_tool(*ROWS, "-d", "0.1", "--", "sleep", "600") as tool:
        until(lambda: _detached(tool.pid), "the end of the run")
        os.kill(tool.pid, signal.SIGTERM)
        assert tool.wait().status == 143


@pytest.mark.kernel
def test_an_explanation_runs_no_command(run_tool: type[RunningTool], tmp_path: Path) -> None:
    made = tmp_path / "made"
    with run_tool("life", "-o", "table", "--explain", "-d", "5", "--", "touch", str(made), ready=False) as tool:
        assert tool.wait().status == 0
    assert not made.exists()


@pytest.mark.kernel
def test_who_started_it_ignores_the_end_of_children(run_tool: type[RunningTool]) -> None:
    with run_tool(*ROWS, "--", "sh", "-c", "exit 5", prefix=("env", "--ignore-signal=CHLD")) as tool:
        assert tool.wait().status == 5


def _let_go(fifo: Path) -> bool:
    """Let the command go on that waits in open() of this FIFO. False if it does not wait there yet."""
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _detached(pid: int) -> bool:
    """Whether a process holds no BPF program any more."""
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "link_type" in path.read_text():
                return False
    return True


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("connect", "-o", "json", "--"), "-- without a command; give the command to watch behind it"),
        (("connect", "-o", "json", "--", "no-such-program"), "no command 'no-such-program'; give a program of PATH"),
        (("connect", "-o", "json", "--cgroup", "1", "--", "true"), "--cgroup and a command; the command has a cgroup"),
        (("top", "-o", "screen", "--", "true"), "-o screen and a command; both write to the terminal"),
        (("list", "-o", "json", "--", "true"), "'list' watches no command; leave out what stands behind --"),
        (("connect", "--count", "--rate", "5", "--", "true"), "--rate 5; --count prints groups"),  # by the tool itself
    ],
)
def test_what_it_refuses(words: tuple[str, ...], said: str, run_tool: type[RunningTool]) -> None:
    with run_tool(*words, ready=False) as tool:
        done = tool.wait()
    assert done.status == 2
    assert said in done.stderr
    assert not cgroups(tool.pid)


@pytest.mark.root
def test_it_waits_until_it_is_started(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with Command(["touch", str(made)]) as command:
        assert not command.ended()
    assert not made.exists()
    with Command(["touch", str(made)]) as command:
        command.start()
        until(command.ended, "its end")
        assert command.status() == 0
    assert made.exists()
    assert cgroups(os.getpid()) == []


@pytest.mark.root
def test_it_is_killed_before_it_is_started() -> None:
    with Command(["true"]) as command:
        os.kill(command.pid, signal.SIGKILL)
        os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)
        command.start()
        assert command.status() == 137


@pytest.mark.root
def test_a_program_that_cannot_be_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/shell\n")
    broken.chmod(0o755)
    with Command([str(broken)]) as command:
        command.start()
        assert command.status() == 126
    assert capfd.readouterr().err == f"tcpscope: cannot run {broken}: No such file or directory\n"


@pytest.mark.root
@pytest.mark.parametrize("free", [0, 1, 2])
def test_too_few_descriptors_leave_no_cgroup(free: int) -> None:
    """Neither for the pipe, nor for the file by which the child enters the cgroup, however many are free."""
    before = set(Path("/proc/self/fd").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    command = Command(["true"])
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, limits[1]))
    try:
        for _ in range(free):
            os.close(taken.pop())
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)), command:
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)
    assert cgroups(os.getpid()) == []
    if free == 2:
        with pytest.raises(ChildProcessError):  # it does not stay as a zombie
            os.waitpid(command.pid, os.WNOHANG)
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.root
def test_no_cgroup_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcpscope.command.cgroup_mount", lambda: Path("/proc/sys"))
    with pytest.raises(TcpscopeError, match="cannot make a cgroup in /proc/sys: "), Command(["true"]):
        pass


def test_no_such_program() -> None:
    with pytest.raises(UsageError):
        Command(["no-such-program"])
