"""Faults on the way to a remote host: diagnose names each, and nothing else."""

from __future__ import annotations

import shlex
import subprocess
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import Scenario
from tcpscope.lab.scenarios.full_device_queue import FullDeviceQueue
from tcpscope.lab.scenarios.idle_cut import IdleCut
from tcpscope.lab.scenarios.late_acks import LateAcks
from tcpscope.lab.scenarios.long_queue import LongQueue
from tcpscope.lab.scenarios.lossy_path import LossyPath
from tcpscope.lab.scenarios.mtu_hole import MtuHole
from tcpscope.lab.scenarios.peer_gone import PeerGone
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings

pytestmark = pytest.mark.root  # recorded scenes show the rules on each kernel


@pytest.mark.parametrize(
    ("scenario", "rule", "facts"),
    [
        (PeerGone(seconds=4), "no_ack", {"count": 3, "case": "gone"}),
        (IdleCut(idle=4), "no_ack", {"count": 3, "case": "others"}),
        (LossyPath(seconds=4, one_in=20), "loss", {"count": 3}),
        (LateAcks(seconds=8), "spurious_retrans", {"count": 10, "case": "delay"}),
        (FullDeviceQueue(seconds=4), "host_queue_full", {"count": 6, "waited": 0}),
        (LongQueue(seconds=4), "queue_on_path", {"count": 4}),
    ],
    ids=lambda value: value.name() if isinstance(value, Scenario) else "",
)
def test_it_is_found(lab: Lab, run_tool: type[RunningTool], scenario: Any, rule: str, facts: dict[str, Any]) -> None:
    (finding,) = findings(lab, run_tool, scenario)
    assert (finding["rule"], finding["facts"]["netns"]) == (rule, lab.client.inode)
    assert finding["facts"]["pids"] == [scenario.client.pid]
    assert finding["facts"].items() >= facts.items()


@pytest.mark.kernel
def test_the_remedy_of_an_mtu_hole_ends_it(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = MtuHole(seconds=4)
    (finding,) = findings(lab, run_tool, scenario)
    facts = finding["facts"]
    assert (finding["rule"], facts["netns"], facts["count"], facts["mss"]) == ("mtu_hole", lab.client.inode, 3, 1448)
    assert sum(found.send_q for found in lab.client.sockets()) == 3 * 3000
    subprocess.run(shlex.split(finding["remedies"][0]["command"]), check=True, capture_output=True)
    until(lambda: not any(found.send_q for found in lab.client.sockets()), "everything to arrive")
