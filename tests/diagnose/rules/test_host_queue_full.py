"""This host's own queue has no room, or does not move."""

from __future__ import annotations

import re
from urllib.parse import unquote

from tests.diagnose.rules.scenes import found, only, scene, told
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

CONNECTIONS = 6


@recorded(DIAGNOSE)
def test_a_queue_without_room(script: Script) -> Test:
    made = scene(script, CONNECTIONS)
    script.client.exec("tc", "qdisc", "replace", "dev", "veth0", "root", "pfifo", "limit", 0)
    for near in made.nears:
        near.send_all(1000)
    script.client.until_rows(DIAGNOSE, 1, since=0)
    state = script.client.exec("tc", "-s", "qdisc", "show", "dev", "veth0", "root")
    script.stay()
    seen = yield
    finding = only(seen, script, "host_queue_full", script.client)
    facts, dropped = finding["facts"], re.search(r"dropped (\d+)", unquote(state.data))
    assert dropped
    assert 20 <= int(dropped[1]) <= facts["discarded"] + CONNECTIONS
    assert facts["count"] == CONNECTIONS
    assert (facts["pids"], facts["comm"]) == ([made.client.pid], "orders")
    (remedy,) = finding["remedies"]
    assert remedy["command"].startswith(f"nsenter -t {made.client.pid} -n sh -c 'tc -s qdisc")


@recorded(DIAGNOSE)
def test_a_queue_that_does_not_move(script: Script) -> Test:
    """The segments wait for the link address of the next host. Before 6.17 only the silence is seen."""
    made = scene(script)
    script.client.agent("neighbour", script.client.number)
    for near in made.nears:
        near.send_all(1000)
    made.until_timeouts(4)
    told(script.client)
    seen = yield
    if seen.machine.kernel.has_type("trace_event_raw_tcp_retransmit_skb"):
        finding = only(seen, script, "host_queue_full", script.client)
        facts = finding["facts"]
        assert (finding["severity"], facts["standing"], facts["count"], facts["discarded"]) == ("critical", 3, 3, 0)
        assert facts["waited"] >= 9
    else:
        finding = only(seen, script, "no_ack", script.client)
        assert any("own queue does not move" in line for line in finding["observed"])


@recorded(DIAGNOSE, discards=True)
def test_a_next_hop_without_link_address(script: Script) -> Test:
    """It is asked for once, and what waits for it is discarded after a second. Before 6.17 only the silence is seen."""
    made = scene(script, 12)
    script.client.sysctl("ipv4/neigh/veth0/app_solicit", 1)
    script.client.agent("neighbour", script.client.number)
    for near in made.nears:
        near.send_all(1000)
    told(script.client)
    seen = yield
    (finding,) = found(seen, script)
    if seen.machine.kernel.has_type("trace_event_raw_tcp_retransmit_skb"):
        facts = finding["facts"]
        assert (finding["rule"], facts["raddrs"].keys()) == ("host_queue_full", {script.server.ipv4})
        assert facts["count"] == 12 <= facts["unresolved"]
        assert finding["title"].endswith("12 connections held up, for nobody answers ARP")
        (remedy,) = finding["remedies"]
        assert remedy["command"].endswith(f"sh -c 'ip route get {script.server.ipv4}; ip neigh'")
    else:
        assert finding["rule"] == "no_ack"
