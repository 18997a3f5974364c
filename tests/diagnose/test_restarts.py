"""`diagnose` while network namespaces come and go: the kernel gives inode numbers and addresses of sockets again."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow
from tcpscope.lab.scenarios.full_device_queue import FullDeviceQueue
from tests.conftest import RunningTool

pytestmark = pytest.mark.root

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


def test_counters_of_a_namespace_that_begins_later(run_tool: type[RunningTool]) -> None:
    """Without them it would not be known of how many segments these were discarded, and nothing found.

    If another namespace had its number when the watch began, it may be that one. A note says so: it is played again.
    """
    for _ in range(TIMES):
        with ExitStack() as stack, run_tool("diagnose", "--comm", "lab-client", "-d", "600") as tool:
            lab = stack.enter_context(Lab())  # it ends after the tool
            scenario = FullDeviceQueue()
            scenario.run(lab)
        assert tool.done is not None
        summary, own = tool.done.rows[-1]["summary"], lab.client.inode
        if not any(str(own) in note for note in summary["notes"]):
            break
    found = [each for each in summary["findings"] if each["facts"]["netns"] == own]
    assert [each["rule"] for each in found] == ["host_queue_full"], summary
    assert found[0]["facts"]["sent"] >= found[0]["facts"]["discarded"]
