"""`connlat` against the client's own clock, and its summaries against its rows.

The same connections pass four tools at a time: one shows each, one only the slow ones, two put them together.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import mean
from typing import NamedTuple

import pytest

from tcpscope.lab.hosts import Lab, held
from tcpscope.tools.connlat import microseconds
from tests.conftest import CompletedRun, RunningTool, until
from tests.puppets import Puppet

SILENT, NOWHERE = "198.51.100.7", "203.0.113.7"
QUICK, SLOW, REFUSED, GIVEN_UP, UNROUTED, OLDER = 6000, 6001, 6002, 6003, 6004, 6005
TIMES = 20
LEAST_US = 500_000

# What the client saw of each connection: its remote port, and the time that it took, at least and at most.
CALLS = r"""
import select
saw = []
def connect(address, port):
    global s, after
    s = socket.socket()
    begin = time.monotonic()
    s.setblocking(False)
    s.connect_ex((address, port))
    after = time.monotonic()
    return begin
def finish(begin, port, least=0):
    global syn_retrans
    poll = select.poll()
    poll.register(s, select.POLLOUT)
    poll.poll()
    # Takes the socket's lock, so whatever woke us up has done its work. No data was sent: tcpi_total_retrans are SYNs,
    # and tcpi_rtt, if there is one, is that of the SYN, which is a part of the latency; of a repeated one it is in ms.
    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    syn_retrans, = struct.unpack_from("I", info, 100)
    if not syn_retrans:
        least = max(least, struct.unpack_from("I", info, 68)[0] / 1e6)
    saw.append((port, least, time.monotonic() - begin))
    s.close()
def several(address, port, times):
    for _ in range(times):
        finish(connect(address, port), port)
"""


class Seen(NamedTuple):
    rows: CompletedRun
    slow: CompletedRun
    whole: CompletedRun
    drawn: CompletedRun
    least: dict[int, list[float]]  # us, by remote port
    saw: dict[int, list[float]]  # at most
    syn_retrans: int  # of the slow one


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with Lab() as lab, ExitStack() as stack:
        lab.server.blackhole("198.51.100.0/24")
        client, here = Puppet(lab.client, "client"), ("--netns", str(lab.client.inode))
        address = lab.server.ipv4
        for port in (QUICK, SLOW):
            listener = lab.server.socket(socket.AF_INET)
            listener.bind((address, port))
            listener.listen(2 * TIMES)
        client.do(CALLS)
        lab.client.sysctl("tcp_syn_retries", 10)  # however long it takes, the client gives up, not the kernel
        client.do("connect(address, port); older = s", address=SILENT, port=OLDER)
        started = [
            RunningTool("connlat", *here),
            RunningTool("connlat", "--min", "0.5s", *here),
            RunningTool("connlat", "--histogram", "--by", "outcome,rport", "-i", "0.5", *here),
            RunningTool("connlat", "--histogram", "--time", "none", "-o", "table", *here),
        ]
        tools = [stack.enter_context(tool) for tool in started]
        client.do("several(address, port, times)", address=address, port=QUICK, times=TIMES)
        client.do("several(address, port, times)", address=address, port=REFUSED, times=TIMES)
        for port in (QUICK, REFUSED):  # the answer is kept back: it takes so long at least
            with held(lab.server):
                client.do("begin = connect(address, port); select.select([], [], [], 0.05)\n"
                          "least = time.monotonic() - after", address=address, port=port)  # fmt: skip
            client.do("finish(begin, port, least)", port=port)
        with held(lab.server):
            client.do("begin = connect(address, port)", address=address, port=SLOW)
            until(lambda: any(s.rport == SLOW and s.retransmits for s in lab.client.sockets()), "a second SYN")
            client.do("least = time.monotonic() - after")
        client.do("finish(begin, port, least)", port=SLOW)
        syn_retrans = client.ask("syn_retrans")
        client.do(
            "begin = connect(address, port); select.select([], [], [], 0.6)\n"
            "least = time.monotonic() - after; s.close()\n"
            "saw.append((port, least, time.monotonic() - begin))",
            address=SILENT, port=GIVEN_UP,
        )  # fmt: skip
        client.do("finish(connect(address, port), port); older.close()", address=NOWHERE, port=UNROUTED)
        tools[0].wait_for(lambda rows: len(rows) >= 2 * TIMES + 6)
        least: dict[int, list[float]] = {}
        saw: dict[int, list[float]] = {}
        for port, *spans in client.ask("saw"):
            for where, span in zip((least, saw), spans, strict=True):
                where.setdefault(port, []).append(span * 1e6)
        done = [tool.stop() for tool in tools]
        assert [run.status for run in done] == [0] * 4
        yield Seen(*done, least, saw, syn_retrans)


def latencies(run: CompletedRun, port: int) -> list[int | None]:
    return [row["latency_us"] for row in run.rows if row["rport"] == port]


@pytest.mark.kernel
def test_latency(seen: Seen) -> None:
    for port, spans in seen.saw.items():
        found = latencies(seen.rows, port)
        assert len(found) == len(spans)
        if port == UNROUTED:
            assert found == [None]
            continue
        assert all(us <= span + 1 for us, span in zip(found, spans, strict=True)), (port, found, spans)
        assert all(us >= span - 1 for us, span in zip(found, seen.least[port], strict=True)), (port, found, seen.least)
    assert latencies(seen.rows, OLDER) == [None]
    assert [max(seen.least[port]) >= 50_000 for port in (QUICK, REFUSED)] == [True, True]
    assert max(seen.least[QUICK][:TIMES]) > 0
    assert min(latencies(seen.rows, SLOW)) >= 900_000
    assert min(seen.least[GIVEN_UP]) >= 590_000
    assert [row["syn_retrans"] for row in seen.rows.rows if row["rport"] == SLOW] == [seen.syn_retrans]
    assert seen.syn_retrans >= 1


@pytest.mark.kernel
def test_only_the_slow_ones(seen: Seen) -> None:
    """What has no latency is not slow."""
    slow = Counter(row["rport"] for row in seen.slow.rows)
    may_be = Counter({port: sum(span + 1 >= LEAST_US for span in spans) for port, spans in seen.saw.items()})
    del may_be[UNROUTED]
    assert {SLOW, GIVEN_UP} <= slow.keys()
    assert slow <= may_be  # the others only where the machine was slow
    assert all(row["latency_us"] >= LEAST_US for row in seen.slow.rows)
    assert seen.slow.stats is not None
    assert seen.slow.stats["seen"] - seen.slow.stats["filtered"] == slow.total()


@pytest.mark.kernel
def test_histogram(seen: Seen) -> None:
    """By outcome and port, so that each kind is one that the client has measured."""
    whole = {row["rport"]: row for row in seen.whole.rows if row["total"]}
    outcomes = {QUICK: "ESTABLISHED", SLOW: "ESTABLISHED", REFUSED: "REFUSED", GIVEN_UP: "ABORTED",
                UNROUTED: "UNREACHABLE", OLDER: "ABORTED"}  # fmt: skip
    assert {port: row["outcome"] for port, row in whole.items()} == outcomes
    for port, row in whole.items():
        assert row["count"] == len(seen.saw.get(port, [0]))
        if port in (UNROUTED, OLDER):
            assert row["min_us"] is row["max_us"] is row["mean_us"] is row["p50_us"] is None
            assert row["histogram"] == []
            continue
        assert sum(count for *_, count in row["histogram"]) == row["count"]
        assert row["min_us"] <= row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["max_us"]
        assert row["min_us"] <= min(seen.saw[port]) + 1
        assert row["max_us"] <= max(seen.saw[port]) + 1
        assert row["mean_us"] <= mean(seen.saw[port]) + 1
    assert whole[SLOW]["min_us"] == whole[SLOW]["max_us"] >= 900_000
    parts: dict[int, int] = {}
    for row in seen.whole.rows:
        if not row["total"]:
            parts[row["rport"]] = parts.get(row["rport"], 0) + row["count"]
    assert parts == {port: row["count"] for port, row in whole.items()}


@pytest.mark.kernel
def test_histogram_is_drawn(seen: Seen) -> None:
    lines = seen.drawn.stdout.splitlines()
    assert lines[0].split()[:2] == ["OUTCOME", "COUNT"]
    kinds = [line.split()[:2] for line in lines[1:] if line[:1].isalpha()]
    counts = {"ESTABLISHED": TIMES + 2, "REFUSED": TIMES + 1, "ABORTED": 2, "UNREACHABLE": 1}
    assert kinds == [[outcome, str(count)] for outcome, count in counts.items()]
    drawn = sum(int(line.partition(":")[2].split()[0]) for line in lines if " -> " in line)
    assert drawn == 2 * TIMES + 4  # those that have a latency
    assert "*" * 40 in seen.drawn.stdout


def test_times_with_units() -> None:
    assert [microseconds(text) for text in ("300us", "10ms", "1.5s", " 2s ", "0us", "0.5ms")] == [
        300, 10_000, 1_500_000, 2_000_000, 0, 500,
    ]  # fmt: skip
