"""A server's answers are lost: no handshake is completed."""

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.answers_lost import AnswersLost
from tests.conftest import RunningTool
from tests.lab.scenarios.found import diagnosed
from tests.played_again import seen

pytestmark = pytest.mark.root


@pytest.mark.parametrize("family", ["4", "6"])
@seen
def test_it_is_found(lab: Lab, run_tool: type[RunningTool], family: str) -> None:
    outcome, found = diagnosed(AnswersLost(family=family), lab, run_tool)
    assert outcome.counters["TcpPassiveOpens"] == 0
    assert outcome.server_states["SYN_RECV"] == 8
    (finding,) = found
    facts = finding["facts"]
    assert (finding["rule"], facts["kind"], facts["count"]) == ("synack_unanswered", "lost", 8)
    assert facts["raddr"] == (lab.client.ipv6 if family == "6" else lab.client.ipv4)
    assert facts["pid"] == outcome.listener.pid
    assert facts["raddr"] in finding["remedies"][0]["command"]
