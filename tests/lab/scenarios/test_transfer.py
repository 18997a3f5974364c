"""Experiment H: the bytes that every tool counts are those that were sent, and that TCP_INFO has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.transfer import Transfer
from tests.conftest import RunningTool
from tests.lab.families import KERNEL_FAMILIES

pytestmark = pytest.mark.root


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_every_tool_counts_what_was_sent(lab: Lab, run_tool: type[RunningTool], family: str) -> None:
    scenario = Transfer(family=family, seconds=0.6)
    scenario.setup(lab)
    network = "2001:db8::/32" if family == "6" else "192.0.2.0/24"
    client, server = (("--netns", str(host.inode)) for host in lab.hosts)
    with (
        run_tool("top", *client, "-i", "0.2") as top,
        run_tool("subnet", *client, "--net", network, "-i", "0.2") as subnet,
        run_tool("life", *client) as life,
        run_tool("life", *server) as life_of_server,
    ):
        scenario.fault(lab)
        scenario.settle(lab)
    sent = {each.port: (each.up, each.down) for each in scenario.transfers}
    assert list(sent.values()) == [(1_000_000 * n, 100_000 * n) for n in (1, 2, 3)]

    for each in scenario.transfers:  # the kernel's own numbers, at both ends
        assert (each.client["sent"] - each.client["retransmitted"], each.client["received"]) == (each.up, each.down)
        assert (each.server["sent"] - each.server["retransmitted"], each.server["received"]) == (each.down, each.up)
        assert each.seconds >= 2 * 0.6 * 0.98  # the last of fifty pieces goes at 98 % of the time

    # `life` has what was sent again, too: a loss probe, on a busy machine.
    assert moved(rows_of(life), "lport") == {each.port: (each.client["sent"], each.down) for each in scenario.transfers}
    assert moved(rows_of(life_of_server), "rport") == {
        each.port: (each.server["sent"], each.up) for each in scenario.transfers
    }
    assert moved(rows_of(top), "lport") == sent
    total = [row for row in rows_of(subnet) if row["total"]]
    assert moved(total, "network") == {network: tuple(map(sum, zip(*sent.values(), strict=True)))}


def test_the_rate_is_that_of_the_application(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = Transfer(connections=1, up=2_000_000, down=0, seconds=2)
    scenario.setup(lab)
    with run_tool("top", "--netns", str(lab.client.inode), "-i", "0.5") as top:
        scenario.fault(lab)
        scenario.settle(lab)
    rates = sorted(row["tx_bytes_per_s"] for row in rows_of(top))
    assert rates[len(rates) // 2] == pytest.approx(1_000_000, rel=0.15)


def rows_of(tool: RunningTool) -> list[dict[str, Any]]:
    assert tool.done and tool.done.stats and tool.done.stats["lost"] == 0
    return tool.done.rows


def moved(rows: Iterable[dict[str, Any]], key: str) -> dict[Any, tuple[int, int]]:
    """Bytes sent and received of each, over all rows."""
    up: Counter[Any] = Counter()
    down: Counter[Any] = Counter()
    for row in rows:
        up[row[key]] += row["tx_bytes"]
        down[row[key]] += row["rx_bytes"]
    return {each: (up[each], down[each]) for each in up}
