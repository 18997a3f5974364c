"""A remote end that acknowledges nothing: gone, deaf, or cut off from some connections."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose.rules import no_ack
from tcpscope.diagnose.sockets import Track
from tests.diagnose.rules.scenes import PORT, only, scene, told
from tests.record import Script, Test, recorded
from tests.record.script import NOBODYS_MAC
from tests.tools.queue.refusals import DIAGNOSE

SECOND, NOWHERE = "192.0.2.77", "192.0.2.200"
"""Another address of the client, and a router that does not exist."""


@recorded(DIAGNOSE)
def test_a_peer_that_has_gone(script: Script) -> Test:
    made = scene(script)
    script.client.lose(), script.server.lose()
    for near in made.nears:
        near.send_all(1000)
    made.until_timeouts(3)
    told(script.client)
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "gone", 3)
    assert (facts["raddr"], facts["pids"], facts["comm"]) == (script.server.ipv4, [made.client.pid], "orders")
    assert (facts["unacked_bytes"], facts["orphans"], facts["opened_meanwhile"]) == (3000, 0, 0)
    assert facts["timeouts"] >= 3
    assert finding["who"].startswith(f"orders (PID {made.client.pid}")
    route, timeout = finding["remedies"]
    assert route["command"].endswith(f"ip route get {script.server.ipv4}")
    assert (timeout["name"], timeout["present"]) == ("TCP_USER_TIMEOUT", "not set")


@recorded(DIAGNOSE)
def test_a_link_that_is_down(script: Script) -> Test:
    """Nothing is sent, so nothing is sent again, and no RTO runs."""
    made = scene(script)
    before = script.client.counters()
    script.client.exec("ip", "link", "set", "dev", "veth0", "down")
    for near in made.nears:
        near.send_all(1000)
    script.client.until_rows(DIAGNOSE, 1, since=0)
    after = script.client.counters()
    script.stay()
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts, counted = finding["facts"], after.counters - before.counters
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "here", 3)
    assert counted["TcpRetransSegs"] == counted["TcpExtTCPTimeouts"] == facts["unacked_bytes"] == 0
    assert "3,000 bytes wait to be sent, and none was" in finding["observed"]
    (remedy,) = finding["remedies"]
    assert remedy["command"] == (f"nsenter -t {made.client.pid} -n sh -c 'ip route get {script.server.ipv4}; ip link'")


@recorded(DIAGNOSE)
def test_orphans_of_a_peer_that_has_gone(script: Script) -> Test:
    """The application has closed them: they wait in FIN_WAIT1 without a process."""
    made = scene(script)
    script.client.lose(), script.server.lose()
    for near in made.nears:
        near.send_all(1000)
    made.until_timeouts(3)
    for near in made.nears:
        near.close()
    script.client.until_sockets(3, state="FIN_WAIT1")
    told(script.client)
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts = finding["facts"]
    assert (facts["case"], facts["count"], facts["orphans"]) == ("gone", 3, 3)
    assert facts["unacked_bytes"] >= 3000
    assert (finding["who"], "it does not wait" in finding["why"]) == (None, True)
    (remedy,) = finding["remedies"]
    assert remedy["command"].endswith(f"ip route get {script.server.ipv4}")


@recorded(DIAGNOSE)
def test_connections_that_are_cut_off_while_others_work(script: Script) -> Test:
    """What comes from one of the client's addresses is lost on the way, as if a firewall had forgotten it.

    They are idle before that, and not for as long as firewalls wait: that may be another fault.
    """
    made = scene(script, 0)
    client, server = script.client, script.server
    client.exec("ip", "addr", "add", f"{SECOND}/32", "dev", "veth0")
    client.exec("ip", "neigh", "replace", NOWHERE, "lladdr", NOBODYS_MAC, "dev", "veth0", "nud", "permanent")
    server.exec("ip", "neigh", "replace", SECOND, "lladdr", client.mac, "dev", "veth0", "nud", "permanent")
    cut = [near for near, _ in made.connect(3, source=SECOND)]
    acknowledged = made.client.now()
    client.exec("ip", "route", "add", server.ipv4, "via", NOWHERE, "dev", "veth0", "table", 100)
    client.exec("ip", "rule", "add", "from", SECOND, "lookup", 100)
    made.client.pause(3_500_000)
    sent = [near.send_all(1000) for near in cut]
    made.until_timeouts(3, *cut)
    made.client.pause(2_000_000)  # what is opened meanwhile is counted by the second
    made.connect(2)
    told(client)
    seen = yield
    finding = only(seen, script, "no_ack", client)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "others", 3)
    assert (facts["pids"], facts["opened_meanwhile"] >= 1) == ([made.client.pid], True)
    idle_s = (sent[0].end_us - acknowledged.begin_us) / 1e6
    assert idle_s >= 3.5
    assert idle_s - 0.1 <= facts["idle_s"] <= idle_s + 2.5
    assert any(line.startswith("they were idle before that for ") for line in finding["observed"])
    route, timeout = finding["remedies"]
    assert route["command"].endswith(f"ip route get {server.ipv4}")
    assert timeout["name"] == "TCP_USER_TIMEOUT"


@recorded(DIAGNOSE)
def test_only_fins_are_lost(script: Script) -> Test:
    made = scene(script)
    script.server.exec("nft", "add table inet filter")
    script.server.exec("nft", "add chain inet filter in { type filter hook input priority 0 ; }")
    script.server.exec("nft", "add rule inet filter in tcp flags & fin == fin drop")
    for near in made.nears:
        near.send_all(100)
        near.until_acknowledged()
        near.close()
    made.client.pause(5_000_000)  # what is opened meanwhile is counted by the second
    made.connect(2)
    told(script.client)
    seen = yield
    finding = only(seen, script, "no_ack", script.client)
    facts = finding["facts"]
    assert (finding["severity"], facts["case"], facts["count"]) == ("critical", "fins", 3)
    assert (facts["unacked_bytes"], facts["orphans"]) == (3, 3)
    assert finding["title"].endswith("get no answer to their FIN")
    (remedy,) = finding["remedies"]
    assert "FINs" in remedy["what"]


@recorded(DIAGNOSE)
def test_one_client_that_vanishes_is_no_fault_of_this_host(script: Script) -> Test:
    made = scene(script, 1)
    ((near, far),) = made.ends
    script.client.lose(), script.server.lose()
    far.send_all(1000)
    made.until_timeouts(3, far)
    told(script.server)
    seen = yield
    finding = only(seen, script, "no_ack", script.server)
    assert (finding["severity"], finding["facts"]["case"], finding["facts"]["lport"]) == ("info", "clients", PORT)
    assert (finding["facts"]["count"], finding["remedies"]) == (1, [])
    assert near


def row(**columns: Any) -> SimpleNamespace:
    """A connection that has waited long for an ACK."""
    return SimpleNamespace(
        **{
            "state": "ESTABLISHED",
            "out_segs": 1,
            "backoff": 3,
            "retransmits": 3,
            "srtt_us": 1000,
            "since_ack_us": 3_000_000,
            "rto_us": 1_600_000,
            "acked_seq": 0,
            "unsent": 0,
            "timer": "RTO",
            "peer_window": 65_536,
            "mss": 1448,
        }
        | columns
    )


@pytest.mark.parametrize(
    ("columns", "is_silent"),
    [
        ({}, True),
        ({"backoff": 0}, True),  # what could not be sent does not double the timeout
        ({"backoff": 2, "retransmits": 2}, False),
        ({"since_ack_us": 2_999_999}, False),
        ({"srtt_us": 400_000}, False),
        ({"out_segs": 0}, False),
        ({"out_segs": 0, "unsent": 100, "timer": "ZERO_WINDOW"}, True),  # and the window is open
        ({"out_segs": 0, "unsent": 100, "timer": "ZERO_WINDOW", "peer_window": 99}, False),
        ({"state": "SYN_SENT"}, False),
    ],
)
def test_three_timeouts_and_three_seconds_of_silence(columns: dict[str, Any], is_silent: bool) -> None:
    of = row(**columns)
    track = Track(of, of, 0.0, 0.0)
    track._look(of, 0.0, no_ack.rule.marks)
    assert no_ack.is_silent(track) == is_silent
