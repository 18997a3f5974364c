"""ACKs are late: what was sent again had arrived, so it is no loss."""

from __future__ import annotations

from tests.diagnose.rules.scenes import only, scene, told
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

CONNECTIONS = 10


@recorded(DIAGNOSE)
def test_late_acks(script: Script) -> Test:
    made = scene(script, CONNECTIONS)
    before = script.client.counters()
    with script.server.held():
        for near in made.nears:
            near.send_all(3000)
        for near in made.nears:
            near.until_field("retrans", 3)
    for near in made.nears:
        near.until_acknowledged()
    for near, far in made.ends:
        near.send_all(10)
        far.read(3010)
        near.until_acknowledged()
    after = script.client.counters()
    told(script.client)
    seen = yield
    finding = only(seen, script, "spurious_retrans", script.client)
    facts, counted = finding["facts"], after.counters - before.counters
    assert (finding["severity"], facts["case"], facts["count"]) == ("warning", "delay", CONNECTIONS)
    assert facts["retransmitted"] == counted["TcpRetransSegs"] >= 3 * CONNECTIONS
    assert facts["needless"] >= facts["retransmitted"] / 2
    assert facts["dsack"] <= counted["TcpExtTCPDSACKRecv"]
    if seen.machine.hook("retrans", "undone"):
        assert facts["spurious"] > 0
    assert (facts["pids"], finding["remedies"]) == ([made.client.pid], [])
