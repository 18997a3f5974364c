"""Local ports that are used up, by open connections or in TIME_WAIT."""

import errno
import subprocess

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.no_local_ports import NoLocalPorts
from tests.conftest import RunningTool, until
from tests.lab.scenarios.diagnosed import findings


@pytest.mark.root
@pytest.mark.parametrize("cause", ["open", "time-wait"])
def test_who_has_the_ports(lab: Lab, run_tool: type[RunningTool], cause: str) -> None:
    scenario = NoLocalPorts(cause=cause)
    (finding,) = findings(lab, run_tool, scenario)
    outcome = scenario.outcome(lab)
    assert [client.errno for client in outcome.failed] == [errno.EADDRNOTAVAIL] * 5
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"], facts["netns"]) == ("no_local_ports", "critical", lab.client.inode)
    assert (facts["failed"], facts["used"], facts["available"]) == (5, 20, 20)
    assert (facts["comm"], facts["cause"]) == ("lab-client", cause.replace("time-wait", "time_wait"))
    assert outcome.client_states["TIME_WAIT"] == facts["time_wait"] == (20 if cause == "time-wait" else 0)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("cause", "name"), [("open", "net.ipv4.ip_local_port_range"), ("time-wait", "net.ipv4.tcp_tw_reuse")]
)
def test_the_remedy_ends_the_fault(lab: Lab, run_tool: type[RunningTool], cause: str, name: str) -> None:
    scenario = NoLocalPorts(cause=cause)
    (finding,) = findings(lab, run_tool, scenario)
    (remedy,) = [remedy for remedy in finding["remedies"] if remedy["name"] == name]

    def connects() -> bool:
        scenario.connect(1)
        (client,) = scenario.connected(1)
        return client.errno == 0

    assert not connects()
    subprocess.run(remedy["command"], shell=True, check=True, stdout=subprocess.DEVNULL)
    until(connects, "connect() to find a port")  # one in TIME_WAIT must be a second old
