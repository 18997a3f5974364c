"""A server is stopped: diagnose names it, once, and is silent while it reads."""

import shlex
import subprocess

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenarios.zero_window import ZeroWindow
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings


@pytest.mark.root
def test_the_stopped_server_is_named_and_goes_on(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = ZeroWindow()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["pid"]) == ("zero_window", scenario.server.pid)
    assert finding["facts"]["unread_bytes"] == scenario.unread(lab)
    assert finding["remedies"][0]["command"] == f"kill -CONT {scenario.server.pid}"
    before = lab.server.counters()["TcpInSegs"]
    subprocess.run(shlex.split(finding["remedies"][0]["command"]), check=True)
    until(lambda: lab.server.counters()["TcpInSegs"] > before + 100, "the upload to go on")


@pytest.mark.root
def test_a_transfer_that_goes_on_is_no_fault(lab: Lab, run_tool: type[RunningTool]) -> None:
    assert findings(lab, run_tool, ZeroWindow(stop=0)) == []
