"""The rule about accept queues, on a real overflow: who, how many, where the limit comes from, what helps."""

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Outcome
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow


def findings(tool, rule):
    return [row for row in tool.done.rows if row.get("rule") == rule]


def diagnose(run_tool, lab: Lab, *arguments: str):
    return run_tool("diagnose", "--netns", str(lab.server.inode), "-d", "300", *arguments)


def overflow(lab: Lab, scenario: AcceptOverflow) -> Outcome:
    """Requests live long enough for slow machines, and end once the fault is made."""
    scenario.fault(lab)
    lab.server.sysctl("tcp_synack_retries", 0)
    return scenario.settle(lab)


@pytest.mark.kernel
def test_overflow_is_found_and_explained(lab, run_tool):
    scenario = AcceptOverflow(synack_retries=5)
    scenario.setup(lab)
    with diagnose(run_tool, lab) as tool:
        outcome = overflow(lab, scenario)
    assert tool.done.status == 0
    (finding,) = findings(tool, "accept_queue")
    facts, overflows = finding["facts"], outcome.counters["TcpExtListenOverflows"]
    assert finding["severity"] == "critical"
    assert facts["count"] == overflows
    assert facts["pids"] == [outcome.listener.pid]
    assert (facts["laddr"], facts["lport"]) == (outcome.listener.address, outcome.listener.port)
    assert (facts["accept_queue"], facts["accept_limit"], facts["limit_from"]) == (6, 5, "listen()")
    assert facts["accepts"] == 0
    assert str(outcome.listener.pid) in finding["title"]
    assert f"TcpExtListenOverflows +{overflows}" in "".join(finding["observed"])
    if Kernel().fentry or Kernel().kprobe:
        assert facts["at_syn"] + facts["at_ack"] == overflows
        assert facts["at_ack"] > 0
        assert lab.client.ipv4 in "".join(finding["observed"])
    nobody_accepts, backlog = finding["remedies"]
    assert str(outcome.listener.pid) in nobody_accepts["command"]
    assert (backlog["name"], backlog["present"]) == ("listen() backlog", 5)
    assert backlog["proposed"] >= 5 + 4


def test_limit_cut_by_somaxconn_names_somaxconn(lab, run_tool):
    lab.server.sysctl("somaxconn", 5)
    scenario = AcceptOverflow(backlog=5, synack_retries=5)
    scenario.setup(lab)
    with diagnose(run_tool, lab) as tool:
        overflow(lab, scenario)
    (finding,) = findings(tool, "accept_queue")
    assert (finding["facts"]["accept_limit"], finding["facts"]["limit_from"]) == (5, "somaxconn")
    (somaxconn,) = [r for r in finding["remedies"] if r["name"] == "net.core.somaxconn"]
    assert somaxconn["present"] == 5
    assert somaxconn["command"].startswith(f"nsenter -t {finding['facts']['pids'][0]} -n sysctl -w")
    assert somaxconn["command"].endswith(f"net.core.somaxconn={somaxconn['proposed']}")


@pytest.mark.kernel
def test_queue_that_is_full_and_refuses_nothing_is_a_warning(lab, run_tool):
    scenario = AcceptOverflow(clients=6, synack_retries=5)
    scenario.setup(lab)
    with diagnose(run_tool, lab) as tool:
        scenario.fault(lab)
        scenario.settle(lab)
    (finding,) = findings(tool, "accept_queue")
    assert (finding["severity"], finding["facts"]["count"]) == ("warning", 0)


@pytest.mark.kernel
def test_nothing_is_found_where_nothing_is_wrong(lab, run_tool):
    scenario = AcceptOverflow(clients=3, synack_retries=5)
    scenario.setup(lab)
    with diagnose(run_tool, lab) as tool:
        scenario.fault(lab)
        scenario.settle(lab)
    assert findings(tool, "accept_queue") == []
    assert tool.done.stats["lost"] == 0
    assert tool.done.stats["seen"] == tool.done.stats["shown"] + tool.done.stats["filtered"]


def test_text_names_owner_limit_and_remedy(lab, run_tool):
    scenario = AcceptOverflow(synack_retries=5)
    scenario.setup(lab)
    with diagnose(run_tool, lab, "-o", "table") as tool:
        outcome = overflow(lab, scenario)
    text = " ".join(tool.done.stdout.split())
    assert f"accept queue overflow on {outcome.listener.address}:{outcome.listener.port}" in text
    assert f"{outcome.listener.comm} (PID {outcome.listener.pid})" in text
    assert "the limit 5 is the backlog given to listen()" in text
    assert "listen() backlog: now 5, proposed" in text
