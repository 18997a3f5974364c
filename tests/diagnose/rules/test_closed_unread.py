"""A server that closes before it has read: with its share, and what of it is healthy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose.rules.closed_unread import rule
from tests.diagnose.rules.endings import HERE, NETNS, check, findings, groups, resets
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

PORT = 9502
ROUNDS, PAUSE_US = 6, 1_500_000


def serve(script: Script, *, read: bool, closed: bool = False) -> Any:
    """Clients send a request; the server answers and closes. `closed`: a client closes first, as after an answer."""
    server, client = script.server.process("server"), script.client.process("web")
    listener = server.listener(PORT)
    for _ in range(ROUNDS):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        near.send("request")
        far.until_received(7)
        if read:
            far.receive()
        if closed:
            near.shutdown()
            far.until_state("CLOSE_WAIT")
        far.send("answer")
        near.until_received(6)
        far.close()
        if read:
            near.until_end()
        else:
            near.until_state("CLOSE")
        near.close()
        client.pause(PAUSE_US)
    return server


@recorded(DIAGNOSE)
def test_the_server_is_named_and_its_clients_are_not(script: Script) -> Test:
    server = serve(script, read=False)
    after = script.server.counters()
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("closed_unread", "critical")
    assert facts["netns"] == script.server.inode
    assert facts["count"] == facts["accepted"] == after.counters["TcpExtTCPAbortOnClose"] == ROUNDS
    assert (facts["lport"], facts["pids"], facts["comm"]) == (PORT, [server.pid], "server")
    assert finding["who"].startswith(f"server (PID {server.pid}")
    assert "lingering_close" in finding["remedies"][0]["what"]


@recorded(DIAGNOSE)
def test_reading_first_ends_it(script: Script) -> Test:
    """What the remedy says."""
    serve(script, read=True)
    script.stay()
    seen = yield
    assert findings(seen, script) == []


@recorded(DIAGNOSE)
def test_a_client_that_has_closed_before_loses_nothing(script: Script) -> Test:
    serve(script, read=False, closed=True)
    after = script.server.counters()
    script.stay()
    seen = yield
    assert after.counters["TcpExtTCPAbortOnClose"] == ROUNDS
    assert findings(seen, script) == []


def seen_of(number: int, accepted: int | None, seconds: float = 10.0, **values: Any) -> Any:
    last = SimpleNamespace(netns=NETNS, lport=80, laddr=HERE, name=f"{HERE}:80", accepts=accepted)
    queues = SimpleNamespace(histories={1: SimpleNamespace(last=last, accepts=accepted)})
    sent = {"direction": "SENT", "cause": "UNREAD_DATA", "unanswered": None, "step": 0, "lport": 80} | values
    found = [(group._replace(rport=50000 + n), 1) for n, (group, _) in enumerate(resets(number, **sent))]
    return SimpleNamespace(resets=groups(*found, seconds=seconds), queues=queues)


@pytest.mark.parametrize(
    ("number", "accepted", "severity"),
    [(4, 4, None), (5, 0, "critical"), (5, 100, "critical"), (5, 101, None), (50, None, None)],
)
def test_thresholds(number: int, accepted: int | None, severity: str | None) -> None:
    found = check(rule, "closed_unread", seen_of(number, accepted))
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_a_process_that_ends_does_it_once() -> None:
    (finding,) = check(rule, "closed_unread", seen_of(20, 20, seconds=1.0))
    assert finding.severity == "info"


def test_what_no_listener_has_accepted_is_not_told() -> None:
    assert check(rule, "closed_unread", seen_of(20, 20, lport=81)) == []
