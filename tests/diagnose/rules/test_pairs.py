"""Two faults at a time: both are told, and nothing else."""

from __future__ import annotations

from typing import Any

from tests.diagnose.rules.connecting import found
from tests.diagnose.rules.scenes import scene
from tests.diagnose.rules.test_connects_fail import fail
from tests.diagnose.rules.test_firewall_drops import drop
from tests.diagnose.rules.test_mtu_hole import HOLE, MSS
from tests.record import Script, Seen, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

HANGS, MISSING, FILTERED, RESETS, STUCK, UNREAD, BACKEND = range(9431, 9438)
"""Each scene has ports of its own. All have the same addresses, and a finding explains others at the same ends."""

REQUESTS = 6


def pair(seen: Seen, script: Script, *rules: str) -> list[dict[str, Any]]:
    """The facts of what these rules found about both hosts. No rule found anything else, and each of them one thing."""
    findings = found(seen, *script.hosts)
    assert sorted(finding["rule"] for finding in findings) == sorted(rules), [each["title"] for each in findings]
    return [next(each["facts"] for each in findings if each["rule"] == rule) for rule in rules]


@recorded(DIAGNOSE)
def test_an_mtu_hole_and_a_service_that_nobody_accepts_from(script: Script) -> Test:
    """Between the same hosts. The handshakes with that service show that small packets pass."""
    made = scene(script)
    stuck, client = script.server.process("stuck"), script.client.process("web")
    stuck.listener(STUCK)
    script.server.exec("nft", HOLE)
    for near in made.nears:
        near.send_all(MSS)
    made.until_timeouts(3)
    client.pause(2_000_000)  # what connects at the time at which these stall shows nothing
    for _ in range(3):
        client.socket().connect(script.server.ipv4, STUCK)
        client.pause(500_000)
    client.pause(6_000_000)
    script.stay()
    seen = yield
    hole, stalled = pair(seen, script, "mtu_hole", "accept_stalled")
    assert (hole["count"], hole["netns"]) == (3, script.client.inode)
    assert (stalled["lport"], stalled["waiting"], stalled["pids"]) == (STUCK, 3, [stuck.pid])


@recorded(DIAGNOSE)
def test_requests_that_are_not_read_and_no_local_port(script: Script) -> Test:
    server, client, proxy = script.server.process("api"), script.client.process("web"), script.client.process("proxy")
    listener, backend = server.listener(UNREAD), server.listener(BACKEND, backlog=64)
    for _ in range(REQUESTS):
        near = client.socket()
        near.connect(script.server.ipv4, UNREAD)
        far = listener.accept()
        near.send("request")
        far.until_received(len("request"))
        far.send("answer")
        far.close()
        near.until_state("CLOSE")
        near.close()
        client.pause(600_000)
    script.client.sysctl("ip_local_port_range", "45000 45009")
    for _ in range(10):
        proxy.socket().connect(script.server.ipv4, BACKEND)
        backend.accept()
    failed = [proxy.socket().connect(script.server.ipv4, BACKEND, may_fail=True) for _ in range(3)]
    script.stay()
    seen = yield
    assert {call.errno for call in failed} == {"EADDRNOTAVAIL"}
    unread, ports = pair(seen, script, "closed_unread", "no_local_ports")
    assert (unread["lport"], unread["count"], unread["pids"]) == (UNREAD, REQUESTS, [server.pid])
    assert (ports["rport"], ports["failed"], ports["pid"]) == (BACKEND, 3, proxy.pid)


@recorded(DIAGNOSE)
def test_a_worker_that_hangs_and_a_service_that_is_not_there(script: Script) -> Test:
    server, client, batch = script.server.process("api"), script.client.process("web"), script.client.process("batch")
    listener = server.listener(HANGS)
    for _ in range(REQUESTS):
        near = client.socket()
        near.connect(script.server.ipv4, HANGS)
        far = listener.accept()
        near.send("request")
        near.close()
        far.until_state("CLOSE_WAIT")
    fail(batch, script.server.ipv4, MISSING, 7)
    server.pause(8_000_000)
    script.stay()
    seen = yield
    hangs, fails = pair(seen, script, "worker_hangs", "connects_fail")
    assert (hangs["pid"], hangs["count"]) == (server.pid, REQUESTS)
    assert (fails["comm"], fails["rports"], fails["count"]) == ("batch", [MISSING], 7)


@recorded(DIAGNOSE)
def test_a_firewall_and_a_server_that_resets(script: Script) -> Test:
    """At different ports of one host, and for clients of one host."""
    server, client, blocked = script.server.process("api"), script.client.process("web"), script.client.process("cron")
    script.client.sysctl("tcp_syn_retries", 1)
    listener = server.listener(RESETS)
    server.listener(FILTERED)
    drop(script.server, "input", FILTERED)
    tries = [blocked.socket() for _ in range(5)]
    for each in tries:
        each.start(script.server.ipv4, FILTERED)
    for _ in range(REQUESTS):
        near = client.socket()
        near.connect(script.server.ipv4, RESETS)
        far = listener.accept()
        near.send("request")
        far.receive()
        far.linger(0)
        far.close()
        near.until_state("CLOSE")
        near.close()
        client.pause(600_000)
    for each in tries:
        each.outcome()
    script.stay()
    seen = yield
    firewall, resets = pair(seen, script, "firewall_drops", "reset_in_request")
    assert (firewall["lport"], firewall["netns"]) == (FILTERED, script.server.inode)
    assert (resets["rport"], resets["count"], resets["sent_by"]) == (RESETS, REQUESTS, server.pid)
