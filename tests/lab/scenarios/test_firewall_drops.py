"""A firewall at either end: it is the finding, and not the connects that fail for it."""

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import PORT
from tcpscope.lab.scenarios.firewall_drops import FirewallDrops
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings
from tests.played_again import seen


@pytest.mark.root
@pytest.mark.parametrize("hook", ["input", "output"])
@seen
def test_the_firewall_is_named(lab: Lab, run_tool: type[RunningTool], hook: str) -> None:
    scenario = FirewallDrops(hook=hook, clients=5)
    (finding,) = findings(lab, run_tool, scenario)
    outcome = scenario.outcome(lab)
    assert len(outcome.failed) == 5
    assert (finding["rule"], finding["severity"]) == ("firewall_drops", "critical")
    facts = finding["facts"]
    assert facts["netns"] == (lab.server if hook == "input" else lab.client).inode
    assert facts["count"] == 5 + outcome.client_counters["TcpExtTCPSynRetrans"]
    assert facts["lport" if hook == "input" else "rport"] == PORT
