"""`rtt` against the exchanges really made and the acknowledgements received: how many samples.

Two tools watch the hosts of a lab for all tests here; each connection has a port of its own.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
import time
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Host, held
from tests.conftest import until
from tests.lacks import functions_cannot_be_hooked
from tests.tools.rtt.site import FAMILIES, Pair, Tcp, Watch, all_ended, delay, listen

pytestmark = pytest.mark.kernel

MSG_EOR = 0x80
SO_COOKIE = 57
TCPOPT_EOL, TCPOPT_NOP, TCPOPT_SACK = 0, 1, 5


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_exchange_is_one_sample_at_each_end(watch: Watch, family: str, first: str) -> None:
    lab, listener = watch.lab, listen(watch.lab, family)
    pairs = [watch.pair(family, listener) for _ in range(5)]
    for pair, requests in zip(pairs, (0, 1, 2, 7, 60), strict=True):
        pair.exchange(requests)
        all_ended(lab, [pair], first)
    for pair in pairs:
        at_client = watch.rows(lab.client, pair, pair.samples)
        at_server = watch.rows(lab.server, pair, pair.samples)
        client, server = lab.client.address(pair.kind), lab.server.address(pair.kind)
        assert {(row["laddr"], row["raddr"]) for row in at_client} == {(client, server)}
        assert {(row["laddr"], row["raddr"]) for row in at_server} == {(server, client)}
        assert max(row["max_us"] for row in at_client) <= max(pair.took_us)
        assert sum(row["mean_us"] * row["count"] for row in at_client) <= sum(pair.took_us) + len(at_client)


def test_none_for_what_is_received(watch: Watch) -> None:
    """Of a receiver only the handshake and the FIN are acknowledged."""
    pair = watch.pair()
    for _ in range(100):
        pair.near.sendall(b"x" * 5000)
        left = 5000
        while left:
            left -= len(pair.far.recv(left))
    all_ended(watch.lab, [pair])
    watch.rows(watch.lab.server, pair, 2)


def test_none_from_before_the_tool(watch: Watch, older: list[Pair]) -> None:
    pair = watch.add(older[0])
    pair.exchange(10)
    all_ended(watch.lab, [pair])
    for host in watch.lab.hosts:
        watch.rows(host, pair, 10 + 1)


def test_one_connection_although_its_cookie_comes_late(watch: Watch) -> None:
    """5.10 gives a socket its cookie when somebody asks for it."""
    pair = watch.pair()
    pair.exchange(2)
    cookie = struct.unpack("Q", pair.far.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
    pair.exchange(2)
    all_ended(watch.lab, [pair])
    rows = watch.rows(watch.lab.server, pair, pair.samples)
    assert {row["cookie"] for row in rows} <= {cookie, None}


def test_a_connection_that_one_side_has_closed(watch: Watch) -> None:
    server = watch.lab.server
    pair = watch.pair()
    pair.near.shutdown(socket.SHUT_WR)
    assert pair.far.recv(1) == b""
    for _ in range(20):
        pair.far.sendall(b"answer")
        assert pair.near.recv(100) == b"answer"
        until(lambda: Tcp(pair.far).unacked == 0, "an acknowledgement")
    pair.far.close()
    until(lambda: pair.near.recv(1) == b"", "the end")
    pair.near.close()
    until(lambda: not any(s.lport == pair.port and s.state == "LAST_ACK" for s in server.sockets()), "the end")
    # Without functions to hook there is a look at each change of state only: the last answer, and the FIN.
    watch.rows(server, pair, 1 + 2 if functions_cannot_be_hooked() else 1 + 20 + 1)


def test_one_held_back_for_a_time_we_know(watch: Watch) -> None:
    pair = watch.pair()
    pair.exchange(3)
    with held(watch.lab.server):
        begin = time.monotonic()
        pair.near.send(b"request")
        sent = time.monotonic()
        assert pair.far.recv(100) == b"request"
        pair.far.send(b"answer")
        until(lambda: time.monotonic() > sent + 0.3, "time to pass")
        released = time.monotonic()
    assert pair.near.recv(100) == b"answer"
    end = time.monotonic()
    pair.exchanges += 1
    all_ended(watch.lab, [pair])
    rows = watch.rows(watch.lab.client, pair, pair.samples)
    other = max(pair.took_us)  # without the one that is held back
    assert (released - sent) * 1e6 <= max(row["max_us"] for row in rows) <= max((end - begin) * 1e6, other)
    longest = max(high for row in rows for _, high, count in row["histogram"] if count)
    others = [high for row in rows for _, high, count in row["histogram"] for _ in range(count)]
    others.remove(longest)
    assert max(others) <= 2 * other  # the end of an octave


def test_intervals_sum_to_the_total(watch: Watch) -> None:
    """The traffic runs over the borders; how the intervals sum is checked for all connections of `watch`."""
    pairs = [watch.pair(), watch.pair("6")]

    def over_borders() -> bool:
        for pair in pairs:
            pair.exchange()
        return all(len(watch.so_far(host, pair)) > 2 for pair in pairs for host in watch.lab.hosts)

    until(over_borders, "samples of each in three intervals")
    all_ended(watch.lab, pairs)
    for pair in pairs:
        for host in watch.lab.hosts:
            watch.rows(host, pair, pair.samples)


def acknowledge(made: socket.socket) -> bool:
    """At once, for a while, and not every second segment."""
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return True


def unread(made: socket.socket) -> int:
    (number,) = struct.unpack("i", fcntl.ioctl(made, termios.FIONREAD, b"    "))
    return int(number)


class Capture:
    """What the TCP packets that a host receives acknowledge, in their order."""

    def __init__(self, host: Host) -> None:
        self._packets = host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        self._packets.setblocking(False)

    def newer(self) -> int:
        """How many of them acknowledged, also selectively, what was newer than all before."""
        count, newest = 0, None
        while select.select([self._packets], [], [], 0)[0]:
            data, (_, _, kind, *_) = self._packets.recvfrom(1 << 16)
            if kind != socket.PACKET_HOST or data[9] != socket.IPPROTO_TCP:
                continue
            numbers = acknowledged(data[(data[0] & 15) * 4 :])
            if newest is None:
                newest = numbers[0] - 1
            ahead = max((number - newest + (1 << 31)) % (1 << 32) for number in numbers) - (1 << 31)
            if ahead > 0:
                count, newest = count + 1, newest + ahead
        return count


def acknowledged(header: bytes) -> list[int]:
    """The acknowledgement number of a TCP header, and the ends of its SACK blocks: packets overtake each other."""
    numbers, at, end = [*struct.unpack_from("!I", header, 8)], 20, (header[12] >> 4) * 4
    while at < end and header[at] != TCPOPT_EOL:
        if header[at] == TCPOPT_NOP:
            at += 1
            continue
        if header[at] == TCPOPT_SACK:
            numbers += [last for _, last in struct.iter_unpack("!II", header[at + 2 : at + header[at + 1]])]
        at += header[at + 1]
    return numbers


def test_packets_sent_together_are_told_apart(watch: Watch) -> None:
    """Two packets that one acknowledgement let out have the same time stamp; each is acknowledged by its own."""
    client = watch.lab.client
    with ExitStack() as stack:
        delay(client, 20)
        stack.callback(client.netem)
        # From two processors packets would overtake each other.
        cpus = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, cpus)
        os.sched_setaffinity(0, {min(cpus)})
        capture = Capture(client)
        pair = watch.pair()
        for _ in range(60):  # more than the first window: the others wait for acknowledgements
            pair.near.send(b"x" * 100, MSG_EOR)
        until(lambda: acknowledge(pair.far) and Tcp(pair.near).unacked == 0 and unread(pair.far) == 6000, "all of it")
        pair.near.close()
        until(lambda: any(s.state == "FIN_WAIT2" for s in client.sockets()), "the acknowledgement of the FIN")
        number = capture.newer()
        assert number > 12
        watch.rows(client, pair, number)
        pair.far.close()
        last = (pair.port, "LAST_ACK")
        until(lambda: not any((s.lport, s.state) == last for s in watch.lab.server.sockets()), "the end")
