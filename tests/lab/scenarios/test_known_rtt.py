"""Experiment I: the round trip that is measured is the one that the peer made."""

from __future__ import annotations

import statistics

import pytest

from tcpscope.errors import UsageError
from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.known_rtt import KnownRtt
from tests.conftest import RunningTool

pytestmark = pytest.mark.root
SLACK_MS = 5  # between the moment when an answer was sent, and the one at which the thread that sent it says so


@pytest.mark.parametrize("family", [pytest.param("4", marks=pytest.mark.kernel), "6"])
def test_the_round_trip_of_each_peer(lab: Lab, run_tool: type[RunningTool], family: str) -> None:
    scenario = KnownRtt(family=family)
    scenario.setup(lab)
    netns = ("--netns", str(lab.client.inode))
    with run_tool("rtt", *netns, "--by", "raddr") as rtt, run_tool("life", *netns) as life:
        scenario.fault(lab)
        outcome = scenario.settle(lab)
    assert rtt.done and life.done
    rows = {row["raddr"]: row for row in rtt.done.rows if row["total"]}
    ends = {row["raddr"]: row for row in life.done.rows}
    assert rows.keys() == ends.keys() == scenario.delays.keys()
    assert sorted(scenario.delays.values()) == [10, 40, 160]
    for address, delay in scenario.delays.items():
        took = [1000 * seconds for seconds in scenario.far.answers[address]]
        row = rows[address]
        assert len(took) == scenario.requests + 2  # the handshake, and the FIN
        assert row["count"] in (len(took) - 1, len(took))  # that of the FIN may not be seen
        assert row["min_us"] >= delay * 1000
        assert row["min_us"] / 1000 <= min(took) + SLACK_MS
        assert row["max_us"] / 1000 <= max(took) + SLACK_MS
        assert row["mean_us"] / 1000 == pytest.approx(statistics.fmean(took), abs=SLACK_MS)
        assert ends[address]["min_rtt_us"] == row["min_us"]  # the kernel's own minimum
    assert outcome.client_counters["TcpRetransSegs"] == 0


@pytest.mark.parametrize("delays", ["", "10,x", "0", "1001", "-5"])
def test_delays_that_are_none(delays: str) -> None:
    with pytest.raises(UsageError, match="separated by commas"):
        KnownRtt(delays_ms=delays)
