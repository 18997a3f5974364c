"""`queue` as a table of listeners, against `ss`, the kernel's own counters and the test's clock."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.conftest import DEADLINE, RunningTool, until
from tests.lacks import functions_cannot_be_hooked
from tests.puppets import Puppet
from tests.tools.queue.site import (
    SMALL_BACKLOG,
    Rows,
    Run,
    Site,
    accept_queue,
    cookie_of,
    flood,
    ports,
    requests,
    sysctls,
)

pytestmark = pytest.mark.kernel


class Table:
    """`queue` without --events, a snapshot every 50 ms."""

    def __init__(self, tool: RunningTool) -> None:
        self.tool = tool

    def when(self, condition: Any, **wanted: Any) -> dict[str, Any]:
        """The first row with these values from now on for which the condition holds."""
        start = len(self.tool.rows)
        found: list[dict[str, Any]] = []

        def look(rows: Rows) -> bool:
            found[:] = [
                row
                for row in rows[start:]
                if all(row[name] == value for name, value in wanted.items()) and condition(row)
            ]
            return bool(found)

        until(lambda: look(self.tool.rows), f"a row of {wanted}, the last was {self.tool.rows[-1:]}")
        return found[0]


@pytest.fixture(scope="module")
def table(site: Site) -> Iterator[Table]:
    with RunningTool("queue", "-i", "0.05", "--time", "elapsed", "--netns", str(site.lab.server.inode)) as tool:
        yield Table(tool)


@pytest.mark.parametrize(("option", "shown"), [("-4", {"4", "mapped"}), ("-6", {"6", "only6", "mapped"})])
def test_a_listener_of_both_families_is_of_each(
    site: Site, run_tool: type[RunningTool], option: str, shown: set[str]
) -> None:
    """Witness: to which of the listeners a client of that family gets."""
    kind = {"-4": socket.AF_INET, "-6": socket.AF_INET6}[option]
    with ExitStack() as stack:
        runs = {name: stack.enter_context(Run(site, name)) for name in ("4", "6", "mapped", "only6")}
        reached = set()
        for name, run in runs.items():
            client = stack.enter_context(run.client.socket(kind))
            if client.connect_ex((run.server.address(kind), run.port)) == 0:
                reached.add(name)
        lports = ",".join(str(run.port) for run in runs.values())
        with run_tool("queue", "-i", "0.05", option, "-L", lports, "--netns", str(site.lab.server.inode)) as tool:
            tool.wait_for(lambda rows: len(rows) >= 2 * len(shown))
    assert tool.done is not None
    assert {name for name, run in runs.items() if any(row["lport"] == run.port for row in tool.done.rows)} == shown
    assert reached == shown


def test_table_as_ss_and_the_counters_say(site: Site, table: Table) -> None:
    with Run(site, "mapped") as run:
        run.overflow_at_ack(4)
        run.end()
        at_ack = run.change("ListenOverflows")
        run.start(2)
        run.refused(at_ack + 2)
        run.end()
        counted = run.change("ListenOverflows")
        # The socket counts a refused ACK once more, when the packet is thrown away; as it does a RST for a request.
        row = table.when(
            lambda row: row["overflows"] in (counted, None) and row["drops"] >= counted + at_ack, lport=run.port
        )
        assert (row["accept_queue"], row["accept_limit"]) == accept_queue(run.server, run.port) == (6, 5)
        assert (row["laddr"], row["family"], row["netns"]) == ("::", 6, run.server.inode)
        assert row["limit_from"] == "listen()"
        assert row["cookie"] == cookie_of(run.listener)
        for name in ("somaxconn", "max_syn_backlog", "syncookies"):
            sysctl = name if name == "somaxconn" else f"tcp_{name}"
            assert row[name] == int(run.server.sysctl(sysctl))
        assert row["abort_on_overflow"] is False
        assert row["holders"] == [
            {"pid": os.getpid(), "comm": row["comm"], "uid": os.getuid(), "fd": run.listener.fileno()}
        ]
        if functions_cannot_be_hooked():
            assert row["overflows"] is row["overflows_at_syn"] is row["overflows_at_ack"] is row["cookies"] is None
        else:
            assert row["overflows"] == row["overflows_at_syn"] + row["overflows_at_ack"] == counted
            assert (row["overflows_at_syn"], row["overflows_at_ack"]) == (counted - at_ack, at_ack)
            assert row["syn_drops"] == row["cookies"] == 0


@pytest.mark.usefixtures("exact")
def test_table_of_a_full_syn_queue(site: Site, table: Table) -> None:
    with sysctls(site.lab.server, tcp_syncookies=0), Run(site, backlog=SMALL_BACKLOG) as run:
        flood(run, 20)
        row = table.when(lambda row: row["drops"] == row["syn_drops"] == run.change("ListenDrops"), lport=run.port)
        assert row["syn_queue"] == requests(run.server, run.port) == 20 - row["syn_drops"]
        assert row["syn_drops"] == row["drops"] == run.change("TCPReqQFullDrop")
    with Run(site, port=run.port) as run:
        flood(run, 20)
        row = table.when(lambda row: row["cookies"] == run.change("SyncookiesSent") > 0, lport=run.port)
        assert (row["drops"], row["syn_drops"]) == (0, 0)


def test_accepts_and_waiting(site: Site, table: Table) -> None:
    with Run(site) as run:
        row = table.when(lambda row: True, lport=run.port)
        assert (row["accepts"], row["since_accept_ms"], row["oldest_wait_ms"]) == (0, None, None)
        earliest = time.monotonic()
        run.connect(1)
        latest = time.monotonic()
        until(lambda: accept_queue(run.server, run.port)[0] == 1, "a connection that waits")
        run.connect(2)  # a younger one changes nothing
        row = table.when(lambda row: row["accept_queue"] == 3, lport=run.port)
        while time.monotonic() < latest + 0.2:
            row = table.when(lambda row: row["accept_queue"] == 3, lport=run.port)
        seen = time.monotonic()
        assert row["oldest_wait_ms"] <= (seen - earliest) * 1000
        run.connect(1)  # a row that shows it was taken after `seen`
        row = table.when(lambda row: row["accept_queue"] == 4, lport=run.port)
        assert row["oldest_wait_ms"] >= int((seen - latest) * 1000) - 1
        before = time.monotonic()
        for _ in range(4):
            run.listener.accept()[0].close()
        row = table.when(lambda row: (row["accepts"], row["accept_queue"]) == (4, 0), lport=run.port)
        assert row["oldest_wait_ms"] is None
        assert row["since_accept_ms"] <= (time.monotonic() - before) * 1000
        row = table.when(lambda row: row["accepts"] == 4 and row["since_accept_ms"] >= 100, lport=run.port)
        assert row["since_accept_ms"] <= (time.monotonic() - before) * 1000


def test_where_the_limit_comes_from(site: Site, table: Table) -> None:
    with sysctls(site.lab.server, somaxconn=64), Run(site, backlog=1000) as cut, Run(site, backlog=63) as own:
        row = table.when(lambda row: True, lport=cut.port)
        assert (row["accept_limit"], row["limit_from"], row["somaxconn"]) == (64, "somaxconn", 64)
        row = table.when(lambda row: True, lport=own.port)
        assert (row["accept_limit"], row["limit_from"]) == (63, "listen()")
        site.lab.server.sysctl("somaxconn", 10)
        row = table.when(lambda row: row["somaxconn"] == 10, lport=cut.port)
        assert (row["accept_limit"], row["limit_from"]) == (64, "listen(), before somaxconn was lowered")


def test_every_holder_is_named(site: Site, table: Table, run_tool: type[RunningTool]) -> None:
    """A listener of one process, inherited by another; and sockets that share a port, each with an owner."""
    port = next(ports)
    parent = Puppet(site.lab.server, "parent")
    parent.do(
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "s.bind(('0.0.0.0', port)); s.listen(7)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    open('/proc/self/comm', 'w').write('child'); time.sleep(1000)",
        port=port,
    )
    child = parent.ask("child")
    try:
        row = table.when(lambda row: {held["comm"] for held in row["holders"]} == {"parent", "child"}, lport=port)
        assert {(held["pid"], held["fd"]) for held in row["holders"]} == {
            (parent.pid, parent.ask("s.fileno()")),
            (child, parent.ask("s.fileno()")),
        }
        assert (row["pid"], row["comm"]) == min((held["pid"], held["comm"]) for held in row["holders"])
        with run_tool("queue", "-n", "1", "-p", str(child)) as tool:  # any holder will do, and all are shown
            (found,) = tool.wait().rows
        assert (found["lport"], len(found["holders"])) == (port, 2)
        second = Puppet(site.lab.server, "second")
        second.do(
            "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
            "s.bind(('0.0.0.0', port)); s.listen(9)",
            port=port,
        )
        row = table.when(lambda row: row["comm"] == "second", lport=port)
        assert (row["accept_limit"], len(row["holders"])) == (9, 1)
        parent.kill()
        row = table.when(lambda row: [held["comm"] for held in row["holders"]] == ["child"], lport=port)
        assert (row["accept_limit"], row["pid"]) == (7, child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_new_listener_does_not_inherit(site: Site, table: Table) -> None:
    port = next(ports)
    for _ in range(3):
        with Run(site, port=port) as run:
            row = table.when(lambda row: True, lport=port, cookie=cookie_of(run.listener))  # not a late one of the last
            assert (row["drops"], row["accepts"], row["since_accept_ms"]) == (0, 0, None)
            assert row["overflows"] in (0, None)
            assert row["accepts_per_s"] in (0.0, None)
            run.connect(3)
            for _ in range(3):
                run.listener.accept()[0].close()
            table.when(lambda row: row["accepts"] == 3, lport=port)


def test_refresh_on_a_terminal(site: Site) -> None:
    controller, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "tcpscope", "queue", "-i", "0.1", "--netns", str(site.lab.server.inode)]
    with Run(site) as run, subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as tool:
        os.close(terminal)
        shown = b""

        def pages() -> list[bytes]:
            nonlocal shown
            if select.select([controller], [], [], 0.1)[0]:
                shown += os.read(controller, 1 << 16)
            return shown.split(b"\x1b[H\x1b[J")[1:]

        try:
            until(lambda: len(pages()) > 3, "the table, drawn again and again")
            page = pages()[1].decode().replace("\r", "").splitlines()
            assert page[1].split()[:2] == ["LADDR", "LPORT"]
            assert any(run.laddr in line and str(run.port) in line for line in page[2:])
            assert max(map(len, page)) <= 80
            run.fill()
            until(lambda: b" 6 " in pages()[-2], "the full queue on the terminal")
            tool.send_signal(signal.SIGINT)
            assert tool.wait(DEADLINE) == 0
        finally:
            tool.kill()
            os.close(controller)
