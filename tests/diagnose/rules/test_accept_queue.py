"""The rule about accept queues, on a real overflow: who, how many, where the limit comes from, what helps."""

from __future__ import annotations

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow
from tests.conftest import RunningTool
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE, Run, findings, is_exact


@recorded(DIAGNOSE)
def test_overflow_is_found_and_explained(script: Script) -> Test:
    with script.older():
        run = Run(script)
        cookie = run.listener.cookie()
    run.overflow_at_ack(4)
    run.start(2)
    script.server.flush()
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    facts, overflows = finding["facts"], run.change("ListenOverflows")
    assert (finding["rule"], finding["severity"]) == ("accept_queue", "critical")
    assert facts["count"] == overflows
    assert (facts["pids"], facts["comm"], facts["cookie"]) == ([run.owner.pid], "server", cookie.ret)
    assert (facts["laddr"], facts["lport"]) == run.target
    assert (facts["accept_queue"], facts["accept_limit"], facts["limit_from"]) == (6, 5, "listen()")
    assert facts["accepts"] == 0
    assert str(run.owner.pid) in finding["title"]
    assert f"TcpExtListenOverflows +{overflows}" in "".join(finding["observed"])
    if is_exact(seen):
        assert facts["at_syn"] + facts["at_ack"] == overflows
        assert facts["at_syn"] >= 2
        assert facts["at_ack"] >= 4
        assert run.peer.ipv4 in "".join(finding["observed"])
    nobody_accepts, backlog = finding["remedies"]
    assert str(run.owner.pid) in nobody_accepts["command"]
    assert (backlog["name"], backlog["present"]) == ("listen() backlog", 5)
    assert backlog["proposed"] >= 5 + 4


@recorded(DIAGNOSE)
def test_limit_cut_by_somaxconn_names_somaxconn(script: Script) -> Test:
    with script.older():
        script.server.sysctl("somaxconn", 5)
        run = Run(script, backlog=50)
    run.overflow_at_ack(4)
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    assert (finding["facts"]["accept_limit"], finding["facts"]["limit_from"]) == (5, "somaxconn")
    (somaxconn,) = [r for r in finding["remedies"] if r["name"] == "net.core.somaxconn"]
    assert somaxconn["present"] == 5
    assert somaxconn["command"].startswith(f"nsenter -t {run.owner.pid} -n sysctl -w")
    assert somaxconn["command"].endswith(f"net.core.somaxconn={somaxconn['proposed']}")


@recorded(DIAGNOSE)
def test_queue_that_is_full_and_refuses_nothing_is_a_warning(script: Script) -> Test:
    with script.older():
        run = Run(script)
    run.fill()
    run.end()
    script.stay()
    seen = yield
    assert run.change("ListenOverflows") == 0
    (finding,) = findings(seen, run)
    assert (finding["rule"], finding["severity"], finding["facts"]["count"]) == ("accept_queue", "warning", 0)


@recorded(DIAGNOSE)
def test_nothing_is_found_where_nothing_is_wrong(script: Script) -> Test:
    with script.older():
        run = Run(script)
    run.fill(3)
    run.end()
    script.stay()
    seen = yield
    assert run.change("ListenDrops") == 0
    assert findings(seen, run) == []
    summary = seen.run(DIAGNOSE).summary
    assert summary["listeners"] >= 1
    assert {"accept_queue", "syn_queue"} <= set(summary["rules"])
    assert any("sampled" in note for note in summary["notes"]) != is_exact(seen)


def test_text_names_owner_limit_and_remedy(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = AcceptOverflow(synack_retries=5)
    scenario.setup(lab)
    with run_tool("diagnose", "--netns", str(lab.server.inode), "-d", "300", "-o", "table") as tool:
        scenario.fault(lab)
        lab.server.sysctl("tcp_synack_retries", 0)  # requests live long enough for slow machines, and end now
        outcome = scenario.settle(lab)
    assert tool.done is not None
    text = " ".join(tool.done.stdout.split())
    assert f"accept queue overflow on {outcome.listener.address}:{outcome.listener.port}" in text
    assert f"{outcome.listener.comm} (PID {outcome.listener.pid})" in text
    assert "the limit 5 is the backlog given to listen()" in text
    assert "listen() backlog: now 5, proposed" in text
