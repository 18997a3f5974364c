"""The server's address is the fault, not the connects that it refuses."""

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import PORT
from tcpscope.lab.scenarios.wrong_address import WrongAddress
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings


@pytest.mark.root
def test_the_listener_is_named(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = WrongAddress()
    (finding,) = findings(lab, run_tool, scenario)
    outcome = scenario.outcome(lab)
    assert len(outcome.failed) == outcome.counters["TcpOutRsts"] == 12
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["netns"]) == ("wrong_address", "critical", lab.server.inode)
    assert (facts["lport"], facts["laddr"], facts["listens"]) == (PORT, lab.server.ipv4, ["127.0.0.1"])
    assert (facts["pids"], facts["count"]) == ([outcome.listener.pid], 12)
