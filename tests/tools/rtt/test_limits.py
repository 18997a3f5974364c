"""`rtt` with more keys than it has room for."""

from __future__ import annotations

import re
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope import tool
from tcpscope.errors import TcpscopeError
from tcpscope.kernel.spec import Spec
from tcpscope.request import Request
from tcpscope.tools import rtt
from tests.record import Script, Test, Watch, recorded
from tests.tools.rtt.site import WATCH, Site, count, rows_of, totals_of

MANY, TURNS = 6570, 6571
FEW = ("--by", "connection", "--max-keys", "2", "--lport", str(MANY))
WATCHES = {
    Watch("rtt", *FEW, every_kernel=False): 0,
    Watch("rtt", *FEW, "-i", "86400", every_kernel=False): 0,
    Watch("rtt", *FEW, "-i", "86400", "--strict", every_kernel=False): 5,
}
"""Their exit status."""
ONE = Watch("rtt", "--by", "connection", "--max-keys", "1", "-i", "0.1", "--lport", str(TURNS), every_kernel=False)


@recorded(WATCH, *WATCHES)
def test_more_keys_than_there_is_room_for(script: Script) -> Test:
    """Those that come first have all of their samples, the others none."""
    site = Site(script)
    listener = site.listen(MANY)
    for _ in range(10):
        site.pair(MANY, listener)
    for pair in site.pairs:
        pair.exchange(3)
    site.over()
    seen = yield
    site.watched(seen)
    first = sorted(pair.numbers_of(pair.far) for pair in site.pairs[:2])
    for watch, status in WATCHES.items():
        rows = totals_of(seen, watch, status=status, lost=8 * 5)
        assert sorted((row["lport"], row["rport"]) for row in rows) == first
        assert [row["count"] for row in rows] == [5, 5]


def test_totals_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections come without end: what has no total is counted, and its owner forgotten."""
    monkeypatch.setattr(rtt, "_TOTAL_KEYS", 2)
    names = iter(range(1, 7))

    def entries(*_: Any, take: bool) -> list[tuple[Any, Any]]:
        """Two new keys with three samples of 5 us each."""
        found = []
        for number in (next(names), next(names)):
            address = bytes(10) + b"\xff\xff" + bytes([192, 0, 2, number])
            key = SimpleNamespace(pid=0, comm=bytes(16), laddr=address, lport=0, raddr=address, rport=0, cookie=number)
            buckets = struct.pack("<8I", 0, 0, 0, 0, 0, 3, 0, 0)
            found.append(
                (
                    key,
                    SimpleNamespace(
                        buckets=buckets,
                        total=15,
                        min=struct.pack("<I", 6),
                        max=struct.pack("<I", 5),
                        owner_pid=number,
                        owner_comm=b"someone",
                    ),
                )
            )
        return found

    epoch = memoryview(bytearray(4))
    loaded = SimpleNamespace(memory=lambda name: epoch, entries=entries, spec=Spec.of("rtt"))
    reader = rtt._Reader(SimpleNamespace(loaded=loaded), 1)
    takes = [reader.take() for _ in range(3)]
    assert [len(found) for found in takes] == [2, 2, 2]
    assert reader.total.keys() == takes[0].keys()
    assert (reader.samples, reader.without_total) == (18, 12)
    assert reader.owners.keys() == takes[0].keys() | takes[2].keys()


@recorded(WATCH, ONE)
def test_each_interval_has_room_again(script: Script) -> Test:
    """Each sample comes when the one before has been shown."""
    site = Site(script)
    listener = site.listen(TURNS)
    for _ in range(4):
        pair = site.pair(TURNS, listener)
        site.until_rows(ONE, 1, rport=pair.local)
        pair.end()
        site.until_rows(ONE, 2, rport=pair.local)
    site.over()
    seen = yield
    site.watched(seen)
    rows, ends = rows_of(seen, ONE), [pair.numbers_of(pair.far) for pair in site.pairs]
    assert [(row["lport"], row["rport"]) for row in rows if not row["total"]] == [end for end in ends for _ in (1, 2)]
    assert {(row["lport"], row["rport"]): row["count"] for row in rows if row["total"]} == dict.fromkeys(ends, 2)
    assert count(rows) == 2 * 2 * 4


def test_much_memory_is_said_and_too_much_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtt, "available_memory", lambda: 8_000_000_000)
    assert rtt._memory_note(4096) == []
    (line,) = rtt._memory_note(1 << 20)
    assert re.fullmatch(r"--max-keys 1048576 takes 2,[5-9]\d\d MB of the kernel's memory", line)
    monkeypatch.setattr(rtt, "available_memory", lambda: 4_000_000_000)
    with pytest.raises(TcpscopeError, match=r"4,000 MB are free: at most 7\d{5} keys fit"):
        rtt._memory_note(1 << 20)
    monkeypatch.setattr(rtt, "available_memory", lambda: None)
    assert len(rtt._memory_note(1 << 20)) == 1


@pytest.mark.kernel
def test_the_memory_is_what_was_said() -> None:
    """As the kernel reports it for the maps."""
    keys = 1 << 16
    by_address, one_group = (
        tool.find("rtt").open(Request(output="json", options=options(by=by, max_keys=keys if by != "none" else None)))
        for by in ("raddr", "none")
    )
    with by_address, one_group:
        (line,) = by_address.notes
        said = float(line.split()[3].replace(",", ""))
        assert one_group.notes == []
        (more,), (less,) = (run.sessions for run in (by_address, one_group))
        assert said == pytest.approx((more.loaded.kernel_bytes - less.loaded.kernel_bytes) / 1e6, rel=0.05)


def options(**given: Any) -> dict[str, Any]:
    return {option.name: option.unset for option in tool.find("rtt").options} | given
