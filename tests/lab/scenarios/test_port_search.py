"""Experiment J: local ports near their end, where connect() looks for one, and at last finds none."""

from __future__ import annotations

import pytest

from tcpscope.errors import UsageError
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import Program
from tcpscope.lab.scenarios.port_search import PARTS, PortSearch
from tests.conftest import RunningTool


@pytest.mark.kernel
def test_the_search_and_its_end(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = PortSearch(ports=4000)
    scenario.setup(lab)
    with run_tool("ports", "--netns", str(lab.client.inode), "-i", "0.1") as ports:
        open_, used = scenario._open, 0

        def opened(client: Program, number: int, what: str) -> None:
            """Each tenth has rows of its own, on the fastest machine too."""
            nonlocal used
            open_(client, number, what)
            used = min(used + number, 4000)
            ports.wait_for(lambda rows: any(row["used"] == used for row in rows))

        scenario._open = opened  # type: ignore[method-assign]
        scenario.fault(lab)
        outcome = scenario.settle(lab)
        ports.wait_for(lambda rows: any(row["failed"] for row in rows))
    early, late = scenario.parts[2], scenario.parts[PARTS - 2]
    assert late.median > 3 * early.median  # the application's clock
    assert late.cpu > 3 * early.cpu
    assert [(part.opened, part.refused) for part in scenario.parts] == [(400, 0)] * PARTS + [(400, 5)]
    assert outcome.client_counters["TcpActiveOpens"] == outcome.client_states["ESTABLISHED"] == 4000

    assert ports.done
    rows = ports.done.rows
    assert (rows[-1]["used"], rows[-1]["available"], rows[-1]["percent"]) == (4000, 4000, 100)
    assert sum(row["failed"] or 0 for row in rows) == 5
    assert {row["errno"] for row in rows if row["failed"]} == {"EADDRNOTAVAIL"}
    before = [row["search_us"] for row in rows if row["opened"] and row["used"] < 2000]
    after = [row["search_us"] for row in rows if row["opened"] and 3000 < row["used"] < 4000]
    assert min(after) > min(before)
    levels = {row["level"]: row["percent"] for row in reversed(rows)}  # the first of each
    assert 50 <= levels["warning"] < levels["critical"] and levels["critical"] >= 90


@pytest.mark.parametrize("asked", [{"ports": 9}, {"ports": 32_769}, {"more": 0}])
def test_numbers_that_it_cannot_do(asked: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        PortSearch(**asked)
