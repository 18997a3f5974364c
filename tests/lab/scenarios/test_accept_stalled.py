"""A server is stopped, or has no file descriptors left: its clients connect, and nobody accepts them."""

import shlex
import subprocess

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenarios.accept_stalled import AcceptStalled
from tests.conftest import RunningTool
from tests.lab.scenarios.found import diagnosed

pytestmark = pytest.mark.root


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_found(lab: Lab, run_tool: type[RunningTool], workers: int) -> None:
    scenario = AcceptStalled(workers=workers, clients=16, seconds=4, backlog=32)
    outcome, found = diagnosed(scenario, lab, run_tool)
    assert len(outcome.connected) == 16
    assert outcome.server_states["CLOSE_WAIT"] >= outcome.listener.recv_q
    (finding,) = found
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("accept_stalled", "critical")
    assert (facts["states"], facts["stuck_pids"]) == (["T"], [scenario.server.pid])
    assert (facts["sockets"], facts["stuck_sockets"]) == (workers, 1)
    assert facts["count"] == scenario.waiting(lab) > 0
    (command,) = (remedy["command"] for remedy in finding["remedies"])
    subprocess.run(shlex.split(command), check=True)
    until(lambda: scenario.waiting(lab) == 0, "the server to go on")


def test_more_file_descriptors_end_it(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = AcceptStalled(cause="files", clients=8)
    _, found = diagnosed(scenario, lab, run_tool)
    (finding,) = found
    facts, (remedy,) = finding["facts"], finding["remedies"]
    assert (finding["rule"], facts["stuck_pids"]) == ("accept_stalled", [scenario.server.pid])
    assert facts["count"] == scenario.waiting(lab) == 8 - 1  # accept() had its descriptor before it waited
    assert remedy["proposed"] == 2 * remedy["present"]
    subprocess.run(shlex.split(remedy["command"]), check=True)
    until(lambda: scenario.waiting(lab) == 0, "the server to go on")
