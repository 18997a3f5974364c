"""Requests in two writes wait for delayed ACKs: diagnose names who writes them."""

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.nagle import Nagle
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings


@pytest.mark.root
def test_who_writes_in_two_parts_is_named(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = Nagle()
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["pid"]) == ("nagle", scenario.client.pid)
    assert finding["remedies"][0]["name"] == "TCP_NODELAY"


@pytest.mark.root
def test_with_tcp_nodelay_nothing_is_found(lab: Lab, run_tool: type[RunningTool]) -> None:
    assert findings(lab, run_tool, Nagle(nodelay=1)) == []
