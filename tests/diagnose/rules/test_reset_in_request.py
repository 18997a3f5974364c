"""Requests that the remote end resets: who sent them, who reset them, and what of it is healthy."""

from __future__ import annotations

from socket import MSG_NOSIGNAL
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose.rules.reset_in_request import rule
from tests.diagnose.rules.endings import THERE, attempts, check, findings, groups, resets
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

PORT, RACE = 9501, 9507
ROUNDS, PAUSE_US = 6, 1_500_000


@recorded(DIAGNOSE)
def test_a_server_that_resets(script: Script) -> Test:
    server, client = script.server.process("server"), script.client.process("web")
    listener = server.listener(PORT)
    for _ in range(ROUNDS):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        near.send("request")
        far.receive()
        far.linger(0)
        far.close()
        near.until_state("CLOSE")
        near.close()
        client.pause(PAUSE_US)
    after = script.client.counters()
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("reset_in_request", "critical")
    assert facts["netns"] == script.client.inode
    assert facts["count"] == facts["opened"] == after.counters["TcpEstabResets"] == ROUNDS
    assert (facts["raddr"], facts["rport"], facts["pids"]) == (script.server.ipv4, PORT, [client.pid])
    assert (facts["sent_by"], facts["cause"], facts["after_fin"]) == (server.pid, "LINGER", 0)
    assert finding["who"].startswith(f"server (PID {server.pid}")
    assert finding["remedies"][0]["what"].startswith(f"Look into server (PID {server.pid})")


@recorded(DIAGNOSE)
def test_a_server_that_closes_at_the_moment_of_the_request(script: Script) -> Test:
    """It has closed the idle connection. The client does not get ECONNRESET, but reads the end."""
    server, client = script.server.process("server"), script.client.process("web")
    listener = server.listener(RACE)
    reads, writes = [], []
    for _ in range(ROUNDS):
        near = client.socket()
        near.connect(script.server.ipv4, RACE)
        listener.accept().close()
        near.until_state("CLOSE_WAIT")
        near.send("request")
        near.until_state("CLOSE")
        reads.append(near.receive(may_fail=True))
        writes.append(near.send("more", MSG_NOSIGNAL, may_fail=True))
        near.close()
        client.pause(600_000)
    script.stay()
    seen = yield
    assert {(call.ret, call.errno) for call in reads} == {(0, "none")}
    assert {call.errno for call in writes} == {"EPIPE"}
    (finding,) = findings(seen, script)
    assert (finding["rule"], finding["facts"]["after_fin"]) == ("reset_in_request", ROUNDS)
    assert "ECONNRESET" not in finding["why"]
    assert "a read returns 0 bytes" in finding["why"]
    assert "EPIPE" in finding["why"]
    assert "keep-alive" in finding["remedies"][0]["what"]


@recorded(DIAGNOSE)
def test_answers_and_resets_are_healthy(script: Script) -> Test:
    """A client that has its answer is reset: it closed too late, and lost nothing."""
    server, client = script.server.process("server"), script.client.process("web")
    listener = server.listener(PORT)
    for _ in range(ROUNDS):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        near.send("request")
        far.receive()
        server.pause(PAUSE_US)
        far.send("answer")
        near.receive()
        far.linger(0)
        far.close()
        near.until_state("CLOSE")
        near.close()
    script.stay()
    seen = yield
    assert findings(seen, script) == []


def seen_of(number: int, opened: int, seconds: float = 10.0, **values: Any) -> Any:
    found = resets(number, **values)
    return SimpleNamespace(resets=groups(*found, seconds=seconds), attempts=groups(attempts(opened)))


@pytest.mark.parametrize(
    ("number", "opened", "severity"),
    [(4, 4, None), (5, 0, "critical"), (5, 5, "critical"), (5, 10, "critical"), (5, 100, "warning"), (5, 101, None)],
)
def test_thresholds(number: int, opened: int, severity: str | None) -> None:
    found = check(rule, "reset_in_request", seen_of(number, opened))
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_one_moment_is_a_restart() -> None:
    (finding,) = check(rule, "reset_in_request", seen_of(20, 20, seconds=1.0))
    assert finding.severity == "info"


def test_clients_that_reset_a_listeners_connections_are_not_told() -> None:
    found = resets(20, step=0, rport=51000)
    seen: Any = SimpleNamespace(resets=groups(*found), attempts=groups())
    assert check(rule, "reset_in_request", seen) == []


def test_what_was_answered_does_not_count() -> None:
    assert check(rule, "reset_in_request", seen_of(20, 20, unanswered=False)) == []


def test_a_server_that_closes_idle_connections_too_early() -> None:
    (finding,) = check(rule, "reset_in_request", seen_of(20, 20, state="CLOSE_WAIT"))
    assert finding.facts["after_fin"] == 20
    assert "keep-alive" in finding.remedies[0].what
    assert f"{THERE}:8080" in finding.title
