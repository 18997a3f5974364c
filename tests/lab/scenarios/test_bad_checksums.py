"""Damaged segments: diagnose says how many, from where, and what they mean."""

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.bad_checksums import BadChecksums
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings

pytestmark = pytest.mark.kernel


def test_all_are_counted(lab: Lab, run_tool: type[RunningTool]) -> None:
    if not Kernel().enumerators("skb_drop_reason"):
        pytest.skip("before 5.17 the kernel gives no reasons")
    scenario = BadChecksums()
    found = findings(lab, run_tool, scenario)
    assert [(each["rule"], each["facts"]["count"], each["facts"]["peers"]) for each in found] == [
        ("drops", scenario.segments, {lab.client.ipv4: scenario.segments})
    ]
