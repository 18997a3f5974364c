"""Connections that end in a wrong way, or not at all: what diagnose says of each scenario, and nothing else."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.close_wait_leak import CloseWaitLeak
from tcpscope.lab.scenarios.closed_unread import ClosedUnread
from tcpscope.lab.scenarios.ends_by_timeout import EndsByTimeout
from tcpscope.lab.scenarios.orphans import Orphans
from tcpscope.lab.scenarios.reset_in_request import ResetInRequest
from tcpscope.lab.scenarios.worker_hangs import WorkerHangs
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings
from tests.played_again import seen

pytestmark = pytest.mark.root


def test_reset_in_request(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = ResetInRequest()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["count"]) == ("reset_in_request", 12)
    assert finding["facts"]["sent_by"] == scenario.server.pid


def test_closed_unread(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = ClosedUnread()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["count"]) == ("closed_unread", 12)
    assert finding["facts"]["pids"] == [scenario.server.pid]


def test_close_wait_leak(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = CloseWaitLeak()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["pid"]) == ("close_wait_leak", scenario.server.pid)
    assert finding["facts"]["count"] > 12


def test_worker_hangs(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = WorkerHangs()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["pid"]) == ("worker_hangs", scenario.server.pid)
    assert finding["facts"]["left"] == scenario.clients


@seen
def test_ends_by_timeout(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = EndsByTimeout()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["keepalive"], finding["facts"]["timeouts"]) == ("ends_by_timeout", 3, 3)
    assert {program.pid for program, _ in scenario.ends} == set(finding["facts"]["pids"])


def test_orphans(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = Orphans()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["count"]) == ("orphans", 20)
    remedy = finding["remedies"][0]
    assert (remedy["present"], remedy["proposed"]) == (300, 60)
    subprocess.run(shlex.split(remedy["command"]), check=True, capture_output=True)
    assert small_ones(lab) == 0
    scenario.act(lab)
    assert small_ones(lab) == 20


def small_ones(lab: Lab) -> int:
    """Timewait sockets of the server, in FIN_WAIT2 or TIME_WAIT."""
    text = lab.server.run(Path("/proc/thread-self/net/sockstat").read_text)
    (words,) = (line.split() for line in text.splitlines() if line.startswith("TCP:"))
    return int(words[words.index("tw") + 1])


def test_timewait_sockets_are_no_orphans(lab: Lab, run_tool: type[RunningTool]) -> None:
    assert findings(lab, run_tool, Orphans(fin_timeout=60)) == []
