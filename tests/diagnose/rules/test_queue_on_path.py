"""ACKs wait on the way: round trips take many times what they took."""

from __future__ import annotations

import pytest

from tests.diagnose.rules.scenes import only, scene
from tests.diagnose.rules.test_paths import evidence, found, names, track
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


FILLS = {"unacked": 20_000}
NEAR = {"srtt_us": 5000, "min_rtt_us": 5000}


@pytest.mark.parametrize("role", ["ACTIVE", "PASSIVE"])
def test_hosts_near_and_far_behind_one_address(role: str) -> None:
    """Three from overseas, of which one gets something large, beside one from here (NAT, a proxy, a VPN)."""
    far = {"srtt_us": 180_000, "min_rtt_us": 180_000, "role": role}
    assert names(evidence(track(**far | FILLS), track(**far), track(**far), track(**NEAR, role=role))) == []


@pytest.mark.parametrize(("role", "count"), [("ACTIVE", 4), ("PASSIVE", None)])
def test_connections_that_have_begun_in_the_queue(role: str, count: int | None) -> None:
    """They have never been faster. Those with a server count beside one that has; clients may be far away."""
    late = {"srtt_us": 180_000, "min_rtt_us": 170_000, "role": role}
    older = {"srtt_us": 180_000, "min_rtt_us": 18_000, "role": role}
    told = found(evidence(track(**older | FILLS), *(track(**late) for _ in range(3))))
    assert [each.facts["count"] for each in told] == ([] if count is None else [count])
    assert names(evidence(*(track(**late | FILLS) for _ in range(3)), track(**NEAR, role=role))) == []


def test_clients_whose_own_round_trips_were_short() -> None:
    slow = {"srtt_us": 180_000, "min_rtt_us": 18_000, "role": "PASSIVE"}
    (finding,) = found(evidence(track(**slow | FILLS), track(**slow), track(**slow), track(**NEAR, role="PASSIVE")))
    assert (finding.rule, finding.facts["min_rtt_us"]) == ("queue_on_path", 18_000)  # others are nearer
    assert names(evidence(track(**slow | FILLS), track(**slow), track(**slow | {"min_rtt_us": 18_001}))) == []
