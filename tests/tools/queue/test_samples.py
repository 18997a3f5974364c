"""`queue --events` where functions cannot be hooked: refusals by samples, against the kernel's own counters."""

from __future__ import annotations

import os

import pytest

from tests.conftest import RunningTool, until
from tests.tools.queue.site import (
    BACKLOG,
    FAMILIES,
    SMALL_BACKLOG,
    Run,
    Site,
    flood,
    ports,
    requests,
    sysctls,
)

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("sampled")]


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


def test_a_packet_that_is_thrown_away_is_no_refusal(site: Site) -> None:
    """A refused ACK counts twice in sk_drops, and the RST that ends its request once more."""
    with Run(site) as run, RunningTool("queue", "-i", "0.05", "-L", str(run.port)) as table:
        run.overflow_at_ack(4)
        run.end()
        rows = run.agree("ListenOverflows", "ListenDrops")
        counted = sum(row["count"] for row in rows)
        assert {row["cause"] for row in rows} == {"ACCEPT_QUEUE_FULL"}
        table.wait_for(lambda rows: rows and rows[-1]["drops"] >= 2 * counted + 4)
        assert sum(row["count"] for row in run.agree("ListenOverflows", "ListenDrops")) == counted


def test_a_full_syn_queue_is_sampled(site: Site) -> None:
    small = {"backlog": SMALL_BACKLOG}
    with sysctls(site.lab.server, tcp_syncookies=0), Run(site, **small) as run, Run(site, **small) as other:
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


@pytest.mark.parametrize("words", [("--rport", "1"), ("--stack",)])
def test_what_samples_do_not_know_is_refused(run_tool: type[RunningTool], words: tuple[str, ...]) -> None:
    with run_tool("queue", "--events", *words, ready=False) as tool:
        done = tool.wait()
    assert done.status == 3
    assert words[0] in done.stderr
