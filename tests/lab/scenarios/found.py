"""What `diagnose` finds about both hosts while a scenario is played."""

from __future__ import annotations

from typing import Any

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Outcome, Scenario
from tests.conftest import RunningTool


def diagnosed(scenario: Scenario, lab: Lab, run_tool: type[RunningTool]) -> tuple[Outcome, list[dict[str, Any]]]:
    """The outcome, and the findings at the end."""
    scenario.setup(lab)
    hosts = ",".join(str(host.inode) for host in lab.hosts)
    with run_tool("diagnose", "--netns", hosts, "-d", "300") as tool:
        scenario.fault(lab)
        outcome = scenario.settle(lab)
    assert tool.done is not None
    summary = next(row["summary"] for row in tool.done.rows if "summary" in row)
    return outcome, summary["findings"]
