"""The rule about backlogs that somaxconn cuts: only where the queue came near to the limit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules import backlog_cut
from tests.record import Script, Test, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import DIAGNOSE, Run, findings, looks_are_rare

SOMAXCONN = 8
LOOKS_US = 800_000


@recorded(DIAGNOSE)
def test_a_queue_that_nearly_fills(script: Script) -> Test:
    with script.older():
        script.server.sysctl("somaxconn", SOMAXCONN)
        run = Run(script, backlog=64)
    run.fill(SOMAXCONN - 1)
    run.owner.pause(LOOKS_US)
    run.accept(SOMAXCONN - 1)
    run.end()
    script.stay()
    seen = yield
    if looks_are_rare(seen) and not findings(seen, run):
        return
    (finding,) = findings(seen, run)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("backlog_cut", "info")
    assert (facts["accept_queue"], facts["accept_limit"]) == (SOMAXCONN - 1, SOMAXCONN)
    assert run.change("ListenOverflows") == 0
    assert str(run.owner.pid) in finding["who"]
    somaxconn, backlog = finding["remedies"]
    assert (somaxconn["name"], somaxconn["present"]) == ("net.core.somaxconn", SOMAXCONN)
    assert somaxconn["command"].startswith(f"nsenter -t {run.owner.pid} -n sysctl -w net.core.somaxconn=")
    assert backlog["name"] == "listen() backlog"


@recorded(DIAGNOSE)
def test_an_idle_one_is_healthy(script: Script) -> Test:
    with script.older():
        script.server.sysctl("somaxconn", SOMAXCONN)
        run = Run(script, backlog=64)
    run.fill(SOMAXCONN // 2)
    run.accept(SOMAXCONN // 2)
    run.end()
    script.stay()
    seen = yield
    assert findings(seen, run) == []


@pytest.mark.parametrize(
    ("length", "somaxconn", "found"), [(95, 128, False), (96, 128, True), (96, 4096, False), (0, 128, False)]
)
def test_from_three_quarters_of_somaxconn_on(length: int, somaxconn: int, found: bool) -> None:
    history = History(LISTENER, LISTENER)
    history.look(replace(LISTENER, accept_queue=length, accept_limit=128, somaxconn=somaxconn), 1.0)
    queues = SimpleNamespace(histories={1: history})
    assert bool(list(backlog_cut.rule.check(SimpleNamespace(queues=queues)))) == found  # type: ignore[arg-type]
