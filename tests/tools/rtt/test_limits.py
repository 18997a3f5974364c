"""`rtt` with more keys than it has room for."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import Lab
from tcpscope.tools import rtt
from tests.conftest import until
from tests.tools.rtt.site import Pair, Tools, all_ended


@pytest.mark.kernel
def test_more_keys_than_there_is_room_for(site: Lab) -> None:
    """Those that come first have all of their samples, the others none."""
    few = "--by connection --max-keys 2"
    with Tools(site.client, few=few, interval=f"{few} -i 1000", strict=f"{few} -i 1000 --strict") as tools:
        pairs = [Pair(site) for _ in range(10)]
        for pair in pairs:
            pair.exchange(3)
        all_ended(site, pairs)
        for name, status in (("few", 0), ("interval", 0), ("strict", 5)):
            rows = tools.done(name, status, lost=8 * 5)
            assert sorted((row["lport"], row["rport"]) for row in rows) == sorted(pair.ports for pair in pairs[:2])
            assert [row["count"] for row in rows] == [5, 5]


def test_totals_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections come without end: what has no total is counted, and its owner forgotten."""
    monkeypatch.setattr(rtt, "_TOTAL_KEYS", 2)
    names = iter(range(1, 7))

    def entries(*_: Any) -> list[tuple[bytes, Any, Any]]:
        """Two new keys with three samples of 5 us each."""
        found = []
        for number in (next(names), next(names)):
            address = bytes(10) + b"\xff\xff" + bytes([192, 0, 2, number])
            key = SimpleNamespace(pid=0, comm=bytes(16), laddr=address, lport=0, raddr=address, rport=0, cookie=number)
            buckets = struct.pack("<8I", 0, 0, 0, 0, 0, 3, 0, 0)
            found.append((b"", key, SimpleNamespace(
                buckets=buckets, sum_us=15, min_us=struct.pack("<I", 6), max_us=struct.pack("<I", 5),
                owner_pid=number, owner_comm=b"someone")))  # fmt: skip
        return found

    epoch = memoryview(bytearray(4))
    loaded = SimpleNamespace(memory=lambda name: epoch, entries=entries, delete=lambda *_: None)
    reader = rtt._Reader(SimpleNamespace(loaded=loaded, spec=Spec.of("rtt")), 1)
    takes = [reader.take() for _ in range(3)]
    assert [len(found) for found in takes] == [2, 2, 2]
    assert reader.total.keys() == takes[0].keys()
    assert (reader.samples, reader.without_total) == (18, 12)
    assert reader.owners.keys() == takes[0].keys() | takes[2].keys()


@pytest.mark.kernel
def test_each_interval_has_room_again(site: Lab) -> None:
    with Tools(site.server, one="--by connection --max-keys 1 -i 0.1") as tools:
        pairs = []
        for _ in range(4):
            pairs.append(Pair(site))
            all_ended(site, pairs[-1:])
            until(
                lambda: sum(r["count"] for r in tools.intervals("one") if r["lport"] == pairs[-1].port) == 2,
                "its samples in an interval",
            )
        assert {row["lport"]: row["count"] for row in tools.done("one")} == {pair.port: 2 for pair in pairs}
