"""ACKs wait on the way: round trips take many times what they took."""

from __future__ import annotations

from tests.diagnose.rules.scenes import only, scene
from tests.record import Script, Test, recorded
from tests.tools.pair import without_timers
from tests.tools.queue.refusals import DIAGNOSE

DELAY_US = 400_000
ROUNDS = 24  # ten seconds: looks are rare on a machine with many sockets and much to do


@recorded(DIAGNOSE)
def test_slow_round_trips_behind_a_bulk_sender(script: Script) -> Test:
    made = scene(script)
    without_timers(script)
    backup = script.client.process("backup")
    made.connect(1, by=backup)
    for _ in range(ROUNDS):
        with script.server.held():
            for near in made.nears:
                near.send_all(20_000 if near.process is backup else 100)
            made.client.pause(DELAY_US)
        for near, far in made.ends:
            near.until_acknowledged()
            far.read(20_000 if near.process is backup else 100)
    measured = [near.info() for near in made.nears]
    script.stay()
    seen = yield
    finding = only(seen, script, "queue_on_path", script.client)
    facts = finding["facts"]
    assert (finding["severity"], facts["count"], facts["raddr"]) == ("warning", 4, script.server.ipv4)
    assert 100_000 <= facts["srtt_us"] <= max(call.info["srtt_us"] for call in measured)
    assert facts["min_rtt_us"] == min(call.info["min_rtt_us"] for call in measured)
    assert (facts["bulk_pid"], facts["bulk_comm"]) == (backup.pid, "backup")
    assert set(facts["pids"]) == {made.client.pid, backup.pid}
