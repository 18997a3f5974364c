"""`rtt` against netem's delay, TCP_INFO and `ss -ti`: how long."""

from __future__ import annotations

import math
import re
import subprocess
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import DEADLINE
from tests.tools.rtt.site import FAMILIES, Pair, Tools, all_ended, delay

pytestmark = pytest.mark.kernel


def test_a_path_of_known_delay(site: Lab) -> None:
    number = 10
    with Tools(site.client, raw="--by rport", smooth="--by rport --smoothed") as tools, ExitStack() as stack:
        pairs: dict[Pair, int] = {}
        for ms in (5, 50):
            for host in site.hosts:
                delay(host, ms / 2)
                stack.callback(host.netem)
            made = [Pair(site, family) for family in FAMILIES]
            for pair in made:
                pair.exchange(number)
            all_ended(site, made)
            pairs |= dict.fromkeys(made, ms)
            stack.close()
        raws = {row["rport"]: row for row in tools.done("raw")}
        smooths = {row["rport"]: row for row in tools.done("smooth")}
    for pair, ms in pairs.items():
        raw, smooth = raws[pair.port], smooths[pair.port]
        assert raw["count"] == smooth["count"] == number + 2
        slowest = max(pair.took_us)
        assert ms * 1000 <= raw["min_us"] <= raw["p50_us"] <= raw["p90_us"] <= raw["p99_us"] <= raw["max_us"] <= slowest
        # The acknowledgement comes with the answer at the latest.
        median = sorted(pair.took_us)[math.ceil(len(pair.took_us) / 2) - 1]
        assert raw["p50_us"] <= median * 9 / 8
        assert ms * 1000 <= smooth["min_us"] <= pair.smoothed[-1] <= smooth["max_us"] <= slowest


def test_smoothed_is_what_tcp_info_and_ss_show(site: Lab) -> None:
    """After each answer the test asks TCP_INFO: the values must be the same ones. A connection that is older than the
    tool gives none for its handshake. The last exchange is seen at the next segment."""
    older = Pair(site, "6")
    older.exchange()
    with Tools(site.client, smooth="--by connection --smoothed") as tools:
        younger = Pair(site)
        for pair in (older, younger):
            pair.exchange(30)
        child = site.client.spawn(["ss", "-HtinO", f"dport = :{older.port}"], stdout=subprocess.PIPE, text=True)
        text = child.communicate(timeout=DEADLINE)[0]
        for pair in (older, younger):
            pair.exchange()
        rows = {row["rport"]: row for row in tools.done("smooth")}
    assert round(float(re.search(r" rtt:([\d.]+)/", text)[1]) * 1000) == older.smoothed[-2]  # type: ignore[index]
    assert rows.keys() == {older.port, younger.port}
    for pair, seen in ((older, older.smoothed[2:]), (younger, younger.smoothed)):
        row = rows[pair.port]
        # That of the last one has come if the answer was not the acknowledgement itself.
        assert row["count"] in (len(seen) - 1, len(seen))
        seen = seen[: row["count"]]
        assert (row["min_us"], row["max_us"]) == (min(seen), max(seen))
        assert row["mean_us"] == round(sum(seen) / len(seen), 1)
        for percent in (50, 90, 99):
            exact = sorted(seen)[math.ceil(percent / 100 * len(seen)) - 1]
            assert abs(row[f"p{percent}_us"] - exact) <= exact / 8
        for low, high, count in row["histogram"]:
            assert sum(low <= value <= high for value in seen) == count
    all_ended(site, [older, younger])
