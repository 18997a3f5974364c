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


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.root
@seen
def test_rp_filter_is_named(lab: Lab, run_tool: type[RunningTool], inside: bool) -> None:
    """What it is set to is read in the network namespace of the tool, which has no privileges by then."""
    scenario = RpFilter()
    for device in ("all", "default"):
        lab.server.sysctl(f"ipv4/conf/{device}/rp_filter", 0)
    enter = ("nsenter", f"--net=/run/netns/{lab.server.netns}") if inside else ()
    (finding,) = findings(lab, run_tool, scenario, prefix=enter)
    outcome = scenario.outcome(lab)
    facts = finding["facts"]
    assert (finding["rule"], facts["netns"], facts["what"]) == ("rp_filter", lab.server.inode, "SYNs")
    assert facts["count"] == outcome.counters["TcpExtIPReversePathFilter"] >= 2 * scenario.clients
    assert facts["ports"] == {str(PORT): facts["count"]}
    assert facts["rp_filter"] == ([0, 1] if inside else None)
    names = [remedy["name"] for remedy in finding["remedies"]]
    assert names == ["net.ipv4.conf.all.rp_filter", None][:: 1 if inside else -1]
    looser, route = finding["remedies"][:: 1 if inside else -1]
    assert looser["present"] == (0 if inside else "1, or 2 and no route at all")
    answered = subprocess.run([*enter, *shlex.split(route["command"])], check=True, capture_output=True, text=True)
    assert f"{lab.client.ipv4} dev veth1 " in answered.stdout
    subprocess.run([*enter, *shlex.split(looser["command"])], check=True, capture_output=True)
    scenario.connect(1)
    assert [client.errno for client in scenario.connected(1)] == [0]
