"""Each tool on terminals of 80 and 120 columns, on real traffic with long addresses and long names."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from contextlib import ExitStack
from fcntl import ioctl
from types import SimpleNamespace
from typing import cast

import pytest

from tcpscope import show
from tcpscope.lab.hosts import Host, Lab
from tcpscope.output import screen
from tcpscope.run import Run
from tcpscope.tool import names
from tests.conftest import DEADLINE, RunningTool, until
from tests.lacks import refusals_cannot_be_seen
from tests.puppets import Puppet

NAME = "fifteen-letters"
LONG = "2001:db8:1111:2222:3333:4444:5555:6666"
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

WORDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("accept",): ("WAIT(ms)", "REMOTE"),
    ("cong", "--all"): ("LOSS(ms)", "RECOV(ms)", "REMOTE"),
    ("connect",): ("OUTCOME", "REMOTE", "ESTABLISHED", "REFUSED"),
    ("connlat",): ("LAT(ms)", "REMOTE", "OUTCOME"),
    ("drop",): ("REASON", "LOCAL", "REMOTE", "NO_SOCKET"),
    ("life",): ("END", "REMOTE", "DUR(ms)", "FIN"),
    ("pktlat",): ("WAIT(ms)", "TAKEN", "REMOTE"),
    ("ports", "-i", "0.2"): ("LEVEL", "REMOTE", "USED"),
    ("queue",): ("LOCAL", "WAIT(ms)", "ACCEPTQ", "LIMIT"),
    ("reset",): ("DIR", "CAUSE", "REMOTE"),
    ("retrans",): ("KIND", "REMOTE"),
    ("rtt", "--by", "connection"): ("COUNT", "REMOTE", "P50(ms)"),
    ("states",): ("OLD STATE", "NEW STATE", "IN STATE(ms)"),
    ("subnet", "--net", f"{LONG},0.0.0.0/0"): ("NETWORK", "TX_BYTES", "RX_BYTES"),
    ("top",): ("TX_BYTES", "RX_BYTES", "REMOTE"),
    ("synbl",): ("LOCAL", "LIMIT", "SHAKES", "ACCEPT MAX", "ACCEPT FULL"),
    ("trace",): ("SINCE(ms)", "BEFORE", "HOP"),
    ("tracer",): ("ACTION", "CONNECT", "ACCEPT", "CLOSE", "REMOTE"),
    ("list",): ("STATE", "LOCAL"),
}
"""A command -> what must be there at 80 columns already."""


class Terminal:
    """A terminal of so many columns. `written` is what came."""

    def __init__(self, columns: int) -> None:
        self.ours, self.theirs = os.openpty()
        ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.written = ""

    def read(self) -> bool:
        """Wait for something, and take it. False at the end."""
        poll = select.poll()
        poll.register(self.ours, select.POLLIN)
        assert poll.poll(DEADLINE * 1000), f"nothing came any more: {self.written}"
        try:
            piece = os.read(self.ours, 1 << 16)
        except OSError:  # EIO: the other end is closed
            return False
        self.written += piece.decode()
        return bool(piece)

    def wait_for(self, *words: str) -> None:
        while not all(word in self.written for word in words):
            assert self.read(), f"it ended without {words}: {self.written}"

    def read_all(self) -> None:
        while self.read():
            pass
        os.close(self.ours)

    @property
    def lines(self) -> list[str]:
        return ESCAPES.sub("", self.written.replace("\x1b[H\x1b[J", "\n")).splitlines()


def add_address(address: str) -> None:
    """Add it to the loopback of this process's network namespace."""
    from pyroute2 import IPRoute

    with IPRoute() as link:
        link.addr("add", index=1, address=address, prefixlen=128, family=socket.AF_INET6)


def connect(host: Host, address: str) -> list[Puppet]:
    """A connection that moves data both ways, one that is refused, and one that waits in the accept queue."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    client, server = Puppet(host, NAME), Puppet(host, NAME)
    server.do("listener = socket.create_server((a, 65000), family=f)", a=address, f=int(family))
    client.do("c = socket.create_connection((a, 65000)); c.sendall(b'x' * 20000)", a=address)
    server.do("s, _ = listener.accept(); n = 0\nwhile n < 20000: n += len(s.recv(65536))\ns.sendall(b'y'); s.close()")
    client.do("while c.recv(9): pass\nc.close()")
    client.do("try: socket.create_connection((a, 9))\nexcept OSError: pass", a=address)
    client.do("waiting = socket.create_connection((a, 65000))", a=address)
    return [client, server]


@pytest.mark.root
def test_a_pipe_gets_all_columns_at_their_places(lab: Lab) -> None:
    """For awk: one title and one field for each column, UTC, whatever terminal there is."""
    filters = ("--netns", str(lab.server.inode), "-o", "table")
    with RunningTool("connect", *filters, env={"COLUMNS": "40", "TERM": "xterm"}, stdout=subprocess.PIPE) as tool:
        Puppet(lab.server, NAME).do("try: socket.create_connection((a, 9))\nexcept OSError: pass", a=lab.server.ipv4)
        until(lambda: "REFUSED" in tool.stdout, "the row")
        titles, row = tool.stop().stdout.splitlines()
    assert re.split(r"\s+(?!RETRANS)", titles) == [
        *("TIME", "PID", "COMM", "LADDR", "LPORT", "RADDR", "RPORT", "OUTCOME", "ERRNO", "LAT(us)", "SYN RETRANS")
    ]
    time, pid, comm, _, _, raddr, rport, outcome, errno, latency, retrans = row.split()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time)
    assert (comm, raddr, rport, outcome, errno) == (NAME, lab.server.ipv4, "9", "REFUSED", "ECONNREFUSED")
    assert (pid + latency + retrans).isdigit()


def test_notes_are_wrapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = SimpleNamespace(notes=["something that is not known " * 9])
    monkeypatch.setenv(screen.WIDTH, "60")
    show._print_notes(cast(Run, run))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 60
    assert not run.notes


def test_long_lines_are_indented_and_no_word_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(screen.WIDTH, "40")
    hook = "  ack4_exit      not kprobe/tcp_v4_syn_recv_sock: why-ever-not"
    assert screen.filled(hook, io.BytesIO(), 19).splitlines() == [
        "  ack4_exit      not",
        "                   kprobe/tcp_v4_syn_recv_sock:",
        "                   why-ever-not",
    ]
    assert screen.filled("  short    line", io.BytesIO(), 19) == "  short    line"


@pytest.mark.root
@pytest.mark.parametrize(("columns", "shown"), [(60, False), (120, True)])
def test_a_tool_in_the_lab(columns: int, shown: bool) -> None:
    """Its lines stand behind its name, and fit the terminal too."""
    terminal = Terminal(columns)
    words = ("lab", "run", "close-order", "--", "life", "-o", "table")
    with RunningTool(*words, stdout=terminal.theirs, ready=False) as tool:
        os.close(terminal.theirs)
        terminal.read_all()
        assert tool.wait().status == 0
    titles, row = (line for line in terminal.lines if line.startswith("life   | "))
    assert max(len(titles), len(row)) <= columns
    assert ("REMOTE" in titles, "TIME " in titles, "FIN" in row) == (True, shown, True)


@pytest.mark.root
@pytest.mark.parametrize(
    ("env", "red", "page"),
    [
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        ({"TERM": "dumb", "NO_COLOR": ""}, False, False),
    ],
    ids=str,
)
def test_colours_and_pages(lab: Lab, env: dict[str, str], red: bool, page: bool) -> None:
    """A terminal gets colours unless NO_COLOR is set, and no escape sequence at all if it is dumb."""
    filters = ("--netns", str(lab.server.inode), "-o", "table")
    refused, queues = Terminal(80), Terminal(80)
    with (
        RunningTool("connect", *filters, stdout=refused.theirs, env=env) as connects,
        RunningTool("queue", *filters, stdout=queues.theirs, env=env) as queue,
    ):
        os.close(refused.theirs)
        os.close(queues.theirs)
        Puppet(lab.server, NAME).do("try: socket.create_connection((a, 9))\nexcept OSError: pass", a=lab.server.ipv4)
        refused.wait_for("REFUSED", "\n")
        queues.wait_for("\n")
        for tool, terminal in ((connects, refused), (queue, queues)):
            tool.process.send_signal(signal.SIGINT)
            terminal.read_all()
            assert tool.wait().status == 0
    assert ("\x1b[31mREFUSED\x1b[0m" in refused.written) == red
    assert queues.written.startswith("\x1b[H\x1b[J") == page
    assert page or "\x1b" not in refused.written + queues.written


@pytest.mark.parametrize("text", ["", "abc", "-1", "0", "\u0663"])
def test_no_width(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(screen.WIDTH, text)
    assert screen.width_of(io.BytesIO()) is None


@pytest.mark.root
@pytest.mark.parametrize("words", [("rtt",), ("connect", "--count"), ("connlat", "--histogram", "-d", "0.5")])
def test_who_prints_at_the_end_says_so(lab: Lab, words: tuple[str, ...]) -> None:
    output, messages = Terminal(80), Terminal(80)
    with RunningTool(
        *words, "--netns", str(lab.server.inode), "-o", "table", stdout=output.theirs, stderr=messages.theirs
    ) as tool:
        os.close(output.theirs)
        os.close(messages.theirs)
        messages.wait_for("tcpscope: counting; prints ", "at Ctrl-C; with -i 5 every 5 s")
        assert ("after 0.5 s" in messages.written) == ("-d" in words)
        if "-d" not in words:
            tool.process.send_signal(signal.SIGINT)
        output.read_all()
        messages.read_all()
        assert tool.wait().status == 0
    assert "COUNT" in output.written
    assert len([line for line in messages.lines if line.strip()]) == 1


@pytest.mark.root
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_numbers_of_groups_have_room_before_their_columns(columns: int) -> None:
    """And which of them are totals, if there are intervals."""
    by = "comm,laddr,lport,raddr,rport,state,kind,ca_state,errno"
    output = Terminal(columns)
    with RunningTool(
        *("retrans", "--count", "--by", by, "-i", "0.2", "-d", "0.5", "-o", "table"), stdout=output.theirs
    ) as tool:
        os.close(output.theirs)
        output.read_all()
        assert tool.wait().status == 0
    assert {"COUNT", "SEGS", "TOTAL"} <= set(output.written.split())


@pytest.mark.root
@pytest.mark.parametrize("words", [("rtt", "-i", "9"), ("connect",), ("queue",)])
def test_who_prints_all_the_time_does_not(lab: Lab, words: tuple[str, ...]) -> None:
    messages = Terminal(80)
    with RunningTool(*words, "--netns", str(lab.server.inode), "-o", "table", stderr=messages.theirs) as tool:
        os.close(messages.theirs)
        tool.process.send_signal(signal.SIGINT)
        messages.read_all()
        assert tool.wait().status == 0
    assert "counting; prints" not in messages.written


def test_an_error_breaks_between_words() -> None:
    messages = Terminal(80)
    words = [sys.executable, "-m", "tcpscope", "states", "--columns", "nothing"]
    process = subprocess.Popen(words, stderr=messages.theirs)
    os.close(messages.theirs)
    messages.read_all()
    assert process.wait(DEADLINE) == 2
    lines = [line.rstrip() for line in messages.lines if line.strip()]
    assert len(lines) > 1 and all(len(line) <= 80 for line in lines)
    told = subprocess.run(words, capture_output=True, text=True)
    assert " ".join(lines) == told.stderr.rstrip("\n")  # in a pipe it is one line


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "printed"), [((), False), (("-v",), True), (("--stats",), True), (("--strict",), True)], ids=str
)
def test_a_quiet_end_when_nothing_was_lost(lab: Lab, words: tuple[str, ...], printed: bool) -> None:
    with RunningTool("states", "--netns", str(lab.server.inode), "-o", "json", *words) as tool:
        done = tool.stop()
    assert ("tcpscope: seen " in done.stderr) == printed, done.stderr


@pytest.mark.root
@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_longer_than_the_terminal(lab: Lab, columns: int) -> None:
    assert {command[0] for command in WORDS} == set(names())
    lab.server.run(add_address, LONG)
    filters = ("--netns", str(lab.server.inode), "-o", "table")
    with ExitStack() as stack:
        running = []
        for command in WORDS:
            if command != ("list",):
                terminal = Terminal(columns)
                tool = stack.enter_context(RunningTool(*command, *filters, stdout=terminal.theirs))
                os.close(terminal.theirs)
                running.append((command, tool, terminal))
        puppets = [puppet for address in (lab.server.ipv4, LONG) for puppet in connect(lab.server, address)]
        for command, tool, terminal in running:
            if command[0] in ("cong", "ports", "queue", "subnet", "top"):  # their next look
                terminal.wait_for(LONG)
            tool.process.send_signal(signal.SIGINT)
            terminal.read_all()
            assert tool.wait().status == 0
        terminal = Terminal(columns)
        tool = stack.enter_context(RunningTool("list", *filters, stdout=terminal.theirs, ready=False))
        os.close(terminal.theirs)
        terminal.read_all()
        running.append((("list",), tool, terminal))
        assert puppets
    for command, _, terminal in running:
        assert max(map(len, terminal.lines)) <= columns, command
        if command not in (("retrans",), ("trace",)):  # where a connection was chosen, the hops matter more
            assert LONG in terminal.written, command
        refusals = "ACCEPT/s" if refusals_cannot_be_seen() else "OVERFLOWS"
        for word in (*WORDS[command], *([refusals] if command == ("queue",) else [])):
            assert word in terminal.written, (command, word)
