"""Connections that no answer ends: by keepalive, and by retransmissions."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose.rules.ends_by_timeout import rule
from tests.diagnose.rules.connections import connection, track
from tests.diagnose.rules.endings import NETNS, THERE, check, findings, groups, resets
from tests.record import Script, Test, recorded
from tests.record.script import IPPROTO_TCP, SO_ERROR, SOL_SOCKET
from tests.tools.queue.refusals import DIAGNOSE

PORT = 9504
SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT = 9, 4, 5, 6, 18


def lost(script: Script, idle: int, sending: int) -> list[int]:
    """So many connections whose peer has vanished: by keepalive, and by TCP_USER_TIMEOUT."""
    server, client = script.server.process("server"), script.client.process("web")
    listener = server.listener(PORT)
    pairs = []
    for _ in range(idle + sending):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        pairs.append((near, listener.accept()))
    with script.client.losing():
        for number, (near, _) in enumerate(pairs):
            if number < idle:
                near.option(SOL_SOCKET, SO_KEEPALIVE, 1)
                for option in (TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT):
                    near.option(IPPROTO_TCP, option, 1)
            else:
                near.option(IPPROTO_TCP, TCP_USER_TIMEOUT, 500)
                near.send("to nobody")
        for near, _ in pairs:
            near.until_state("CLOSE")
    errors = [near("get", SOL_SOCKET, SO_ERROR, 4) for near, _ in pairs]
    for near, far in pairs:
        near.close()
        far.linger(0)
        far.close()
    script.client.flush()
    return errors


@pytest.mark.parametrize(("idle", "sending"), [(3, 0), (0, 3), (2, 2)])
@recorded(DIAGNOSE)
def test_a_peer_that_has_vanished(script: Script, idle: int, sending: int) -> Test:
    errors = lost(script, idle, sending)
    after = script.client.counters()
    script.stay()
    seen = yield
    assert {error.ret for error in errors} == {errno.ETIMEDOUT}
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("ends_by_timeout", "warning")
    assert (facts["netns"], facts["raddr"]) == (script.client.inode, script.server.ipv4)
    assert facts["count"] == after.counters["TcpExtTCPAbortOnTimeout"] == idle + sending
    assert (facts["keepalive"], facts["timeouts"], facts["closed"]) == (idle, sending, 0)
    assert finding["who"].startswith("web (PID ")


@recorded(DIAGNOSE)
def test_two_that_vanish_are_everyday(script: Script) -> Test:
    lost(script, 1, 1)
    script.stay()
    seen = yield
    assert findings(seen, script) == []


@pytest.mark.parametrize(("number", "found"), [(2, []), (3, ["warning"]), (10, ["critical"])])
def test_thresholds(number: int, found: list[str]) -> None:
    ended = resets(number, direction="SENT", cause="KEEPALIVE", unanswered=None)
    seen = SimpleNamespace(resets=groups(*ended))
    assert [finding.severity for finding in check(rule, "ends_by_timeout", seen)] == found


def test_each_remote_address_counts_for_itself() -> None:
    ended = [
        *resets(2, direction="NONE", cause="TIMEOUT", unanswered=None),
        *resets(2, direction="NONE", cause="TIMEOUT", unanswered=None, raddr="192.0.2.3"),
    ]
    assert check(rule, "ends_by_timeout", SimpleNamespace(resets=groups(*ended))) == []


def beside(answered: int, number: int = 3, *, lport: int = 443, since_s: float = 0.0, **columns: Any) -> Any:
    """So many connections end, from clients of port 443 behind one address; so many others have had an answer since."""
    ended = resets(number, step=0, lport=443, rport=5000, direction="SENT", cause="KEEPALIVE", unanswered=None)
    columns = {"netns": NETNS, "raddr": THERE, "lport": lport, "role": "PASSIVE", "data_segs_out": 1} | columns
    tracks = [track(rule, [connection(**columns, rport=6000 + n)]) for n in range(answered)]
    for each in tracks:
        each.last_s = 100.0 + since_s
    seen = SimpleNamespace(resets=groups(*ended), sockets=SimpleNamespace(now=tracks), now_s=120.0, began_s=90.0)
    (finding,) = check(rule, "ends_by_timeout", seen)
    return finding


def test_single_clients_behind_an_address_that_lives() -> None:
    finding = beside(30, since_s=1.0)
    assert (finding.severity, finding.remedies) == ("info", [])
    assert finding.title == f"3 connections of clients with {THERE} end without an answer; others are answered"
    assert "30 other connections of this address had an answer since the first of these ended" in finding.observed
    assert finding.facts["answered_meanwhile"] == 30
    assert "the remote host is gone" not in finding.why


@pytest.mark.parametrize(
    ("answered", "more", "severity"),
    [
        (29, {"since_s": 1.0}, "warning"),
        (30, {}, "warning"),  # before the first of these ended: it may have gone since
        (30, {"since_s": 1.0, "lport": 80}, "warning"),  # of another port
        (30, {"since_s": 1.0, "role": "ACTIVE"}, "warning"),  # to a server
        (30, {"since_s": 1.0, "raddr": "192.0.2.99"}, "warning"),
        (99, {"since_s": 1.0, "number": 10}, "critical"),
        (100, {"since_s": 1.0, "number": 10}, "info"),
    ],
)
def test_an_address_that_may_be_gone(answered: int, more: dict[str, Any], severity: str) -> None:
    assert beside(answered, **more).severity == severity
