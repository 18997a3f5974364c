"""somaxconn cuts a backlog: a burst that nearly fills the queue, and one that is more than it holds."""

import shlex
import subprocess

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.backlog_cut import BacklogCut
from tests.conftest import RunningTool
from tests.lab.scenarios.found import diagnosed

pytestmark = pytest.mark.root


def test_it_is_found(lab: Lab, run_tool: type[RunningTool]) -> None:
    outcome, found = diagnosed(BacklogCut(), lab, run_tool)
    assert len(outcome.connected) == 9
    assert outcome.counters["TcpExtListenOverflows"] == 0
    (finding,) = found
    assert (finding["rule"], finding["severity"]) == ("backlog_cut", "info")
    assert finding["facts"]["accept_limit"] == outcome.listener.send_q == 8
    somaxconn, backlog = finding["remedies"]
    assert (somaxconn["name"], backlog["name"]) == ("net.core.somaxconn", "listen() backlog")
    subprocess.run(shlex.split(somaxconn["command"]), check=True)
    assert lab.server.sysctl("somaxconn") == str(somaxconn["proposed"])
