"""The rule about bursts that an accept queue has no room for: who, how many, where the limit comes from, what helps."""

from __future__ import annotations

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.backlog_cut import BacklogCut
from tests.conftest import RunningTool
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import BACKLOG, DIAGNOSE, Run, findings, is_exact, looks_are_rare

LATE = 4
LOOKS_US = 800_000
"""A few looks of diagnose, and no stall yet."""


def burst(script: Script, *, backlog: int = BACKLOG, somaxconn: int | None = None) -> Run:
    """More clients come than fit, and then all are accepted."""
    with script.older():
        if somaxconn is not None:
            script.server.sysctl("somaxconn", somaxconn)
        run = Run(script, backlog=backlog)
    run.overflow_at_ack(LATE)
    run.accept(BACKLOG + 1)
    run.end()
    script.stay()
    return run


@recorded(DIAGNOSE)
def test_overflow_is_found_and_explained(script: Script) -> Test:
    run = burst(script)
    seen = yield
    (finding,) = findings(seen, run)
    facts, overflows = finding["facts"], run.change("ListenOverflows")
    assert (finding["rule"], finding["severity"]) == ("accept_queue", "critical")
    assert facts["count"] == facts["refused"] == overflows
    assert (facts["pids"], facts["comm"]) == ([run.owner.pid], "server")
    assert (facts["laddr"], facts["lport"]) == run.target
    assert (facts["accept_queue"], facts["accept_limit"], facts["limit_from"]) == (6, 5, "listen()")
    assert facts["accepts"] == 6
    assert str(run.owner.pid) in finding["who"]
    assert f"TcpExtListenOverflows +{overflows}" in "".join(finding["observed"])
    if is_exact(seen):
        assert facts["at_syn"] + facts["at_ack"] == overflows
        assert facts["at_ack"] >= LATE
        assert run.peer.ipv4 in "".join(finding["observed"])
    (backlog,) = finding["remedies"]
    assert (backlog["name"], backlog["present"]) == ("listen() backlog", 5)
    assert backlog["proposed"] >= BACKLOG + LATE


@recorded(DIAGNOSE)
def test_limit_cut_by_somaxconn_names_somaxconn(script: Script) -> Test:
    run = burst(script, backlog=50, somaxconn=BACKLOG)
    seen = yield
    (finding,) = findings(seen, run)
    assert finding["rule"] == "accept_queue"
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
    run.owner.pause(LOOKS_US)
    run.accept(BACKLOG + 1)
    run.end()
    script.stay()
    seen = yield
    assert run.change("ListenOverflows") == 0
    if looks_are_rare(seen) and not findings(seen, run):
        return
    (finding,) = findings(seen, run)
    assert (finding["rule"], finding["severity"], finding["facts"]["count"]) == ("accept_queue", "warning", 0)


@recorded(DIAGNOSE)
def test_nothing_is_found_where_nothing_is_wrong(script: Script) -> Test:
    with script.older():
        run = Run(script)
    run.fill(3)
    run.accept(3)
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
    scenario = BacklogCut(clients=20, pause_ms=50)
    scenario.setup(lab)
    with run_tool("diagnose", "--netns", str(lab.server.inode), "-d", "300", "-o", "table") as tool:
        scenario.fault(lab)
        outcome = scenario.settle(lab)
    assert tool.done is not None
    text = " ".join(tool.done.stdout.split())
    assert f"accept queue overflow on {outcome.listener.address}:{outcome.listener.port}" in text
    assert f"{outcome.listener.comm} (PID {outcome.listener.pid})" in text
    assert "the limit 8 is somaxconn" in text
    assert "net.core.somaxconn: now 8, proposed" in text
