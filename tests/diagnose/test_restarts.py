"""`diagnose` while network namespaces come and go: the kernel gives inode numbers and addresses of sockets again."""

from __future__ import annotations

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow
from tests.conftest import RunningTool

pytestmark = pytest.mark.kernel

TIMES = 3


def test_each_namespace_has_its_own_numbers(run_tool: type[RunningTool]) -> None:
    refused = {}
    with run_tool("diagnose", "--comm", "lab-server", "-d", "600") as tool:
        for _ in range(TIMES):
            with Lab() as lab:
                scenario = AcceptOverflow(synack_retries=5)  # requests live for a minute
                scenario.setup(lab)
                scenario.fault(lab)
                lab.server.sysctl("tcp_synack_retries", 0)  # no longer
                outcome = scenario.settle(lab)
                refused[outcome.listener.pid] = outcome.counters["TcpExtListenOverflows"]
    assert tool.done is not None
    summary = tool.done.rows[-1]["summary"]
    rules = "accept_queue", "accept_stalled"  # the same, when it lasts
    found = {row["facts"]["pids"][0]: row for row in summary["findings"] if row["rule"] in rules}
    assert found.keys() >= refused.keys()
    for pid, number in refused.items():
        assert 0 < found[pid]["facts"]["refused"] <= number
        assert "+-" not in "".join(found[pid]["observed"])
