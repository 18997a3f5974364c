"""A lab and a tool that watches it, for all tests of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool
from tests.lacks import functions_cannot_be_hooked
from tests.tools.queue.site import Site


@pytest.fixture(scope="module")
def exact() -> None:
    if functions_cannot_be_hooked():
        pytest.skip("this kernel refuses fentry and has no kprobes")


@pytest.fixture(scope="module")
def sampled() -> None:
    if not functions_cannot_be_hooked():
        pytest.skip("functions can be hooked: nothing is sampled")


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
