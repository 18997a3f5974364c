"""`queue --events` where functions can be hooked: each refusal, against the kernel's own counters."""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import held
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow
from tcpscope.lab.scenarios.accept_overflow_serial import AcceptOverflowSerial
from tests.conftest import RunningTool, until
from tests.tools.queue.site import (
    BACKLOG,
    FAMILIES,
    IPPROTO_MPTCP,
    RESET,
    SMALL_BACKLOG,
    TCP_FASTOPEN,
    Run,
    Site,
    accept_queue,
    connected,
    cookie_of,
    flood,
    requests,
    sysctls,
)

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("exact")]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_queue_is_full_at_the_syn(site: Site, family: str) -> None:
    with Run(site, family) as run:
        run.overflow_at_syn(3)
        assert accept_queue(run.server, run.port) == (6, 5)
        refused = {made.getsockname()[1] for made in run.clients[-3:]}
        until(lambda: {row["rport"] for row in site.rows(run.port)} == refused, "each of the three")
        rows = run.agree("ListenOverflows", "ListenDrops")
        for row in rows:
            check_event(run, row, 6 if family == "6" else 4)
            assert (row["step"], row["syn_queue"]) == ("SYN", 0)


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


def test_ten_runs_in_a_row_agree(site: Site) -> None:
    for number in range(10):
        acks = 1 + number % 4
        with Run(site, FAMILIES[number % 3]) as run:
            run.overflow_at_ack(acks)
            late = {made.getsockname()[1] for made in run.start(2)}
            until(lambda run=run, late=late: late <= {row["rport"] for row in site.rows(run.port, step="SYN")}, "SYNs")
            run.end()
            rows = run.agree("ListenOverflows", "ListenDrops")
            steps = Counter(row["step"] for row in rows)
            assert steps["SYN"] >= 2
            assert steps["ACK"] >= acks


def test_scenario_a(site: Site) -> None:
    scenario = AcceptOverflow(synack_retries=5)
    outcome = scenario.run(site.lab, freeze=True)
    counted = outcome.counters["TcpExtListenOverflows"]
    events = lambda: site.rows(outcome.listener.port, cookie=outcome.listener.cookie)  # noqa: E731
    until(lambda: len(events()) >= counted, "all events")
    rows = events()
    assert len(rows) == counted == outcome.counters["TcpExtListenDrops"]
    for row in rows:
        assert (row["pid"], row["comm"]) == (outcome.listener.pid, "lab-server")
        assert (row["laddr"], row["lport"]) == (outcome.listener.address, outcome.listener.port)
        assert (row["cause"], row["step"]) == ("ACCEPT_QUEUE_FULL", "ACK")
        assert (row["accept_queue"], row["accept_limit"]) == (6, 5)
    assert (outcome.listener.recv_q, outcome.listener.send_q) == (6, 5)
    kept = {found.rport for found in outcome.server_sockets if found.state == "SYN_RECV"}
    assert {row["rport"] for row in rows} == kept
    assert len(kept) == 4
    scenario.server.kill(), scenario.client.kill()
    site.lab.thaw()


def test_scenario_b(site: Site) -> None:
    scenario = AcceptOverflowSerial()
    repeated: list[int] = []  # after each step; the last two are the sixth and the seventh connect
    scenario.on_step = lambda step: repeated.append(site.lab.client.counters()["TcpExtTCPSynRetrans"])
    with sysctls(site.lab.client, tcp_syn_retries=5):  # the scenario sets it
        outcome = scenario.run(site.lab)
    counted = outcome.counters["TcpExtListenOverflows"]
    events = lambda: site.rows(outcome.listener.port, cookie=outcome.listener.cookie)  # noqa: E731
    until(lambda: len(events()) >= counted, "all events")
    rows = events()
    assert len(rows) == counted == outcome.counters["TcpExtListenDrops"]
    assert len(rows) == 1 + repeated[-1] - repeated[-2]
    for row in rows:
        assert (row["pid"], row["comm"]) == (outcome.listener.pid, "lab-server")
        assert (row["cause"], row["step"], row["answer"]) == ("ACCEPT_QUEUE_FULL", "SYN", "NONE")
        assert (row["accept_queue"], row["accept_limit"], row["syn_queue"]) == (6, 5, 0)
        assert row["rport"] == outcome.failed[0].local_port
    scenario.server.kill(), scenario.client.kill()


def test_a_reset_in_place_of_silence(site: Site) -> None:
    with sysctls(site.lab.server, tcp_abort_on_overflow=1), Run(site) as run:
        run.overflow_at_ack(4)
        rows = run.agree("ListenOverflows")
        assert [row["step"] for row in rows] == ["ACK"] * 4
        assert [row["answer"] for row in rows] == ["RST"] * 4
        assert [row["abort_on_overflow"] for row in rows] == [True] * 4
        until(lambda: run.change("EmbryonicRsts") == 4, "four resets")
        (late,) = run.start(1)
        run.refused(5)
        for row in run.agree("ListenOverflows")[4:]:
            assert (row["step"], row["answer"]) == ("SYN", "NONE")  # a SYN never gets a RST
        lport = late.getsockname()[1]
        again = lambda: any(s.lport == lport and s.retransmits for s in run.client.sockets())  # noqa: E731
        until(again, "its SYN once more, which a RST would have prevented")
        assert run.change("EmbryonicRsts") == 4


def test_the_final_ack_of_a_cookie(site: Site) -> None:
    """It finds the queue full like any other, but tcp_abort_on_overflow does not reach it."""
    with sysctls(site.lab.server, tcp_syncookies=2, tcp_abort_on_overflow=1), Run(site) as run:
        run.wait(BACKLOG)
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


def test_no_cookie_is_sent_when_both_queues_are_full(site: Site) -> None:
    """The kernel counts a cookie (TCPReqQFullDoCookies) before it looks at the accept queue and drops the SYN."""
    with sysctls(site.lab.server, tcp_syncookies=2), Run(site) as run:
        run.fill()
        run.start(2)
        run.refused(2)
        rows = run.agree("ListenOverflows", "ListenDrops", step="SYN", cause="ACCEPT_QUEUE_FULL")
        run.end()
        assert {row["answer"] for row in rows} == {"NONE"}
        cookies = len(run.agree("SyncookiesSent", cause="COOKIE_SENT"))
        assert cookies >= BACKLOG + 1  # more where a SYN came twice
        assert run.change("TCPReqQFullDoCookies") == cookies + run.change("ListenOverflows")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_cookies_syns_are_dropped(site: Site, family: str) -> None:
    with sysctls(site.lab.server, tcp_syncookies=0, tcp_max_syn_backlog=256), Run(site, family, SMALL_BACKLOG) as run:
        flood(run, 40)
        rows = run.agree("TCPReqQFullDrop", "ListenDrops")
        assert len(rows) == 40 - requests(run.server, run.port)
        assert {(row["cause"], row["step"], row["answer"]) for row in rows} == {("SYN_QUEUE_FULL", "SYN", "NONE")}
        assert {(row["syn_queue"], row["accept_queue"]) for row in rows} == {(requests(run.server, run.port), 0)}
        assert {row["syncookies"] for row in rows} == {0}
        assert len({row["raddr"] for row in rows}) == len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_cookies_when_the_queue_is_full(site: Site, family: str) -> None:
    with sysctls(site.lab.server, tcp_syncookies=1), Run(site, family, SMALL_BACKLOG) as run:
        flood(run, 40)
        rows = run.agree("TCPReqQFullDoCookies", "SyncookiesSent")
        assert len(rows) == 40 - requests(run.server, run.port)
        assert {(row["cause"], row["step"], row["answer"]) for row in rows} == {("COOKIE_SENT", "SYN", "SYN_COOKIE")}
        assert run.change("ListenDrops") == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_cookies_always(site: Site, family: str) -> None:
    with sysctls(site.lab.server, tcp_syncookies=2), Run(site, family) as run:
        flood(run, 20)
        rows = run.agree("TCPReqQFullDoCookies", "SyncookiesSent")
        assert len(rows) == 20
        assert {(row["cause"], row["answer"], row["syn_queue"]) for row in rows} == {("COOKIE_SENT", "SYN_COOKIE", 0)}


def test_the_last_quarter_is_reserved(site: Site) -> None:
    with sysctls(site.lab.server, tcp_syncookies=0, tcp_max_syn_backlog=16), Run(site, backlog=64) as run:
        flood(run, 40)
        rows = run.agree("ListenDrops")
        assert run.change("TCPReqQFullDrop") == run.change("ListenOverflows") == 0
        assert {(row["cause"], row["step"], row["answer"]) for row in rows} == {("SYN_QUEUE_RESERVED", "SYN", "NONE")}
        assert {row["syn_queue"] for row in rows} == {13}  # 16 - 13 is less than a quarter of 16
        assert len(rows) == 40 - 13


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


def test_a_listener_closes_and_another_one_opens(site: Site) -> None:
    """Both at the same port, and probably at the same address in the kernel: the second does not inherit anything."""
    before = site.lab.server.counters()["TcpExtListenOverflows"]
    with Run(site) as first:
        first.overflow_at_ack(2)
        cookie = cookie_of(first.listener)
        first.listener.close()
        first.start(2)  # refused by a reset: nobody listens
    with Run(site, port=first.port) as second:
        second.overflow_at_syn(1)
        second.end()
        total = lambda: site.lab.server.counters()["TcpExtListenOverflows"] - before  # noqa: E731
        until(lambda: len(site.rows(first.port)) == total(), "all events")
        assert {row["step"] for row in site.rows(first.port, cookie=cookie)} == {"ACK"}
        assert {row["step"] for row in site.rows(first.port, cookie=cookie_of(second.listener))} == {"SYN"}


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
