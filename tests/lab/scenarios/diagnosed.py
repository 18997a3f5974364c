"""What `diagnose` says of a scenario while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Scenario
from tests.conftest import RunningTool


def findings(
    lab: Lab, run_tool: type[RunningTool], scenario: Scenario, prefix: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """All of it about both hosts, as somebody sees it who watches them while the fault is made."""
    scenario.setup(lab)
    hosts = [word for host in lab.hosts for word in ("--netns", str(host.inode))]
    with run_tool("diagnose", "-d", "300", *hosts, prefix=prefix) as tool:
        scenario.fault(lab)
        scenario.settle(lab)
        found: list[dict[str, Any]] = tool.stop().rows[-1]["summary"]["findings"]
    return found
