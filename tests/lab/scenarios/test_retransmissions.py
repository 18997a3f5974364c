"""Experiment G: what is sent again, told apart. ESTABLISHED: the way lost it. SYN_SENT: no listener took it."""

from __future__ import annotations

from collections import Counter

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Outcome, Scenario
from tcpscope.lab.scenarios.accept_overflow_serial import AcceptOverflowSerial
from tcpscope.lab.scenarios.lossy_path import LossyPath
from tests.conftest import RunningTool, until
from tests.played_again import seen

pytestmark = pytest.mark.kernel


def sent_again(lab: Lab, run_tool: type[RunningTool], scenario: Scenario) -> tuple[list[dict], Outcome]:
    """The rows of the client, and the outcome at the end."""
    scenario.setup(lab)
    with run_tool("retrans", "--netns", str(lab.client.inode)) as tool:
        scenario.fault(lab)
        open_ = lambda: [found for found in lab.client.sockets() if found.state == "ESTABLISHED"]  # noqa: E731
        until(lambda: not any(found.send_q for found in open_()), "everything to arrive")
        outcome = scenario.settle(lab)
    assert tool.done and tool.done.stats and tool.done.stats["lost"] == 0
    assert {row["pid"] for row in tool.done.rows} == {scenario.client.pid}
    return tool.done.rows, outcome


@seen
def test_loss_on_the_way(lab: Lab, run_tool: type[RunningTool]) -> None:
    rows, outcome = sent_again(lab, run_tool, LossyPath(seconds=3, one_in=10))
    counters = outcome.client_counters
    kinds: Counter[str] = Counter()
    for row in rows:
        if row["errno"] in ("none", None) and row["kind"] != "SPURIOUS":
            kinds[row["kind"]] += row["segs"]
    assert {row["state"] for row in rows} == {"ESTABLISHED"}
    assert kinds.total() == counters["TcpRetransSegs"] > 10
    assert kinds["FAST"] > 0
    assert kinds["LOSS_PROBE"] <= counters["TcpExtTCPLossProbes"]  # a probe may send new data
    assert kinds["SYN"] == counters["TcpExtTCPSynRetrans"] == 0
    assert len({row["lport"] for row in rows}) == 3


@seen
def test_a_full_queue(lab: Lab, run_tool: type[RunningTool]) -> None:
    rows, outcome = sent_again(lab, run_tool, AcceptOverflowSerial())
    refused = {client.local_port for client in outcome.failed}
    found = Counter((row["state"], row["kind"]) for row in rows if row["lport"] in refused)
    again = outcome.client_counters["TcpExtTCPSynRetrans"]  # since 6.5 more than tcp_syn_retries: linear timeouts
    assert found == {("SYN_SENT", "SYN"): again} and again >= 1
