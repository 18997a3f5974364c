"""A run from its start to its end: the account of events, every way to end, and outputs that fail."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import tcpscope
from tcpscope import session
from tcpscope import tool as toolbox
from tcpscope.errors import LossError, UsageError
from tcpscope.filters import Filter
from tcpscope.kernel import loaded
from tcpscope.kernel.loaded import Loaded
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.ways import plan
from tcpscope.lab.hosts import Host, Lab
from tcpscope.listeners import open_session
from tcpscope.request import Request
from tcpscope.session import Stats, missed_runs
from tcpscope.show import begin
from tcpscope.stop import Stop
from tcpscope.tool import Stream, find, names
from tests.conftest import DEADLINE, RunningTool, until
from tests.puppets import Puppet

REFUSED = 9  # nobody listens there
STEPS = 2  # a refused connect() is two changes of state


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One for all tests here: each leaves nothing in it."""
    with Lab() as made:
        yield made


def refused(host: Host, times: int) -> None:
    """So many connections that nobody takes."""

    def connect() -> None:
        for _ in range(times):
            with socket.socket() as client:
                assert client.connect_ex((host.ipv4, REFUSED)) == errno.ECONNREFUSED

    host.run(connect)


def test_the_account() -> None:
    stats = Stats(seen=10, shown=4, filtered=5, lost=1) + Stats(seen=1, shown=1)
    assert stats == Stats(seen=11, shown=5, filtered=5, lost=1)
    assert stats.line() == "seen 11 = shown 5 + filtered 5 + lost 1"
    assert not stats.lossless
    with pytest.raises(LossError, match="narrower filter"):
        stats.check()
    Stats(seen=3, shown=3).check()
    for silent in (Stats(table_full=2), Stats(missed=1)):
        assert not silent.lossless
    assert Stats(table_full=2).line().endswith("; 2 times a table was full")
    assert Stats(missed=1).line().endswith("; at least 1 times a program was skipped, or could not tell")


def test_what_was_missed() -> None:
    """Of a program with a second copy one of the two is free for each event."""
    missed = {"state": 3, "state_again": 2, "destroy": 0, "destroy_again": 4, "accept__fexit": 1, "timewait__fexit": 2}
    hooks = plan(Spec.of("transition"), {})
    loaded = SimpleNamespace(hooks=hooks, program_info=lambda: {name: (0, 0, n) for name, n in missed.items()})
    assert missed_runs(cast(Loaded, loaded)) == 3
    loaded.hooks = {name: hook for name, hook in hooks.items() if not name.startswith("destroy")}
    assert missed_runs(cast(Loaded, loaded)) == 7


def test_the_second_copies_are_found() -> None:
    """By their names, whatever the way."""
    pairs = {(program.first, program.name) for program in Spec.of("rtt").programs if program.again}
    assert pairs == {
        ("woken", "woken_again"),
        ("segment", "segment_again"),
        ("half_closed__fentry", "half_closed_again__fentry"),
        ("state", "state_again"),
        ("destroy", "destroy_again"),
    }


@pytest.mark.kernel
def test_loss_is_counted_exactly(lab: Lab, run_tool: type[RunningTool]) -> None:
    """The reader sleeps while more comes than a page holds. Witness: the connections made."""
    made = 100
    with run_tool("states", "--netns", str(lab.client.inode), "--buffer", "4K", "--strict") as tool:
        refused(lab.client, 3)
        tool.wait_for(lambda rows: len(rows) == 3 * STEPS)
        os.kill(tool.pid, signal.SIGSTOP)
        refused(lab.client, made)
        refused(lab.server, 5)  # of another namespace: filtered
        os.kill(tool.pid, signal.SIGCONT)
        done = tool.stop()
    stats = done.stats
    assert stats is not None
    assert stats["seen"] == stats["shown"] + stats["filtered"] + stats["lost"]
    assert stats["shown"] == len(done.rows)
    assert stats["shown"] + stats["lost"] == (3 + made) * STEPS
    assert stats["filtered"] >= 5 * STEPS
    # 4096 bytes hold 32 records of 120 bytes and their headers.
    assert 0 < stats["shown"] - 3 * STEPS <= 32
    assert stats["lost"] >= made * STEPS - 32
    assert stats["table_full"] == stats["missed"] == 0
    assert done.status == 5
    assert done.stderr.splitlines() == [
        f"tcpscope: {Stats(**stats).line()}",
        "tcpscope: events were lost; a larger --buffer or a narrower filter helps",
    ]


@pytest.mark.kernel
def test_nothing_is_lost_without_need(lab: Lab, run_tool: type[RunningTool]) -> None:
    """The same burst, and a buffer that holds it; strict then means nothing."""
    with run_tool("states", "--netns", str(lab.client.inode), "--buffer", "64K", "--strict") as tool:
        os.kill(tool.pid, signal.SIGSTOP)
        refused(lab.client, 100)
        os.kill(tool.pid, signal.SIGCONT)
        done = tool.stop()
    assert done.status == 0
    assert len(done.rows) == 100 * STEPS
    assert done.stats is not None
    assert done.stats["lost"] == 0
    assert done.stats["seen"] == done.stats["shown"] + done.stats["filtered"]


@pytest.mark.kernel
def test_a_full_buffer_wakes_the_reader(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Many times the buffer, never more at once than the reader takes: nothing is lost."""
    with run_tool("states", "--netns", str(lab.client.inode), "--buffer", "4K") as tool:
        for total in range(10, 101, 10):
            refused(lab.client, 10)
            tool.wait_for(lambda rows, total=total: len(rows) == total * STEPS)
    assert tool.done is not None
    assert tool.done.stats is not None
    assert tool.done.stats["lost"] == 0


def test_max_events(lab: Lab, run_tool: type[RunningTool]) -> None:
    """It ends by itself after so many rows; what came besides is in the account."""
    with run_tool("states", "--netns", str(lab.client.inode), "-n", "3") as tool:
        os.kill(tool.pid, signal.SIGSTOP)  # it ends at the third event, and is to find all of them
        until(lambda: Path(f"/proc/{tool.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it to stop")
        refused(lab.client, 5)
        os.kill(tool.pid, signal.SIGCONT)
        done = tool.wait()
    assert done.status == 0
    assert len(done.rows) == 3
    assert done.stats is not None
    assert done.stats["shown"] == 3
    assert done.stats["seen"] == 3 + done.stats["filtered"]
    assert done.stats["filtered"] >= 5 * STEPS - 3


def test_duration(lab: Lab, run_tool: type[RunningTool]) -> None:
    for duration in (1, 8, 64):
        begin = time.monotonic()
        with run_tool("states", "--netns", str(lab.client.inode), "-d", str(duration)) as tool:
            refused(lab.client, 2)
            made = time.monotonic()
            done = tool.wait()
        assert time.monotonic() - begin >= duration
        if made < begin + duration:  # they were made before it ended
            break
    assert done.status == 0
    assert len(done.rows) == 2 * STEPS
    assert "tcpscope: seen " in done.stderr


def test_the_duration_begins_when_all_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcpscope.show.drop_privileges", lambda *_: None)
    with Stop(60) as stop:
        assert stop.deadline is None
        before = time.monotonic()
        begin([], stop)
        assert stop.deadline is not None
        assert before + 60 <= stop.deadline <= time.monotonic() + 60


@pytest.mark.kernel
@pytest.mark.parametrize(("name", "asked"), [("life", {"live": True}), ("retrans", {}), ("states", {})])
def test_each_socket_without_a_place_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: dict[str, bool]
) -> None:
    """The seed runs twice, and a session may share the table that another one has filled. Witness: the sockets made."""
    places, pairs = 64, 50
    monkeypatch.setattr(loaded, "sockets_at_most", lambda now, allocates: places)
    with Lab() as own, contextlib.ExitStack() as stack:
        listener = own.client.socket(socket.AF_INET)
        listener.bind((own.client.ipv4, 0))
        listener.listen(pairs)
        for _ in range(pairs):
            stack.enter_context(own.client.socket(socket.AF_INET)).connect(listener.getsockname())
            stack.enter_context(listener.accept()[0])
        listener.close()
        for _ in range(2):
            events = stack.enter_context(tcpscope.open(name, netns=own.client.inode, **asked))
            events.stop()
            shown = len(list(events))
            assert events.stats.table_full == 2 * pairs - places
            assert "no place in a table: it holds as many sockets as it has room for" in events.notes
            assert shown == (places if name == "life" else 0)


@pytest.mark.parametrize("name", ["life", "top"])
def test_the_ring_has_room_for_all_sockets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`life --live` and a look of `top` send them all at once."""
    tool, request = cast(Stream, find(name)), Request(options={"live": True})
    for sockets in (0, 160_020, 10**9):
        monkeypatch.setattr(toolbox, "tcp_sockets", lambda sockets=sockets: sockets)
        size = tool.ring_bytes(request)
        assert size & (size - 1) == 0
        assert size == 1 << 30 or size >= sockets * (tool.layout.size + 8)


@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_in_order(lab: Lab, run_tool: type[RunningTool], number: int) -> None:
    """What happened until then is shown. Witness: its own process is asleep until the signal is there."""
    with run_tool("states", "--netns", str(lab.client.inode)) as tool:
        os.kill(tool.pid, signal.SIGSTOP)
        refused(lab.client, 4)
        tool.process.send_signal(number)
        os.kill(tool.pid, signal.SIGCONT)
        done = tool.wait()
    assert done.status == 0
    assert len(done.rows) == 4 * STEPS
    assert done.stats is not None
    assert done.stats["shown"] == 4 * STEPS
    assert done.stderr.startswith("tcpscope: seen ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.kernel
@pytest.mark.concurrent
def test_two_copies_do_not_disturb_each_other(lab: Lab, run_tool: type[RunningTool]) -> None:
    with (
        run_tool("states", "--netns", str(lab.client.inode)) as first,
        run_tool("states", "--netns", str(lab.client.inode), "-6") as second,
    ):
        refused(lab.client, 5)
        first.wait_for(lambda rows: len(rows) == 5 * STEPS)
        second.stop()
        refused(lab.client, 5)
        first.wait_for(lambda rows: len(rows) == 10 * STEPS)
    assert first.done is not None and second.done is not None
    assert (first.done.status, second.done.status) == (0, 0)
    assert second.done.rows == []
    assert first.done.stats is not None
    assert first.done.stats["lost"] == 0


@pytest.mark.parametrize("output", ["json", "csv", "table"])
def test_a_reader_that_goes_away(lab: Lab, run_tool: type[RunningTool], output: str) -> None:
    """As with `| head -1`: it ends quietly."""
    arguments = ("states", "--netns", str(lab.client.inode), "-o", output)
    read, write = os.pipe()
    with run_tool(*arguments, stdout=write) as tool:
        os.close(write)
        refused(lab.client, 1)
        until(lambda: os.read(read, 1), "the first byte")
        os.close(read)
        refused(lab.client, 3)
        done = tool.wait()
    assert done.stderr == ""
    assert done.status == 0


@pytest.mark.parametrize("output", ["json", "table"])
def test_a_full_disk(lab: Lab, run_tool: type[RunningTool], output: str) -> None:
    with Path("/dev/full").open("wb") as full:
        arguments = ("states", "--netns", str(lab.client.inode), "-o", output)
        with run_tool(*arguments, stdout=full, ready=False) as tool:
            if output == "json":  # a table writes its titles at once
                tool.wait_until_ready()
                refused(lab.client, 1)
            done = tool.wait()
    assert done.status == 1
    assert done.stderr.splitlines() == ["tcpscope: No space left on device"]


_FOR_A_MOMENT = [[name] if find(name).once else [name, "-d", "0.2"] for name in names()]
OUTPUTS = [
    *([*words, "-o", output] for words in _FOR_A_MOMENT for output in ("table", "csv")),
    *([*words, "-o", "json", "--stats"] for words in [*_FOR_A_MOMENT, ["diagnose", "-d", "0.2"]]),
    ["diagnose", "-d", "0.2"],
    *([name, "--explain"] for name in names()),
    ["features"],
    ["features", "--json"],
    ["--version"],
    ["--help"],
    ["states", "--help"],
    ["lab", "--help"],
]


def redirected(words: list[str], redirection: str) -> subprocess.CompletedProcess[str]:
    """The command line in a shell, with a standard stream closed or sent elsewhere."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "tcpscope", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.mark.root
@pytest.mark.parametrize("words", OUTPUTS, ids=" ".join)
def test_a_disk_that_was_full_before(words: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)):  # a row for who shows listeners
        done = redirected(words, ">/dev/full")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1:] == ["tcpscope: No space left on device"]
    assert done.returncode == 1


@pytest.mark.root
@pytest.mark.parametrize("words", [[*words, "-o", "csv"] for words in _FOR_A_MOMENT] + [["features"]], ids=" ".join)
@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream(words: list[str], redirection: str) -> None:
    """Without stdout there is nothing to do; what is for stderr never lands in stdout."""
    done = redirected(words, redirection)
    assert "Traceback" not in done.stdout + done.stderr
    assert "tcpscope: " not in done.stdout
    if ">&-" in redirection.split():
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == ("" if "2>&-" in redirection else "tcpscope: standard output is closed\n")
    else:
        assert done.returncode == 0
        assert done.stdout


@pytest.mark.root
def test_a_disk_that_was_full_before_for_stderr() -> None:
    """The account cannot be written, which is no success; the rows are."""
    done = redirected(["states", "-d", "0.2", "-o", "csv", "-v"], "2>/dev/full")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("time,")


@pytest.mark.parametrize("arguments", [("states",), ("queue", "-i", "0.1"), ("rtt", "-i", "0.1"), ("list",)])
def test_a_narrow_terminal(lab: Lab, run_tool: type[RunningTool], arguments: tuple[str, ...]) -> None:
    ours, theirs = os.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 40, 0, 0))
    listener = lab.client.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((lab.client.ipv4, 4711))
    listener.listen()
    command = (*arguments, "--netns", str(lab.client.inode), "-o", "table")
    wanted = {"states": "SYN_SENT", "queue": "4711", "rtt": "COUNT", "list": "4711"}[arguments[0]]
    with run_tool(*command, stdout=theirs, env={"COLUMNS": "", "LINES": ""}) as tool:
        os.close(theirs)
        refused(lab.client, 1)
        text = _until(ours, wanted)
        if arguments[0] != "list":  # it ends by itself
            tool.process.send_signal(signal.SIGINT)
        text += _all_of(ours)
        done = tool.wait()
    listener.close()
    assert done.status == 0
    assert wanted in text
    assert "Traceback" not in text + done.stderr
    if arguments[0] == "queue":
        assert max(map(len, text.replace("\x1b[H\x1b[J", "\n").splitlines())) <= 40


@pytest.mark.parametrize("arguments", [("states",), ("queue", "-i", "0.1"), ("rtt",), ("diagnose",)])
def test_ctrl_c_leaves_no_trace(lab: Lab, run_tool: type[RunningTool], arguments: tuple[str, ...]) -> None:
    """The terminal echoes ^C. What is written next does not stand behind it.

    A terminal sends the signal, drops what is written and not yet read, and echoes. On a busy machine the answer is
    written before that. So this one only echoes, and the signal comes from here.
    """
    written = {"states": "IN STATE", "queue": "listener", "rtt": "5 s\r\n", "diagnose": "sooner\r\n"}[arguments[0]]
    ours, theirs = os.openpty()
    mode = termios.tcgetattr(theirs)
    mode[3] &= ~termios.ISIG
    termios.tcsetattr(theirs, termios.TCSANOW, mode)
    command = (*arguments, "--netns", str(lab.client.inode), "-o", "table")
    with run_tool(*command, prefix=("setsid", "--ctty"), stdin=theirs, stdout=theirs, stderr=theirs) as tool:
        os.close(theirs)
        text = _until(ours, written)
        os.write(ours, b"\x03")
        text += _until(ours, "^C")
        tool.process.send_signal(signal.SIGINT)
        text += _all_of(ours)
        done = tool.wait()
    assert done.status == 0
    assert "^C\r\x1b[K" in text, text


def test_the_end_leaves_the_last_whole_interval_on_the_screen(lab: Lab, run_tool: type[RunningTool]) -> None:
    """What came in the moment between the last interval and the end does not replace it."""
    ours, theirs = os.openpty()
    puppet = Puppet(lab.client, "mover")
    puppet.do(
        "listener = socket.create_server(('127.0.0.1', 0)); client = socket.create_connection(listener.getsockname())\n"
        "child, _ = listener.accept()"
    )
    command = ("top", "-i", "0.5", "-d", "1", "--netns", str(lab.client.inode), "-o", "table")
    with run_tool(*command, stdin=theirs, stdout=theirs) as tool:
        os.close(theirs)
        puppet.do(
            "import threading\n"
            "def move():\n"
            "    while moving: client.send(b'x'); child.recv(1)\n"
            "moving = True; thread = threading.Thread(target=move, daemon=True); thread.start()"
        )
        text = _all_of(ours)
        done = tool.wait()
        puppet.do("moving = False; thread.join()")
    assert done.status == 0
    assert "mover" in text.rpartition("\x1b[H\x1b[J")[2]


def test_sighup_is_an_end_in_order(lab: Lab, run_tool: type[RunningTool]) -> None:
    with run_tool("states", "--netns", str(lab.client.inode)) as tool:
        refused(lab.client, 1)
        done = tool.stop(signal.SIGHUP)
    assert done.status == 0
    assert len(done.rows) == STEPS
    assert done.stats is not None and done.stats["shown"] == STEPS


def _until(terminal: int, wanted: str) -> str:
    """What is written to a terminal, until `wanted` is among it."""
    text = b""
    poll = select.poll()
    poll.register(terminal, select.POLLIN)
    while wanted.encode() not in text:
        assert poll.poll(DEADLINE * 1000), text
        text += os.read(terminal, 1 << 16)
    return text.decode()


def _all_of(terminal: int) -> str:
    """What is written to a terminal until its other end is closed."""
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # EIO: closed
            piece = b""
        if not piece:
            os.close(terminal)
            return b"".join(pieces).decode()
        pieces.append(piece)


@pytest.mark.parametrize("words", [("states", "--comm", "nosuch"), ("rtt",), ("diagnose",)], ids=" ".join)
def test_a_reader_that_goes_away_from_who_writes_nothing(run_tool: type[RunningTool], words: tuple[str, ...]) -> None:
    """The write that would tell never comes."""
    read, write = os.pipe()
    with run_tool(*words, "-o", "json", stdout=write) as tool:
        os.close(write)
        assert tool.process.poll() is None
        os.close(read)
        done = tool.wait()
    assert done.status == 0
    assert done.stderr == ("tcpscope: watching for 30 s; Ctrl-C ends it sooner\n" if words == ("diagnose",) else "")


def test_head_in_a_shell(lab: Lab) -> None:
    """The real thing: a shell, `head`, and the status of the tool itself."""
    script = '{ "$1" -m tcpscope states --netns "$2" -o csv -d 60; echo "status $?" >&2; } | head -n 1'
    shell = subprocess.Popen(
        ["sh", "-c", script, "sh", sys.executable, str(lab.client.inode)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout is not None and shell.stderr is not None
    assert shell.stdout.readline().startswith("time,")
    begin = time.monotonic()
    while shell.poll() is None:  # the write that finds no reader
        refused(lab.client, 1)
        assert time.monotonic() - begin < 59
        time.sleep(0.05)
    assert shell.stderr.read() == "status 0\n"
    shell.stdout.close(), shell.stderr.close()


def descriptors_of(inode: int) -> int:
    """How many descriptors this process has of the namespace."""
    nsfs, found = Path("/proc/self/ns/net").stat().st_dev, 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one of the directory itself
            stat = link.stat()
            found += (stat.st_dev, stat.st_ino) == (nsfs, inode)
    return found


@pytest.mark.root
def test_a_namespace_of_the_filter_is_held_during_the_run() -> None:
    """Otherwise the kernel could give its inode number to another one, whose rows would be shown."""
    with Lab() as gone:
        inode = gone.server.inode
        session = open_session(Filter(netns=inode), events=False, ring_bytes=4096)
    with session:
        assert descriptors_of(inode) == 1
    assert descriptors_of(inode) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("abc", "no number of a descriptor"),
        ("1e3", "no number of a descriptor"),
        ("987", "Bad file descriptor"),
        ("-1", "Bad file descriptor"),
        ("9" * 30, "no number of a descriptor"),
    ],
)
def test_nowhere_to_announce(monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    """What the environment names may be anything."""
    monkeypatch.setenv(session.READY_FD, text)
    with pytest.raises(UsageError, match=f"{session.READY_FD}={text}: {reason}"):
        session.announce_ready()


def test_nobody_waits_for_the_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setenv(session.READY_FD, str(write))
    try:
        with pytest.raises(UsageError, match="Broken pipe"):
            session.announce_ready()
    finally:
        os.close(write)
