"""Three ways in which connects fail, each told apart, at the client."""

import errno

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import PORT
from tcpscope.lab.scenarios.connects_fail import CLOSED, NOBODY, ConnectsFail
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings
from tests.played_again import seen

ERRNOS = {"refused": errno.ECONNREFUSED, "filtered": errno.ETIMEDOUT, "dead": errno.ETIMEDOUT}


@pytest.mark.root
@pytest.mark.parametrize("answer", ["refused", "filtered", "dead"])
@seen
def test_the_client_is_told_why(lab: Lab, run_tool: type[RunningTool], answer: str) -> None:
    scenario = ConnectsFail(answer=answer)
    (finding,) = findings(lab, run_tool, scenario)
    outcome = scenario.outcome(lab)
    assert [client.errno for client in outcome.clients] == [ERRNOS[answer]] * 8
    assert outcome.client_counters["TcpAttemptFails"] == 8
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["netns"]) == ("connects_fail", "critical", lab.client.inode)
    assert (facts["failed"], facts["waiting"], facts["attempts"]) == (8, 0, 8)
    assert (facts["raddr"], facts["rports"]) == (NOBODY if answer == "dead" else lab.server.ipv4, [CLOSED])
    assert facts["comm"] == "lab-client"
    assert facts["answers"] == ([PORT] if answer == "filtered" else [])
