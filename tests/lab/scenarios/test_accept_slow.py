"""A server accepts ten connections a second, and twenty come."""

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.accept_slow import AcceptSlow
from tests.conftest import RunningTool
from tests.lab.scenarios.found import diagnosed

pytestmark = pytest.mark.root


def test_it_is_found(lab: Lab, run_tool: type[RunningTool]) -> None:
    outcome, found = diagnosed(AcceptSlow(), lab, run_tool)
    assert outcome.counters["TcpExtListenOverflows"] > 0
    (finding,) = found
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("accept_slow", "critical")
    assert 0 < facts["refused"] <= lab.server.counters()["TcpExtListenOverflows"]  # SYNs are sent again until the end
    assert 4 < facts["accepts_per_s"] < 12
    assert facts["pids"] == [outcome.listener.pid]
    assert [remedy["proposed"] for remedy in finding["remedies"]] == [None]
