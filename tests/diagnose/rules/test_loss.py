"""One in five segments is lost, and sent again."""

from __future__ import annotations

from tests.diagnose.rules.scenes import only, scene, told
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

LOSSES = 24


@recorded(DIAGNOSE)
def test_lost_segments(script: Script) -> Test:
    made = scene(script)
    before = script.client.counters()
    for number in range(LOSSES):
        near, far = made.ends[number % 3]
        with script.client.losing():
            near.send_all(1000)
        for _ in range(4):
            near.send_all(1000)
        far.read(5000)
        near.until_acknowledged()
    after = script.client.counters()
    told(script.client)
    seen = yield
    finding = only(seen, script, "loss", script.client)
    facts, counted = finding["facts"], after.counters - before.counters
    assert (finding["severity"], facts["count"], facts["raddr"]) == ("warning", 3, script.server.ipv4)
    assert facts["retransmitted"] == counted["TcpRetransSegs"] >= LOSSES
    assert facts["needed"] <= facts["retransmitted"]
    assert (facts["pids"], facts["comm"]) == ([made.client.pid], "orders")
    fast = facts["kinds"].get("FAST", 0) + facts["kinds"].get("RACK_TIMEOUT", 0)
    assert fast == counted["TcpExtTCPFastRetrans"]
    assert 0.1 <= facts["share"] <= 0.3
