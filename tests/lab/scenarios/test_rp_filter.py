"""The way back is another one: rp_filter is the finding, and not the connects that fail for it."""

import shlex
import subprocess

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import PORT
from tcpscope.lab.scenarios.rp_filter import RpFilter
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings
from tests.played_again import seen


@pytest.mark.root
@seen
def test_rp_filter_is_named(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = RpFilter()
    (finding,) = findings(lab, run_tool, scenario)
    outcome = scenario.outcome(lab)
    facts = finding["facts"]
    assert (finding["rule"], facts["netns"], facts["what"]) == ("rp_filter", lab.server.inode, "SYNs")
    assert facts["count"] == outcome.counters["TcpExtIPReversePathFilter"] >= 2 * scenario.clients
    assert facts["ports"] == {str(PORT): facts["count"]}
    subprocess.run(shlex.split(finding["remedies"][0]["command"]), check=True, capture_output=True)
    scenario.connect(1)
    assert [client.errno for client in scenario.connected(1)] == [0]
