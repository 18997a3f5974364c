"""`rtt` against netem's delay, TCP_INFO and `ss -ti`: how long."""

from __future__ import annotations

import math
import re
from urllib.parse import unquote

import pytest

from tests.record import Script, Test, Watch, recorded
from tests.tools.rtt.site import FAMILIES, WATCH, Row, Seen, Site, delayed, ends_of, skip_without_netem, totals_of

SMOOTHED = Watch("rtt", "--by", "connection", "--smoothed", "--rport", "6550-6559")
"""At the clients' ends."""
NUMBER = 10


def smoothed(seen: Seen, port: int) -> Row:
    (row,) = [row for row in totals_of(seen, SMOOTHED) if row["rport"] == port]
    return row


@pytest.mark.parametrize(("ms", "port"), [(5, 6550), (50, 6553)])
@recorded(WATCH, SMOOTHED)
def test_a_path_of_known_delay(script: Script, ms: int, port: int) -> Test:
    site = Site(script)
    delays = delayed(script, ms)
    pairs = [site.new(port + i, family) for i, family in enumerate(FAMILIES)]
    for pair in pairs:
        pair.exchange(NUMBER)
    infos = {pair.port: pair.near.info() for pair in pairs}
    site.over()
    seen = yield
    skip_without_netem(seen, delays)
    site.watched(seen)
    raws = {ends_of(row): row for row in totals_of(seen, WATCH)}
    for pair in pairs:
        ends = pair.addresses_of(pair.near) + pair.numbers_of(pair.near)
        raw, smooth = raws[ends], smoothed(seen, pair.port)
        assert ends_of(smooth) == ends
        assert raw["count"] == smooth["count"] == NUMBER + 2
        slowest = max(pair.took_us)
        assert ms * 1000 <= raw["min_us"] <= raw["p50_us"] <= raw["p90_us"] <= raw["p99_us"] <= raw["max_us"] <= slowest
        # The acknowledgement comes with the answer at the latest.
        median = sorted(pair.took_us)[math.ceil(len(pair.took_us) / 2) - 1]
        assert raw["p50_us"] <= median * 9 / 8
        last = infos[pair.port].info["srtt_us"]
        assert ms * 1000 <= smooth["min_us"] <= last <= smooth["max_us"] <= slowest


@pytest.mark.parametrize(("older", "family", "port"), [(True, "6", 6557), (False, "4", 6558)])
@recorded(WATCH, SMOOTHED)
def test_smoothed_is_what_tcp_info_and_ss_show(script: Script, older: bool, family: str, port: int) -> Test:
    """After each answer, and when the FIN has been acknowledged, the test asks TCP_INFO: the values must be the same
    ones. A connection that is older than the tool gives none for what came before."""
    if older:
        with script.older():
            site = Site(script)
            pair = site.new(port, family)
            pair.exchange()
            pair.settle()
        infos = []
    else:
        site = Site(script)
        pair = site.new(port, family)
        infos = [pair.near.info()]
    for _ in range(30):
        pair.exchange()
        infos.append(pair.near.info())
    said, then = script.client.exec("ss", "-HtinO", f"dport = :{port}"), infos[-1]
    pair.exchange()
    infos.append(pair.near.info())
    pair.near.shutdown()
    pair.near.until_state("FIN_WAIT2")
    infos.append(pair.near.info())
    pair.far.until_end()
    pair.far.close()
    pair.near.until_end()
    pair.near.close()
    pair.gone()
    site.over()
    seen = yield
    site.watched(seen)
    shown = re.search(r" rtt:([\d.]+)/", unquote(said.data))
    assert shown is not None
    assert round(float(shown[1]) * 1000) == then.info["srtt_us"]
    row, values = smoothed(seen, port), sorted(call.info["srtt_us"] for call in infos)
    assert row["count"] == len(values)
    assert (row["min_us"], row["max_us"]) == (values[0], values[-1])
    assert row["mean_us"] == round(sum(values) / len(values), 1)
    for percent in (50, 90, 99):
        exact = values[math.ceil(percent / 100 * len(values)) - 1]
        assert abs(row[f"p{percent}_us"] - exact) <= exact / 8
    for low, high, number in row["histogram"]:
        assert sum(low <= value <= high for value in values) == number
