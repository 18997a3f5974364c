"""Full segments are lost without a word, small ones arrive."""

from __future__ import annotations

from tests.diagnose.rules.scenes import began, only, scene, told
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

MSS = 1448
HOLE = "table inet hole { chain in { type filter hook prerouting priority 0; meta length > 1300 drop; }; }"


@recorded(DIAGNOSE)
def test_full_segments_are_lost(script: Script) -> Test:
    """The server's firewall drops large packets, and nobody says so. At first nothing small is sent: it may be dead."""
    made = scene(script)
    script.server.exec("nft", HOLE)
    for near in made.nears:
        near.send_all(MSS)
    made.until_timeouts(3)
    made.client.pause(4_500_000)
    for _ in range(4):
        made.client.pause(500_000)  # what is opened meanwhile is counted by the second
        ((near, far),) = made.connect(1)
        near.send_all(900)
        far.read(900)
    told(script.client)
    seen = yield
    finding = only(seen, script, "mtu_hole", script.client)
    assert [each["rule"] for each in began(seen, script)] == ["mtu_hole"]
    facts = finding["facts"]
    assert (finding["severity"], facts["count"], facts["mss"], facts["mtu_probing"]) == ("critical", 3, MSS, 0)
    assert (facts["raddr"], facts["pids"]) == (script.server.ipv4, [made.client.pid])
    assert facts["opened_meanwhile"] + facts["answered_meanwhile"] >= 1
    probing, path = finding["remedies"]
    assert (probing["name"], probing["present"], probing["proposed"]) == ("net.ipv4.tcp_mtu_probing", 0, 1)
    assert probing["command"] == f"nsenter -t {made.client.pid} -n sysctl -w net.ipv4.tcp_mtu_probing=1"
    assert "tracepath" in path["command"]
