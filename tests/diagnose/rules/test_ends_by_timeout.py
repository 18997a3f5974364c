"""Connections that no answer ends: by keepalive, and by retransmissions."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from tcpscope.diagnose.rules.ends_by_timeout import rule
from tests.diagnose.rules.endings import check, findings, groups, resets
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
