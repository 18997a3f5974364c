"""`queue` against the kernel's own counters, `ss` and the test's clock.

One tool with --events watches the server of a lab for all tests of this file; each test has a listener and a port of
its own there. The listeners belong to this process unless a test says otherwise, and nobody accepts. A run is over
when the clients have been reset: nothing is sent any more, and the counters stand still.
"""

from __future__ import annotations

import itertools
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Host, Lab, held
from tcpscope.lab.packets import raw_socket, syn
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow
from tcpscope.lab.scenarios.accept_overflow_serial import AcceptOverflowSerial
from tests.conftest import DEADLINE, RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

FAMILIES = ("4", "6", "mapped")
BACKLOG = 5
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a RST
NOBODY = {socket.AF_INET: "198.51.100.0/24", socket.AF_INET6: "2001:db8:51::/64"}
SO_COOKIE, IPPROTO_MPTCP, TCP_FASTOPEN = 57, 262, 23

Rows = list[dict[str, Any]]
ports = itertools.count(9000)


def functions_cannot_be_hooked() -> bool:
    kernel = Kernel()
    return not kernel.fentry and not kernel.kprobe


exact = pytest.mark.skipif("functions_cannot_be_hooked()", reason="this kernel refuses fentry and has no kprobes")
sampled = pytest.mark.skipif("not functions_cannot_be_hooked()", reason="functions can be hooked: nothing is sampled")


class Site:
    """A lab, a tool that watches its server, and what has happened since."""

    def __init__(self, lab: Lab, tool: RunningTool) -> None:
        self.lab, self.tool = lab, tool
        self.all_before = Counter(lab.server.counters())

    def counted(self) -> int:
        """All refusals so far, by the tool."""
        return sum(row["count"] for row in self.tool.rows if row["cause"] != "COOKIE_SENT")

    def dropped(self) -> int:
        """All refusals so far, by the kernel."""
        name = "TcpExtListenDrops"
        return self.lab.server.counters()[name] - self.all_before[name]

    def rows(self, port: int, **wanted: Any) -> Rows:
        """The events of one listener of which these columns have these values."""
        return [
            row
            for row in self.tool.rows
            if row["lport"] == port and all(row[name] == value for name, value in wanted.items())
        ]


class Run:
    """A listener that nobody accepts from, and what its clients did; the counters since it was made."""

    def __init__(self, site: Site, family: str = "4", backlog: int = BACKLOG, port: int = 0, protocol: int = 0) -> None:
        self.site, self.server, self.client = site, site.lab.server, site.lab.client
        self.port = port or next(ports)
        self.kind = socket.AF_INET6 if family in ("6", "only6") else socket.AF_INET
        self.target = (self.server.address(self.kind), self.port)
        listens = socket.AF_INET if family == "4" else socket.AF_INET6
        self.laddr = "::" if family in ("mapped", "only6") else self.target[0]
        self.listener = self.server.socket(listens, protocol=protocol)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listens == socket.AF_INET6:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, family == "only6")
        self.listener.bind((self.laddr, self.port))
        self.listener.listen(backlog)
        self.clients: list[socket.socket] = []
        self.before = Counter(self.server.counters())

    def change(self, name: str) -> int:
        return self.server.counters()[f"TcpExt{name}"] - self.before[f"TcpExt{name}"]

    def start(self, number: int = 1) -> list[socket.socket]:
        """So many connects begin."""
        started = []
        for _ in range(number):
            made = self.client.socket(self.kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            made.setblocking(False)
            made.connect_ex(self.target)
            started.append(made)
        self.clients += started
        return started

    def connect(self, number: int = 1) -> list[socket.socket]:
        """So many connects succeed, one after the other, as the clients see it."""
        return [connected(made) for _ in range(number) for made in self.start()]

    def fill(self) -> None:
        """One more than the limit, and all of them wait for accept()."""
        self.connect(BACKLOG + 1)
        until(lambda: accept_queue(self.server, self.port) == (BACKLOG + 1, BACKLOG), "a full accept queue")

    def overflow_at_syn(self, number: int) -> None:
        """The queue is full; then so many SYNs come."""
        self.fill()
        before = self.change("ListenOverflows")
        self.start(number)
        self.refused(before + number)

    def overflow_at_ack(self, number: int) -> None:
        """So many handshakes more than fit are at their last step when the queue becomes full."""
        self.connect(BACKLOG)
        with held(self.server):
            late = self.start(number + 1)
            until(lambda: requests(self.server, self.port) == number + 1, "SYNs")
        for made in late:
            assert select.select([], [made], [], DEADLINE)[1], "no connection"
        self.refused(number)

    def refused(self, number: int) -> None:
        """Wait until at least so many handshakes were refused; slow clients may have tried again meanwhile."""
        until(lambda: self.change("ListenOverflows") >= number, f"{number} overflows")

    def end(self) -> None:
        """Reset the clients. What came before stays counted, and nothing comes any more."""
        for made in self.clients:
            made.close()

    def agree(self, *counters: str, **wanted: Any) -> Rows:
        """The events, as soon as they are as many as the counter says. That no more come is checked at the very end."""

        def same() -> bool:
            counted = sum(row["count"] for row in self.site.rows(self.port, **wanted))
            return all(counted == self.change(name) for name in counters)

        until(same, f"as many events as {' and '.join(counters)} say", 30)
        return self.site.rows(self.port, **wanted)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.end()
        if functions_cannot_be_hooked() and kind is None:
            # The last moment before it closes is in no sample.
            until(lambda: self.site.counted() == self.site.dropped(), "all drops in samples", 30)
        self.listener.close()


def cookie_of(made: socket.socket) -> int:
    (cookie,) = struct.unpack("Q", made.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return int(cookie)


def connected(made: socket.socket) -> socket.socket:
    assert select.select([], [made], [], DEADLINE)[1], "no connection"
    assert made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    return made


def requests(host: Host, port: int) -> int:
    return sum(found.state == "SYN_RECV" and found.lport == port for found in host.sockets())


def accept_queue(host: Host, port: int) -> tuple[int, int]:
    """Length and limit, as `ss -ltn` shows them."""
    child = host.spawn(["ss", "-Hltn", f"sport = :{port}"], stdout=subprocess.PIPE, text=True)
    (line,) = child.communicate(timeout=DEADLINE)[0].splitlines()
    _, length, limit, *_ = line.split()
    return int(length), int(limit)


@contextmanager
def sysctls(host: Host, **values: int) -> Iterator[None]:
    before = {name: host.sysctl(name) for name in values}
    for name, value in values.items():
        host.sysctl(name, value)
    yield
    for name, value in before.items():
        host.sysctl(name, value)


def flood(run: Run, number: int) -> None:
    """So many SYNs of peers that never answer. Returns when all have been handled."""
    run.client.blackhole(NOBODY[run.kind])
    network = NOBODY[run.kind].rpartition("/")[0]
    before = run.server.counters()["TcpInSegs"]
    with run.client.run(raw_socket, run.kind) as raw:
        for host in range(1, number + 1):
            source = f"{network}{host:x}" if run.kind == socket.AF_INET6 else f"{network[:-1]}{host}"
            raw.sendto(syn(source, 10_000, *run.target, 1_000_000), (run.target[0], 0))
    until(lambda: run.server.counters()["TcpInSegs"] >= before + number, "the SYNs to arrive")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab, RunningTool("queue", "--events", "--netns", str(lab.server.inode)) as tool:
        lab.server.sysctl("tcp_synack_retries", 5)
        lab.client.sysctl("tcp_syn_retries", 5)
        site = Site(lab, tool)
        yield site
        change = Counter(lab.server.counters())
        change.subtract(site.all_before)
        done = tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["seen"] == done.stats["shown"] == len(done.rows)
        assert done.stats["lost"] == done.stats["filtered"] == done.stats["table_full"] == done.stats["missed"] == 0
        causes: Counter[str] = Counter()
        for row in done.rows:
            causes[row["cause"]] += row["count"]
        # After all tests: not one event too many, not one too few.
        if not functions_cannot_be_hooked():
            assert causes["ACCEPT_QUEUE_FULL"] == change["TcpExtListenOverflows"]
            assert causes["SYN_QUEUE_FULL"] == change["TcpExtTCPReqQFullDrop"]
            assert causes["COOKIE_SENT"] == change["TcpExtSyncookiesSent"]
            assert causes.total() - causes["COOKIE_SENT"] == change["TcpExtListenDrops"]
        else:
            assert causes.total() == change["TcpExtListenDrops"]
            assert causes["ACCEPT_QUEUE_FULL"] <= change["TcpExtListenOverflows"]


# --- the accept queue -------------------------------------------------------------------------------------------------


def check_event(run: Run, row: dict[str, Any], family: int) -> None:
    assert row["netns"] == run.server.inode
    assert (row["laddr"], row["lport"], row["family"]) == (run.laddr, run.port, family)
    assert row["raddr"] == run.client.address(run.kind)
    assert row["rport"] in {made.getsockname()[1] for made in run.clients}
    assert (row["pid"], row["uid"]) == (os.getpid(), os.getuid())
    assert row["comm"] == Path("/proc/self/comm").read_text().strip()
    assert (row["accept_queue"], row["accept_limit"]) == (BACKLOG + 1, BACKLOG)
    assert row["syn_queue"] <= BACKLOG
    assert row["somaxconn"] == int(run.server.sysctl("somaxconn"))
    assert row["max_syn_backlog"] == int(run.server.sysctl("tcp_max_syn_backlog"))
    assert row["syncookies"] == int(run.server.sysctl("tcp_syncookies"))
    assert (row["cause"], row["answer"], row["count"]) == ("ACCEPT_QUEUE_FULL", "NONE", 1)


@exact
@pytest.mark.parametrize("family", FAMILIES)
def test_the_queue_is_full_at_the_syn(site: Site, family: str) -> None:
    with Run(site, family) as run:
        run.overflow_at_syn(3)
        assert accept_queue(run.server, run.port) == (6, 5)
        rows = run.agree("ListenOverflows", "ListenDrops")
        refused = {made.getsockname()[1] for made in run.clients[-3:]}
        assert {row["rport"] for row in rows} == refused
        for row in rows:
            check_event(run, row, 6 if family == "6" else 4)
            assert (row["step"], row["syn_queue"]) == ("SYN", 0)


@exact
@pytest.mark.parametrize("family", FAMILIES)
def test_the_queue_is_full_at_the_final_ack(site: Site, family: str) -> None:
    with Run(site, family) as run:
        run.overflow_at_ack(4)
        for made in run.clients:
            made.send(b"the server throws this away, too")
        run.refused(8)
        rows = run.agree("ListenOverflows", "ListenDrops")
        assert len({row["rport"] for row in rows}) == 4
        for row in rows:
            check_event(run, row, 6 if family == "6" else 4)
            assert row["step"] == "ACK"
            assert 4 <= row["syn_queue"] <= 5


@exact
def test_ten_runs_in_a_row_agree(site: Site) -> None:
    for number in range(10):
        acks = 1 + number % 4
        with Run(site, FAMILIES[number % 3]) as run:
            run.overflow_at_ack(acks)
            run.start(2)
            run.refused(acks + 2)
            run.end()
            rows = run.agree("ListenOverflows", "ListenDrops")
            steps = Counter(row["step"] for row in rows)
            assert steps["SYN"] >= 2
            assert steps["ACK"] >= acks


@exact
def test_scenario_a(site: Site) -> None:
    before = len(site.tool.rows)
    scenario = AcceptOverflow()
    outcome = scenario.run(site.lab, freeze=True)
    counted = outcome.counters["TcpExtListenOverflows"]
    rows = site.tool.wait_for(lambda rows: len(rows) - before >= counted)[before:]
    assert len(rows) == counted == outcome.counters["TcpExtListenDrops"]
    for row in rows:
        assert (row["pid"], row["comm"]) == (outcome.listener.pid, "lab-server")
        assert (row["laddr"], row["lport"]) == (outcome.listener.address, outcome.listener.port)
        assert (row["cause"], row["step"]) == ("ACCEPT_QUEUE_FULL", "ACK")
        assert (row["accept_queue"], row["accept_limit"]) == (6, 5)
        assert row["cookie"] == outcome.listener.cookie
    assert (outcome.listener.recv_q, outcome.listener.send_q) == (6, 5)
    kept = {found.rport for found in outcome.server_sockets if found.state == "SYN_RECV"}
    assert {row["rport"] for row in rows} == kept
    assert len(kept) == 4
    scenario.server.kill(), scenario.client.kill()
    site.lab.thaw()


@exact
def test_scenario_b(site: Site) -> None:
    before = len(site.tool.rows)
    scenario = AcceptOverflowSerial()
    outcome = scenario.run(site.lab)
    counted = outcome.counters["TcpExtListenOverflows"]
    rows = site.tool.wait_for(lambda rows: len(rows) - before >= counted)[before:]
    assert len(rows) == counted == outcome.counters["TcpExtListenDrops"]
    assert len(rows) == 1 + outcome.client_counters["TcpExtTCPSynRetrans"]
    for row in rows:
        assert (row["pid"], row["comm"]) == (outcome.listener.pid, "lab-server")
        assert (row["cause"], row["step"], row["answer"]) == ("ACCEPT_QUEUE_FULL", "SYN", "NONE")
        assert (row["accept_queue"], row["accept_limit"], row["syn_queue"]) == (6, 5, 0)
        assert row["rport"] == outcome.failed[0].local_port
    scenario.server.kill(), scenario.client.kill()


@exact
def test_a_reset_in_place_of_silence(site: Site) -> None:
    with sysctls(site.lab.server, tcp_abort_on_overflow=1), Run(site) as run:
        resets = run.server.counters()["TcpOutRsts"]
        run.overflow_at_ack(4)
        rows = run.agree("ListenOverflows")
        assert [row["step"] for row in rows] == ["ACK"] * 4
        assert [row["answer"] for row in rows] == ["RST"] * 4
        assert [row["abort_on_overflow"] for row in rows] == [True] * 4
        assert run.server.counters()["TcpOutRsts"] == resets + 4
        run.start(1)
        run.refused(5)
        run.clients[-1].close()
        for row in run.agree("ListenOverflows")[4:]:
            assert (row["step"], row["answer"]) == ("SYN", "NONE")  # a SYN never gets a RST
        assert run.server.counters()["TcpOutRsts"] == resets + 4


@exact
def test_the_final_ack_of_a_cookie(site: Site) -> None:
    """It finds the queue full like any other, but tcp_abort_on_overflow does not reach it."""
    with sysctls(site.lab.server, tcp_syncookies=2, tcp_abort_on_overflow=1), Run(site) as run:
        run.connect(BACKLOG)
        resets = run.server.counters()["TcpOutRsts"]
        cookies = run.change("SyncookiesSent")
        with held(run.server):
            late = run.start(4)
            until(lambda: run.change("SyncookiesSent") >= cookies + 4, "four cookies")
        for made in late:
            connected(made)
        run.refused(3)
        rows = run.agree("ListenOverflows", "ListenDrops", cause="ACCEPT_QUEUE_FULL")
        assert {(row["step"], row["answer"], row["syn_queue"]) for row in rows} == {("ACK", "NONE", 0)}
        assert run.server.counters()["TcpOutRsts"] == resets
        run.agree("SyncookiesSent", "TCPReqQFullDoCookies", cause="COOKIE_SENT")


@exact
def test_no_cookie_is_sent_when_both_queues_are_full(site: Site) -> None:
    """The kernel counts a cookie (TCPReqQFullDoCookies) before it looks at the accept queue and drops the SYN."""
    with sysctls(site.lab.server, tcp_syncookies=2), Run(site) as run:
        run.fill()
        run.start(2)
        run.refused(2)
        rows = run.agree("ListenOverflows", "ListenDrops", step="SYN", cause="ACCEPT_QUEUE_FULL")
        run.end()
        assert {row["answer"] for row in rows} == {"NONE"}
        assert len(run.agree("SyncookiesSent", cause="COOKIE_SENT")) == BACKLOG + 1
        assert run.change("TCPReqQFullDoCookies") == BACKLOG + 1 + run.change("ListenOverflows")


# --- the SYN queue ----------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("family", FAMILIES)
def test_without_cookies_syns_are_dropped(site: Site, family: str) -> None:
    with sysctls(site.lab.server, tcp_syncookies=0, tcp_max_syn_backlog=256), Run(site, family) as run:
        flood(run, 40)
        rows = run.agree("TCPReqQFullDrop", "ListenDrops")
        assert len(rows) == 40 - requests(run.server, run.port)
        assert {(row["cause"], row["step"], row["answer"]) for row in rows} == {("SYN_QUEUE_FULL", "SYN", "NONE")}
        assert {(row["syn_queue"], row["accept_queue"]) for row in rows} == {(requests(run.server, run.port), 0)}
        assert {row["syncookies"] for row in rows} == {0}
        assert len({row["raddr"] for row in rows}) == len(rows)


@exact
@pytest.mark.parametrize("family", FAMILIES)
def test_cookies_when_the_queue_is_full(site: Site, family: str) -> None:
    with sysctls(site.lab.server, tcp_syncookies=1), Run(site, family) as run:
        flood(run, 40)
        rows = run.agree("TCPReqQFullDoCookies", "SyncookiesSent")
        assert len(rows) == 40 - requests(run.server, run.port)
        assert {(row["cause"], row["step"], row["answer"]) for row in rows} == {("COOKIE_SENT", "SYN", "SYN_COOKIE")}
        assert run.change("ListenDrops") == 0


@exact
@pytest.mark.parametrize("family", FAMILIES)
def test_cookies_always(site: Site, family: str) -> None:
    with sysctls(site.lab.server, tcp_syncookies=2), Run(site, family) as run:
        flood(run, 20)
        rows = run.agree("TCPReqQFullDoCookies", "SyncookiesSent")
        assert len(rows) == 20
        assert {(row["cause"], row["answer"], row["syn_queue"]) for row in rows} == {("COOKIE_SENT", "SYN_COOKIE", 0)}


@exact
def test_the_last_quarter_is_reserved(site: Site) -> None:
    with sysctls(site.lab.server, tcp_syncookies=0, tcp_max_syn_backlog=16), Run(site, backlog=64) as run:
        flood(run, 40)
        rows = run.agree("ListenDrops")
        assert run.change("TCPReqQFullDrop") == run.change("ListenOverflows") == 0
        assert {(row["cause"], row["step"], row["answer"]) for row in rows} == {("SYN_QUEUE_RESERVED", "SYN", "NONE")}
        assert {row["syn_queue"] for row in rows} == {13}  # 16 - 13 is less than a quarter of 16
        assert len(rows) == 40 - 13


# --- events: what else can happen -------------------------------------------------------------------------------------


@exact
def test_stacks(site: Site, run_tool: type[RunningTool]) -> None:
    with Run(site) as run, run_tool("queue", "--events", "--stack", "-L", str(run.port)) as tool:
        run.overflow_at_ack(1)
        run.start()
        run.refused(2)
        rows = tool.wait_for(lambda rows: {"SYN", "ACK"} <= {row["step"] for row in rows})
        for row in rows:
            functions = [frame.partition("+")[0] for frame in row["stack"]]
            way = ["tcp_v4_do_rcv", "tcp_v4_rcv"] if row["step"] == "SYN" else ["tcp_check_req", "tcp_v4_rcv"]
            if row["step"] == "SYN":
                way = ["tcp_conn_request", "tcp_rcv_state_process", *way]
            assert [name for name in functions if name in way] == way  # innermost first
        assert any("tcp_conn_request" in frame for row in rows for frame in row["stack"])


@exact
def test_filters(site: Site, run_tool: type[RunningTool]) -> None:
    with Run(site) as run, Run(site) as other, ExitStack() as stack:
        run.fill(), other.fill()
        wanted = run.client.socket(run.kind)
        wanted.setblocking(False)
        wanted.bind(("0.0.0.0", 0))
        run.clients.append(wanted)
        rport = wanted.getsockname()[1]
        tools = [
            stack.enter_context(run_tool("queue", "--events", "--netns", str(run.server.inode), *words, ready=False))
            for words in (("-L", str(run.port)), ("-R", str(rport)), ("-p", str(os.getpid())), ("-p", "1"))
        ]
        for tool in tools:  # they start together
            tool.wait_until_ready()
        seen = run.change("ListenOverflows"), other.change("ListenOverflows")
        wanted.connect_ex(run.target)
        other.start()
        run.refused(seen[0] + 1), other.refused(seen[1] + 1)
        by_lport, by_rport, by_pid, nothing = tools
        by_lport.wait_for(bool), by_rport.wait_for(bool)
        by_pid.wait_for(lambda rows: {row["lport"] for row in rows} == {run.port, other.port})
        run.end(), other.end()
        for tool in tools:
            done = tool.stop()
            assert done.stats is not None
            assert done.stats["seen"] == done.stats["shown"] + done.stats["filtered"] >= 2
            assert done.stats["shown"] == len(done.rows)
        assert {row["lport"] for row in by_lport.done.rows} == {run.port}
        assert {row["rport"] for row in by_rport.done.rows} == {rport}
        assert nothing.done.rows == []


@exact
def test_a_listener_closes_and_another_one_opens(site: Site) -> None:
    """Both at the same port, and probably at the same address in the kernel: the second does not inherit anything."""
    before = site.lab.server.counters()["TcpExtListenOverflows"]
    with Run(site) as first:
        first.overflow_at_ack(2)
        first.listener.close()
        first.start(2)  # refused by a reset: nobody listens
    with Run(site, port=first.port) as second:
        second.overflow_at_syn(1)
        second.end()
        total = lambda: site.lab.server.counters()["TcpExtListenOverflows"] - before  # noqa: E731
        until(lambda: len(site.rows(first.port)) == total(), "all events")
        rows = site.rows(first.port)
        assert {row["step"] for row in rows[: -second.change("ListenOverflows")]} == {"ACK"}


@exact
def test_fast_open(site: Site) -> None:
    """A SYN with data makes a child inside of tcp_conn_request: the inner function is entered before the outer ends."""
    with sysctls(site.lab.server, tcp_fastopen=0x602), sysctls(site.lab.client, tcp_fastopen=0x5), Run(site) as run:
        run.listener.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
        for _ in range(BACKLOG + 3):
            made = run.client.socket(run.kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            made.setblocking(False)
            run.clients.append(made)
            with suppress(BlockingIOError):
                made.sendto(b"early", socket.MSG_FASTOPEN, run.target)
        run.refused(2)
        assert run.change("TCPFastOpenPassive") >= BACKLOG
        rows = run.agree("ListenOverflows", "ListenDrops")
        assert {(row["cause"], row["step"]) for row in rows} == {("ACCEPT_QUEUE_FULL", "SYN")}


@exact
def test_mptcp(site: Site, run_tool: type[RunningTool]) -> None:
    """The listener is a TCP socket that stands behind an MPTCP socket, which is what the process holds."""
    try:
        site.lab.server.socket(socket.AF_INET, protocol=IPPROTO_MPTCP).close()
    except OSError:
        assert not Kernel().has_type("mptcp_sock") or site.lab.server.sysctl("mptcp/enabled") == "0"
        pytest.skip("this kernel has no MPTCP")
    with Run(site, protocol=IPPROTO_MPTCP) as run:
        run.overflow_at_syn(2)
        for row in run.agree("ListenOverflows", "ListenDrops"):
            assert (row["step"], row["accept_queue"], row["pid"]) == ("SYN", 6, os.getpid())
        with run_tool("queue", "-L", str(run.port), "-n", "1") as tool:
            (row,) = tool.wait().rows
        assert (row["accept_queue"], row["accept_limit"], row["pid"]) == (6, 5, os.getpid())


@sampled
@pytest.mark.parametrize("family", FAMILIES)
def test_refusals_are_sampled(site: Site, family: str) -> None:
    with Run(site, family) as run, Run(site) as other:
        run.overflow_at_syn(2)
        for row in run.agree("ListenOverflows", "ListenDrops"):
            assert (row["laddr"], row["netns"], row["pid"]) == (run.laddr, run.server.inode, os.getpid())
            assert (row["accept_queue"], row["accept_limit"]) == (BACKLOG + 1, BACKLOG)
            assert (row["cause"], row["step"]) == ("ACCEPT_QUEUE_FULL", "SYN")
            assert row["answer"] is row["raddr"] is row["rport"] is None
        assert site.rows(other.port) == []
    assert "sampled" in site.tool.stderr


@sampled
def test_a_packet_that_is_thrown_away_is_no_refusal(site: Site) -> None:
    """A refused ACK counts twice in sk_drops, and the RST that ends its request once more."""
    with Run(site) as run, RunningTool("queue", "-i", "0.05", "-L", str(run.port)) as table:
        run.overflow_at_ack(4)
        rows = run.agree("ListenOverflows", "ListenDrops")
        counted = sum(row["count"] for row in rows)
        assert {row["cause"] for row in rows} == {"ACCEPT_QUEUE_FULL"}
        run.end()
        table.wait_for(lambda rows: rows[-1]["drops"] >= 2 * counted + 4)
        assert sum(row["count"] for row in run.agree("ListenOverflows", "ListenDrops")) == counted


@sampled
def test_a_full_syn_queue_is_sampled(site: Site) -> None:
    with sysctls(site.lab.server, tcp_syncookies=0), Run(site) as run, Run(site) as other:
        flood(run, 20), flood(other, 30)
        for each in (run, other):
            until(lambda each=each: sum(row["count"] for row in site.rows(each.port)) > 0, "samples")
        until(
            lambda: sum(row["count"] for each in (run, other) for row in site.rows(each.port))
            == run.change("TCPReqQFullDrop"),
            "as many as the counter says",
        )
        for each, sent in ((run, 20), (other, 30)):
            rows = site.rows(each.port)
            assert sum(row["count"] for row in rows) == sent - requests(each.server, each.port)
            assert {(row["cause"], row["step"]) for row in rows} == {("SYN_QUEUE_FULL", "SYN")}


@sampled
def test_the_next_socket_at_an_address_begins_anew(site: Site) -> None:
    """The count of drops goes back to zero with each new listener, and the kernel reuses its memory."""
    before = site.lab.server.counters()["TcpExtListenDrops"]
    port = next(ports)
    for number in (3, 1, 2):
        with Run(site, port=port) as run:
            run.overflow_at_syn(number)
            run.end()
            until(
                lambda: (
                    sum(row["count"] for row in site.rows(port))
                    == site.lab.server.counters()["TcpExtListenDrops"] - before
                ),
                "as many drops as there were",
            )


@sampled
@pytest.mark.parametrize("words", [("--rport", "1"), ("--stack",)])
def test_what_samples_do_not_know_is_refused(run_tool: type[RunningTool], words: tuple[str, ...]) -> None:
    with run_tool("queue", "--events", *words, ready=False) as tool:
        done = tool.wait()
    assert done.status == 3
    assert words[0] in done.stderr


# --- the table --------------------------------------------------------------------------------------------------------


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

        until(lambda: look(self.tool.rows), f"a row of {wanted}, the last was {self.tool.rows[-1:]}", 30)
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
        for made in run.clients:
            made.close()
        at_ack = run.change("ListenOverflows")
        run.start(2)
        run.refused(at_ack + 2)
        run.end()
        counted = run.change("ListenOverflows")
        row = table.when(lambda row: row["overflows"] in (counted, None), lport=run.port)
        # The socket counts a refused ACK once more, when the packet is thrown away; as it does a RST for a request.
        assert row["drops"] >= counted + at_ack
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


@exact
def test_table_of_a_full_syn_queue(site: Site, table: Table) -> None:
    with sysctls(site.lab.server, tcp_syncookies=0), Run(site) as run:
        flood(run, 20)
        row = table.when(lambda row: row["drops"] == run.change("ListenDrops"), lport=run.port)
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
        row = table.when(lambda row: row["accept_queue"] == 3, lport=run.port)
        assert row["oldest_wait_ms"] >= int((seen - latest) * 1000) - 1
        before = time.monotonic()
        for _ in range(3):
            run.listener.accept()[0].close()
        after = time.monotonic()
        row = table.when(lambda row: row["accepts"] == 3, lport=run.port)
        assert (row["accept_queue"], row["oldest_wait_ms"]) == (0, None)
        assert row["since_accept_ms"] <= (time.monotonic() - before) * 1000
        row = table.when(lambda row: row["accepts"] == 3, lport=run.port)
        until(lambda: time.monotonic() > after + 0.1, "time to pass")
        row = table.when(lambda row: row["accepts"] == 3, lport=run.port)
        assert 100 <= row["since_accept_ms"] <= (time.monotonic() - before) * 1000


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
        row = table.when(lambda row: row["accept_limit"] == 7 and row["pid"] == child, lport=port)
        assert [held["comm"] for held in row["holders"]] == ["child"]
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
