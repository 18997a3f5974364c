"""`rtt` against the exchanges really made and the acknowledgements received: how many samples."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.record import Call, Script, Socket, Test, recorded
from tests.tools.rtt.site import FAMILIES, WATCH, Site, count, skip_without_netem

MSG_EOR, MSG_DONTWAIT = 0x80, 0x40
AF_PACKET, SOCK_DGRAM, ETH_P_IP = 17, 2, 0x0800
TCPOPT_EOL, TCPOPT_NOP, TCPOPT_SACK = 0, 1, 5
PORT = 6500
WAYS = [(*way, PORT + number) for number, way in enumerate(itertools.product(FAMILIES, ("client", "server")))]


@pytest.mark.parametrize(("family", "first", "port"), WAYS)
@recorded(WATCH)
def test_every_exchange_is_one_sample_at_each_end(script: Script, family: str, first: str, port: int) -> Test:
    site = Site(script)
    listener = site.listen(port, family)
    for requests in (0, 1, 2, 7, 60):
        pair = site.pair(port, listener, family)
        pair.exchange(requests)
        pair.end(first)
    site.over()
    seen = yield
    rows = site.watched(seen)
    for pair in site.pairs:
        assert [count(rows[end]) for end in pair.ends] == [pair.samples] * 2
        at_client = rows[pair.near]
        assert max(row["max_us"] for row in at_client) <= max(pair.took_us)
        assert sum(row["mean_us"] * row["count"] for row in at_client) <= sum(pair.took_us) + len(at_client)


@recorded(WATCH)
def test_none_for_what_is_received(script: Script) -> Test:
    """Of a receiver only the handshake and the FIN are acknowledged."""
    site = Site(script)
    pair = site.new(PORT + 10)
    for _ in range(100):
        sent = pair.near.send_all(5000, wait=False)
        pair.far.read(5000)
        sent.join()
    site.over()
    seen = yield
    rows = site.watched(seen)
    assert count(rows[pair.far]) == 2
    assert count(rows[pair.near]) > 2


@recorded(WATCH)
def test_none_from_before_the_tool(script: Script) -> Test:
    with script.older():
        site = Site(script)
        pair = site.new(PORT + 11)
        pair.exchange(20)
        pair.settle()
    pair.exchange(10)
    site.over()
    seen = yield
    rows = site.watched(seen)
    assert [count(rows[end]) for end in pair.ends] == [10 + 1] * 2


@recorded(WATCH)
def test_one_connection_although_its_cookie_comes_late(script: Script) -> Test:
    """5.10 gives a socket its cookie when somebody asks for it."""
    site = Site(script)
    pair = site.new(PORT + 12)
    pair.exchange(2)
    cookie = pair.far.cookie()
    pair.exchange(2)
    site.over()
    seen = yield
    rows = site.watched(seen)
    assert [count(rows[end]) for end in pair.ends] == [pair.samples] * 2
    assert {row["cookie"] for row in rows[pair.far]} == {cookie.ret if seen.machine.gives_cookies else None}


@recorded(WATCH)
def test_a_connection_that_one_side_has_closed(script: Script) -> Test:
    site = Site(script)
    pair = site.new(PORT + 13)
    pair.near.shutdown()
    end = pair.far.until_end()
    for _ in range(20):
        pair.far.send("answer")
        pair.near.read(6)
        pair.far.until_acknowledged()
    pair.far.close()
    pair.near.until_end()
    pair.near.close()
    pair.gone()
    site.over()
    seen = yield
    assert end.ret == 0
    rows = site.watched(seen)
    # Without functions to hook there is a look at each change of state only: the last answer, and the FIN.
    assert count(rows[pair.far]) == (1 + 20 + 1 if seen.machine.functions_can_be_hooked else 1 + 2)
    assert count(rows[pair.near]) == 2


@recorded(WATCH)
def test_one_held_back_for_a_time_we_know(script: Script) -> Test:
    site = Site(script)
    pair = site.new(PORT + 14)
    pair.exchange(3)
    with script.server.held():
        sent = pair.near.send("request")
        pair.far.read(7)
        pair.far.send("answer")
        site.client.pause(300_000)
        released = site.client.now()
    got = pair.near.read(6)
    pair.exchanges += 1
    site.over()
    seen = yield
    rows = site.watched(seen)
    assert [count(rows[end]) for end in pair.ends] == [pair.samples] * 2
    at_client = rows[pair.near]
    other = max(pair.took_us)  # without the one that is held back
    held_us = released.begin_us - sent.end_us
    assert held_us >= 300_000
    assert held_us <= max(row["max_us"] for row in at_client) <= max(got.end_us - sent.begin_us, other)
    longest = max(high for row in at_client for _, high, number in row["histogram"] if number)
    others = [high for row in at_client for _, high, number in row["histogram"] for _ in range(number)]
    others.remove(longest)
    assert max(others) <= 2 * other  # the end of an octave


@recorded(WATCH)
def test_intervals_sum_to_the_total(script: Script) -> Test:
    """The traffic runs over the borders; how the intervals sum is checked for all connections of WATCH."""
    site = Site(script)
    pairs = [site.new(PORT + 15), site.new(PORT + 16, "6")]
    for intervals in (1, 2, 3):
        for pair in pairs:
            pair.exchange(2)  # what the first of them measures is seen when the second comes
        for pair in pairs:
            for lport, rport in map(pair.ports_of, pair.ends):
                site.until_rows(WATCH, intervals, lport=lport, rport=rport)
    site.over()
    seen = yield
    rows = site.watched(seen)
    for pair in pairs:
        for end in pair.ends:
            assert count(rows[end]) == pair.samples
            assert len(rows[end]) >= 3


@recorded(WATCH)
def test_packets_sent_together_are_told_apart(script: Script) -> Test:
    """Two packets that one acknowledgement let out have the same time stamp; each is acknowledged by its own."""
    site = Site(script)
    site.route("4", "quickack", "1")  # each is acknowledged at once
    delays = [script.client.netem(20)]
    for process in (site.client, site.server):
        process("processor", 0)  # from two processors packets would overtake each other
    received = capture(site)
    pair = site.new(PORT + 17)
    for _ in range(60):  # more than the first window: the others wait for acknowledgements
        pair.near.send("x" * 100, MSG_EOR)
    pair.near.until_acknowledged()
    pair.far.until_received(6000)
    pair.near.close()
    script.client.until_sockets(state="FIN_WAIT2")
    packets = [received.receive(flags=MSG_DONTWAIT, may_fail=True) for _ in range(150)]
    pair.far.until_end()
    pair.far.close()
    pair.gone()
    site.over()
    seen = yield
    skip_without_netem(seen, delays)
    assert packets[-1].errno == "EAGAIN"
    number = newer(packets, script.server.ipv4)
    assert number > 12
    rows = site.watched(seen)
    assert count(rows[pair.near]) == number


def capture(site: Site) -> Socket:
    """A socket with the IPv4 packets that the client's host receives."""
    made = Socket(site.client, site.client.slot())
    made.made = site.client("socket", made.slot, AF_PACKET, SOCK_DGRAM, socket.htons(ETH_P_IP))
    return made


def newer(packets: list[Call], source: str) -> int:
    """How many packets of `source` acknowledged, also selectively, what was newer than all before."""
    count, newest = 0, None
    for data in (bytes.fromhex(packet.data) for packet in packets if packet.ret > 0):
        if data[9] != socket.IPPROTO_TCP or data[12:16] != socket.inet_aton(source):
            continue
        numbers = list(acknowledged(data[(data[0] & 15) * 4 :]))
        if newest is None:
            newest = numbers[0] - 1
        ahead = max((number - newest + (1 << 31)) % (1 << 32) for number in numbers) - (1 << 31)
        if ahead > 0:
            count, newest = count + 1, newest + ahead
    return count


def acknowledged(header: bytes) -> Iterator[int]:
    """The acknowledgement number of a TCP header, and the ends of its SACK blocks: packets overtake each other."""
    yield from struct.unpack_from("!I", header, 8)
    at, end = 20, (header[12] >> 4) * 4
    while at < end and header[at] != TCPOPT_EOL:
        if header[at] == TCPOPT_NOP:
            at += 1
            continue
        if header[at] == TCPOPT_SACK:
            for _, last in struct.iter_unpack("!II", header[at + 2 : at + header[at + 1]]):
                yield last
        at += header[at + 1]
