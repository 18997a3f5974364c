"""`pktlat` against the clocks of both applications, and against the bytes that they moved.

A packet arrived after its send() began, and before the sender knew that it was acknowledged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import accumulate
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any

from tests.record import Call, Script, Test, Watch, recorded
from tests.record.script import RECVFROM, SO_REUSEADDR, SOL_SOCKET, TCP_FASTOPEN, Process, Socket

PORT, LEAST_PORT, DRAWN_PORT, NAMED_PORT = 6801, 6802, 6803, 6804
MSG_PEEK = 2
FAST_OPEN = 0x207  # client, server, neither needs a cookie
WAITS = Watch("pktlat", "--lport", f"{PORT}")
LONG = Watch("pktlat", "--lport", f"{LEAST_PORT}", "--min", "50ms", every_kernel=False)
DRAWN = Watch("pktlat", "--lport", f"{DRAWN_PORT}", "--histogram", "--by", "netns,comm")
NAMED = Watch("pktlat", "--lport", f"{NAMED_PORT}", "--comm", "heir", every_kernel=False)


@dataclass
class Reader:
    """A connection whose server reads. `sent` are the packets, `reads` the calls that took something."""

    server: Process
    near: Socket
    far: Socket
    sent: list[tuple[int, Call, Call]] = field(default_factory=list)
    reads: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, script: Script, port: int, family: str = "4", comm: str = "server") -> Reader:
        server, client = script.server.process(comm), script.client.process("client")
        listener = server.listener(port, None if family == "4" else "::", dual=family != "4", reuse_port=True)
        near = client.socket("6" if family == "6" else "4")
        near.connect(script.server.address("6" if family == "6" else "4"), port)
        near.option(IPPROTO_TCP, TCP_NODELAY, 1)
        far = listener.accept()
        listener.close()
        return cls(server, near, far)

    def send(self, *sizes: int) -> None:
        """Packets, one after the other."""
        for size in sizes:
            call = self.near.send_all(size)
            self.sent.append((size, call, self.near.until_acknowledged()))

    def read(self, *sizes: int, pause_us: int = 0) -> None:
        if pause_us:
            self.server.pause(pause_us)
        self.reads += [self.far.receive(size) for size in sizes]

    def check(
        self, rows: Sequence[dict[str, Any]], *, begin: int = 0, late_us: float = 0, all_before: bool = True
    ) -> None:
        """Each row is of the bytes behind those of the row before, and has the arrival of the first of them.

        begin       the first byte that a row is about
        late_us     the tool may have taken an arrival for so much earlier
        all_before  all was sent before the first read
        """
        sent_ends = list(accumulate(size for size, _, _ in self.sent))
        read_ends = list(accumulate(call.ret for call in self.reads))
        at = begin
        for row in rows:
            _, call, acknowledged = self.sent[_place(at, sent_ends)]
            read = self.reads[_place(at, read_ends)]
            assert at + row["taken_bytes"] <= read_ends[_place(at, read_ends)]
            least, most = read.begin_us - acknowledged.end_us, read.end_us - call.begin_us + late_us
            assert max(0, least - 1) <= row["wait_us"] <= most + 1, (at, row, least, most)
            assert read.begin_us <= read.end_us
            at += row["taken_bytes"]
            if all_before:
                assert row["left_bytes"] == sent_ends[-1] - at
        assert at == read_ends[-1]


def _place(byte: int, ends: Sequence[int]) -> int:
    return next(index for index, end in enumerate(ends) if byte < end)


def when(row: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(row["time"])


def least(rows: Iterable[dict[str, Any]]) -> int:
    return min(row["wait_us"] for row in rows)


@recorded(WAITS)
def test_a_reader_that_sleeps(script: Script) -> Test:
    """Several packets are queued. Each has waited since its own arrival."""
    reader = Reader.of(script, PORT)
    reader.send(1000, 1000, 1000)
    reader.read(1000, 1000, 1000, pause_us=20_000)
    reader.send(700, 1400)
    reader.read(700, 1400, pause_us=200_000)
    local = reader.near.name()
    seen = yield
    rows = seen.rows(WAITS, script.server)
    reader.check(rows, all_before=False)
    assert [row["taken_bytes"] for row in rows] == [1000, 1000, 1000, 700, 1400]
    assert [row["left_bytes"] for row in rows] == [2000, 1000, 0, 1400, 0]
    assert least(rows[:3]) >= 20_000
    assert least(rows[3:]) >= 200_000
    for row in rows:
        assert (row["pid"], row["comm"], row["tid"]) == (reader.server.pid, "server", reader.server.pid)
        assert (row["thread"], row["family"]) == ("server", 4)
        assert (row["laddr"], row["lport"]) == (script.server.ipv4, PORT)
        assert (row["raddr"], row["rport"]) == (script.client.ipv4, local.ret)


@recorded(WAITS)
def test_partial_reads(script: Script) -> Test:
    """What is left of a packet has waited since that packet came, not since the last one or the last read."""
    reader = Reader.of(script, PORT)
    for size in (1000, 1000, 500):
        reader.send(size)
        reader.server.pause(30_000)
    reader.read(400)
    reader.read(700, 900, 500, pause_us=10_000)
    seen = yield
    rows = seen.rows(WAITS, script.server)
    reader.check(rows)
    assert rows[0]["wait_us"] >= 90_000
    assert rows[1]["wait_us"] >= 100_000  # it begins with the first packet
    assert rows[-1]["wait_us"] >= 40_000


@recorded(WAITS)
def test_both_families(script: Script) -> Test:
    readers = [Reader.of(script, PORT, family) for family in ("6", "mapped")]
    for reader in readers:
        reader.send(100, 200)
        reader.read(100, 200, pause_us=20_000)
    ports = [reader.near.name() for reader in readers]
    seen = yield
    for reader, port, version in zip(readers, ports, (6, 4), strict=True):
        rows = seen.rows(WAITS, script.server, rport=port.ret)
        reader.check(rows)
        assert {row["family"] for row in rows} == {version}


@recorded(WAITS)
def test_peeking_takes_nothing(script: Script) -> Test:
    reader = Reader.of(script, PORT)
    reader.send(300)
    peeked = [reader.far.receive(300, MSG_PEEK) for _ in range(3)]
    reader.send(300)
    reader.server.pause(20_000)
    peeked.append(reader.far.receive(600, MSG_PEEK))
    reader.read(300, 300)
    seen = yield
    assert [call.ret for call in peeked] == [300, 300, 300, 600]
    rows = seen.rows(WAITS, script.server)
    reader.check(rows)
    assert [row["taken_bytes"] for row in rows] == [300, 300]


@recorded(WAITS)
def test_a_reader_that_waits_already(script: Script) -> Test:
    """Then the wait is that until it runs."""
    reader = Reader.of(script, PORT)
    reading = reader.far.receive(500, wait=False)
    script.server.until_waiting(RECVFROM, reader.server)
    reader.send(500)
    reading.join()
    seen = yield
    row = seen.row(WAITS, script.server)
    _, call, _ = reader.sent[0]
    assert (row["taken_bytes"], row["left_bytes"]) == (500, 0)
    assert 0 <= row["wait_us"] <= reading.end_us - call.begin_us + 1


@recorded(WAITS)
def test_threads(script: Script) -> Test:
    reader = Reader.of(script, PORT)
    reader.send(200)
    reader.read(100)
    thread = reader.server.thread()
    thread("write", "/proc/thread-self/comm", "second")
    reader.reads.append(thread.at(reader.far).receive(100))
    seen = yield
    rows = seen.rows(WAITS, script.server)
    reader.check(rows)
    assert [(row["pid"], row["comm"], row["thread"]) for row in rows] == [
        (reader.server.pid, "server", "server"),
        (reader.server.pid, "server", "second"),
    ]
    assert rows[0]["tid"] == reader.server.pid
    assert rows[1]["tid"] not in (None, reader.server.pid)


@recorded(WAITS)
def test_splice(script: Script) -> Test:
    """The FIN is no data, although a splice takes it with the last byte."""
    reader = Reader.of(script, PORT)
    reader.send(1000, 2000)
    reader.near.shutdown()
    reader.far.until_state("CLOSE_WAIT")
    reader.server.pause(20_000)
    reader.reads += [reader.far.splice(500), reader.far.splice(60_000)]
    end = reader.far.splice(1000)
    seen = yield
    assert ([call.ret for call in reader.reads], end.ret) == ([500, 2500], 0)
    rows = seen.rows(WAITS, script.server)
    reader.check(rows)
    assert least(rows) >= 20_000


@recorded(WAITS)
def test_after_shutdown(script: Script) -> Test:
    """This end has sent its FIN, and still receives."""
    reader = Reader.of(script, PORT)
    reader.send(100)
    reader.read(100)
    reader.far.shutdown()
    reader.near.until_state("CLOSE_WAIT")
    reader.server.pause(50_000)
    for _ in range(2):
        reader.send(1000, 1000)
        reader.read(1000, 700, 300, pause_us=20_000)
    seen = yield
    rows = seen.rows(WAITS, script.server)
    reader.check(rows, all_before=False)
    assert least(rows[1:]) >= 20_000


@recorded(WAITS)
def test_a_hole(script: Script) -> Test:
    """What came behind a hole waits for the application once the hole is filled."""
    reader = Reader.of(script, PORT)
    with script.client.losing():
        lost = reader.near.send_all(1000)
        reader.near.until_field("unacked", 1)
    behind = reader.near.send_all(1000)
    reader.far.until_received(2000)
    reader.read(1000, pause_us=20_000)
    reader.read(1000, pause_us=20_000)
    seen = yield
    assert (lost.ret, behind.ret) == (1000, 1000)
    rows = seen.rows(WAITS, script.server)
    assert sum(row["taken_bytes"] for row in rows) == 2000
    arrivals = {when(row) - timedelta(microseconds=row["wait_us"]) for row in rows}
    assert max(arrivals) - min(arrivals) <= timedelta(microseconds=2)
    assert least(rows) >= 20_000


@recorded(WAITS)
def test_more_packets_than_are_remembered(script: Script) -> Test:
    """Then some count as packets that came before them, by at most a seventh of the time for which all of them came."""
    reader = Reader.of(script, PORT)
    for number in range(60):
        reader.send(100)
        reader.server.pause(500 * (number % 7))
    reader.read(*[100] * 60, pause_us=20_000)
    seen = yield
    rows = seen.rows(WAITS, script.server)
    assert len(rows) == 60
    span_us = reader.sent[-1][2].end_us - reader.sent[0][1].begin_us
    reader.check(rows, late_us=span_us / 7)
    reader.sent, reader.reads = reader.sent[:1], reader.reads[:1]
    reader.check(rows[:1], all_before=False)  # the first is exact


@recorded(WAITS)
def test_an_older_connection(script: Script) -> Test:
    """When its unread data came is not known. The first read may as well be MSG_PEEK, and has no row."""
    with script.older():
        reader = Reader.of(script, PORT)
        reader.send(1000)
    reader.read(400, 300, 300)
    reader.send(500)
    reader.read(200, 300, pause_us=20_000)
    seen = yield
    rows = seen.rows(WAITS, script.server)
    assert [(row["taken_bytes"], row["wait_us"]) for row in rows[:2]] == [(300, None), (300, None)]
    reader.check(rows[2:], begin=1000, all_before=False)
    assert least(rows[2:]) >= 20_000


@recorded(WAITS)
def test_fast_open(script: Script) -> Test:
    """When the data of the SYN came is not known. What comes later is."""
    for host in script.hosts:
        host.sysctl("tcp_fastopen", FAST_OPEN)
    server = script.server.process("server")
    listener = server.listener(PORT)
    listener.option(IPPROTO_TCP, TCP_FASTOPEN, 5)
    near = script.client.process("client").socket()
    near.send_to("early", script.server.ipv4, PORT)
    near.until_state("ESTABLISHED")
    reader = Reader(server, near, listener.accept())
    reader.far.until_state("ESTABLISHED")
    early = reader.far.receive(5)
    reader.send(100)
    reader.read(100, pause_us=20_000)
    seen = yield
    assert early.ret == 5
    rows = seen.rows(WAITS, script.server)
    assert (rows[0]["taken_bytes"], rows[0]["wait_us"]) == (5, None)
    reader.check(rows[1:])
    assert least(rows[1:]) >= 20_000


@recorded(WAITS)
def test_a_socket_that_is_connected_again(script: Script) -> Test:
    """Its sequence numbers are others."""
    reader = Reader.of(script, PORT)
    reader.send(1000)
    reader.read(600)
    listener = script.client.process("other").listener(PORT + 90)
    reader.far.disconnect()
    reader.far.option(SOL_SOCKET, SO_REUSEADDR, 1)
    reader.far.bind(script.server.ipv4, PORT)
    reader.far.connect(script.client.ipv4, PORT + 90)
    again = Reader(reader.server, listener.accept(), reader.far)
    again.send(800)
    again.read(500, 300, pause_us=20_000)
    seen = yield
    rows = seen.rows(WAITS, script.server)
    reader.check(rows[:1])
    again.check(rows[1:])


@recorded(LONG)
def test_least_wait(script: Script) -> Test:
    """Shorter waits do not leave the kernel. Unknown ones are not long."""
    with script.older():
        older = Reader.of(script, LEAST_PORT)
        older.send(300)
    older.read(100, 100, 100)
    reader = Reader.of(script, LEAST_PORT)
    for _ in range(5):
        reader.send(100)
        reader.read(100)
        reader.send(200)
        reader.read(200, pause_us=60_000)
    seen = yield
    run = seen.run(LONG)
    rows = seen.rows(LONG)
    assert len([row for row in rows if row["taken_bytes"] == 200]) == 5
    assert all(row["wait_us"] >= 50_000 for row in run.rows)
    short = [
        read
        for (size, _, acknowledged), read in zip(reader.sent, reader.reads, strict=True)
        if size == 100 and read.end_us - acknowledged.begin_us < 50_000
    ]
    assert run.stats is not None
    assert run.stats["seen"] == run.stats["shown"] + run.stats["filtered"]
    assert run.stats["filtered"] >= len(short)


@recorded(DRAWN)
def test_histogram(script: Script) -> Test:
    """Counted in the kernel: two processes, one of which sleeps, and one whose waits are not known."""
    with script.older():
        older = Reader.of(script, DRAWN_PORT, comm="older")
        older.send(300)
    older.read(100, 100, 100)
    quick, slow = Reader.of(script, DRAWN_PORT, comm="quick"), Reader.of(script, DRAWN_PORT, comm="slow")
    with_pause = ((quick, 0, 30), (slow, 20_000, 10))
    for reader, pause_us, times in with_pause:
        for _ in range(times):
            reader.send(100)
            reader.read(100, pause_us=pause_us)
    seen = yield
    rows = {row["comm"]: row for row in seen.rows(DRAWN, script.server)}
    assert rows.keys() == {"quick", "slow", "older"}
    unknown = rows["older"]
    assert (unknown["count"], unknown["min_us"], unknown["mean_us"], unknown["histogram"]) == (2, None, None, [])
    for reader, pause_us, times in with_pause:
        row = rows[reader.server.comm]
        least_us = [read.begin_us - done.end_us for (*_, done), read in zip(reader.sent, reader.reads, strict=True)]
        most_us = [read.end_us - sent.begin_us for (_, sent, _), read in zip(reader.sent, reader.reads, strict=True)]
        assert row["total"]
        assert row["count"] == times == sum(count for *_, count in row["histogram"])
        assert max(pause_us, min(least_us) - 1) <= row["min_us"] <= min(most_us) + 1
        assert max(least_us) - 1 <= row["max_us"] <= max(most_us) + 1
        assert sum(least_us) / times - 1 <= row["mean_us"] <= sum(most_us) / times + 1
        assert row["min_us"] <= row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["max_us"]


@recorded(NAMED)
def test_the_process_that_reads(script: Script) -> Test:
    """Not the one that accepted: a child has inherited the socket."""
    reader = Reader.of(script, NAMED_PORT)
    heir = reader.server.fork("heir")
    reader.send(500)
    reader.read(200)
    reader.reads.append(heir.at(reader.far).receive(300))
    seen = yield
    row = seen.row(NAMED, script.server)
    assert (row["pid"], row["comm"], row["taken_bytes"]) == (heir.pid, "heir", 300)
    run = seen.run(NAMED)
    assert run.stats is not None
    assert run.stats["filtered"] >= 1
