"""`rtt` against the exchanges really made, netem's delay, TCP_INFO and `ss -ti`.

The rule, for one end of a connection: the handshake gives a sample, each acknowledgement that delivers something of
this end gives one, and so does that of its FIN. A client that makes N requests, each after the answer to the one
before, has N + 2 samples when all is over; so has the server with its N answers.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import re
import select
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tcpscope.errors import UnsupportedError
from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Host, Lab
from tests.conftest import DEADLINE, RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

FAMILIES = ("4", "6", "mapped")
MSG_EOR = 0x80

Rows = list[dict[str, Any]]
ports = itertools.count(9500)


class Tcp:
    """What TCP_INFO says: include/uapi/linux/tcp.h."""

    def __init__(self, made: socket.socket) -> None:
        data = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        (self.unacked,) = struct.unpack_from("=I", data, 24)
        (self.rtt_us,) = struct.unpack_from("=I", data, 68)
        (self.segs_in,) = struct.unpack_from("=I", data, 140)


class Pair:
    """A connection from the lab's client to its server, both ends in this process."""

    def __init__(self, lab: Lab, family: str = "4", listener: socket.socket | None = None) -> None:
        self.listener = listener or listen(lab, family)
        self.port = self.listener.getsockname()[1]
        kind = socket.AF_INET6 if family == "6" else socket.AF_INET
        self.near = lab.client.socket(kind)
        started = time.monotonic()
        self.near.connect((lab.server.address(kind), self.port))
        self.took_us = [(time.monotonic() - started) * 1e6]
        self.far, _ = self.listener.accept()
        for made in (self.near, self.far):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, number: int = 1) -> None:
        """So many requests, each after the answer to the one before."""
        for _ in range(number):
            started = time.monotonic()
            self.near.sendall(b"request")
            assert self.far.recv(100) == b"request"
            self.far.sendall(b"answer")
            assert self.near.recv(100) == b"answer"
            self.took_us.append((time.monotonic() - started) * 1e6)

    def end(self) -> None:
        """The client closes first, then the server."""
        self.ports = (self.near.getsockname()[1], self.port)
        self.closed = time.monotonic()
        self.near.close()
        assert self.far.recv(1) == b""
        self.far.close()

    def gone(self, lab: Lab) -> bool:
        ends = {(found.lport, found.rport): found.state for host in lab.hosts for found in host.sockets()}
        near, far = ends.get(self.ports), ends.get(self.ports[::-1])
        if near not in (None, "TIME_WAIT") or far is not None:
            return False
        self.took_us.append((time.monotonic() - self.closed) * 1e6)
        return True


def acknowledge(made: socket.socket) -> bool:
    """At once, for a while, and not every second segment."""
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    return True


def unread(made: socket.socket) -> int:
    (number,) = struct.unpack("i", fcntl.ioctl(made, termios.FIONREAD, b"    "))
    return int(number)


def listen(lab: Lab, family: str = "4") -> socket.socket:
    listener = lab.server.socket(socket.AF_INET if family == "4" else socket.AF_INET6)
    if family == "mapped":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    address = "::" if family == "mapped" else lab.server.address(listener.family)
    listener.bind((address, next(ports)))
    listener.listen(64)
    return listener


def all_ended(lab: Lab, pairs: list[Pair]) -> None:
    for pair in pairs:
        pair.end()
    until(lambda: all(pair.gone(lab) for pair in pairs), "the end of all connections")


class Tools:
    """Several runs of `rtt` over the same traffic; they start together."""

    def __init__(self, host: Host, **arguments: str) -> None:
        self._stack = ExitStack()
        self._tools = {
            name: RunningTool("rtt", "--netns", str(host.inode), *words.split(), ready=False)
            for name, words in arguments.items()
        }

    def __enter__(self) -> Tools:
        with self._stack:
            for tool in self._tools.values():
                self._stack.enter_context(tool)
            for tool in self._tools.values():
                tool.wait_until_ready()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def done(self, name: str, status: int = 0, lost: int = 0) -> Rows:
        """The rows over the whole run, which is over now. The account must be exact."""
        done = self._tools[name].stop()
        assert done.status == status, done.stderr
        total = [row for row in done.rows if row["total"]]
        stats = done.stats
        assert stats is not None
        assert stats["shown"] == sum(row["count"] for row in total)
        assert stats["seen"] == stats["shown"] + stats["filtered"] + stats["lost"]
        assert (stats["lost"], stats["table_full"], stats["missed"]) == (lost, 0, 0)
        return total

    def stats(self, name: str) -> dict[str, int]:
        done = self._tools[name].done
        assert done is not None and done.stats is not None
        return done.stats

    def intervals(self, name: str) -> Rows:
        done = self._tools[name].done
        assert done is not None
        return [row for row in done.rows if not row["total"]]


@pytest.fixture(scope="module")
def site() -> Iterator[Lab]:
    with Lab() as lab:
        for host in lab.hosts:
            host.sysctl("tcp_no_metrics_save", 1)
        yield lab


def functions_cannot_be_hooked() -> bool:
    kernel = Kernel()
    return not kernel.fentry and not kernel.kprobe


# --- how many ---------------------------------------------------------------------------------------------------------


def test_every_exchange_is_one_sample_at_each_end(site: Lab) -> None:
    requests = {"4": 25, "6": 14, "mapped": 9}
    with Tools(site.client, near="--by connection") as near, Tools(site.server, far="--by connection") as far:
        pairs = {family: Pair(site, family) for family in FAMILIES}
        for family, pair in pairs.items():
            pair.exchange(requests[family])
        all_ended(site, list(pairs.values()))
        at_client, at_server = near.done("near"), far.done("far")
    for family, pair in pairs.items():
        kind = socket.AF_INET6 if family == "6" else socket.AF_INET
        ends = (site.client.address(kind), pair.ports[0]), (site.server.address(kind), pair.ports[1])
        (client,) = (row for row in at_client if row["rport"] == pair.port)
        (server,) = (row for row in at_server if row["lport"] == pair.port)
        assert client["count"] == server["count"] == requests[family] + 2
        assert ((client["laddr"], client["lport"]), (client["raddr"], client["rport"])) == ends
        assert ((server["raddr"], server["rport"]), (server["laddr"], server["lport"])) == ends
        assert client["max_us"] <= max(pair.took_us)
        assert client["mean_us"] * client["count"] <= sum(pair.took_us) + 1
        assert sum(count for *_, count in client["histogram"]) == client["count"]
    assert len(at_client) == len(at_server) == 3


def delay(host: Host, ms: float) -> None:
    """Delay what the host sends, or skip when this kernel provably has no netem."""
    try:
        host.netem(delay_ms=ms)
    except UnsupportedError:
        release = Path("/proc/sys/kernel/osrelease").read_text().strip()
        assert not list(Path("/lib/modules", release).rglob("sch_netem.ko*"))
        assert "netem_enqueue" not in Path("/proc/kallsyms").read_text()
        pytest.skip("this kernel has no netem")


class Capture:
    """The TCP acknowledgement numbers that a host receives, in their order."""

    def __init__(self, host: Host) -> None:
        self._packets = host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        self._packets.setblocking(False)

    def newer(self) -> int:
        """How many of them acknowledged more than all before."""
        count, newest = 0, None
        while select.select([self._packets], [], [], 0)[0]:
            data, (_, _, kind, *_) = self._packets.recvfrom(1 << 16)
            if kind != socket.PACKET_HOST or data[9] != socket.IPPROTO_TCP:
                continue
            (number,) = struct.unpack_from("!I", data, (data[0] & 15) * 4 + 8)
            if newest is None or 0 < (number - newest) % (1 << 32) < 1 << 31:
                count, newest = count + 1, number
        return count


def test_packets_sent_together_are_told_apart(site: Lab) -> None:
    """Two packets that one acknowledgement let out have the same time stamp; each is acknowledged by its own."""
    with Tools(site.client, raw="") as tools, ExitStack() as stack:
        delay(site.client, 20)
        stack.callback(site.client.netem)
        capture = Capture(site.client)
        pair = Pair(site)
        for _ in range(60):  # more than the first window: the others wait for acknowledgements
            pair.near.send(b"x" * 100, MSG_EOR)
        until(lambda: acknowledge(pair.far) and Tcp(pair.near).unacked == 0 and unread(pair.far) == 6000, "all of it")
        pair.near.close()
        until(lambda: any(s.state == "FIN_WAIT2" for s in site.client.sockets()), "the acknowledgement of the FIN")
        (row,) = tools.done("raw")
        assert row["count"] == capture.newer() > 12
        pair.far.close()


def test_a_connection_that_one_side_has_closed(site: Lab) -> None:
    with Tools(site.server, raw="") as tools:
        pair = Pair(site)
        pair.near.shutdown(socket.SHUT_WR)
        assert pair.far.recv(1) == b""
        for _ in range(20):
            pair.far.sendall(b"answer")
            assert pair.near.recv(100) == b"answer"
            until(lambda: Tcp(pair.far).unacked == 0, "an acknowledgement")
        pair.far.close()
        until(lambda: pair.near.recv(1) == b"", "the end")
        pair.near.close()
        until(lambda: not any(s.lport == pair.port and s.state == "LAST_ACK" for s in site.server.sockets()), "the end")
        (row,) = tools.done("raw")
    # Without functions to hook there is a look at each change of state only: the last answer, and the FIN.
    assert row["count"] == (1 + 2 if functions_cannot_be_hooked() else 1 + 20 + 1)


# --- how long ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ms", [5, 50])
def test_a_path_of_known_delay(site: Lab, ms: int) -> None:
    number = 10
    with Tools(site.client, raw="--by rport", smooth="--by rport --smoothed") as tools, ExitStack() as stack:
        delay(site.client, ms / 2)
        stack.callback(site.client.netem)
        delay(site.server, ms / 2)
        stack.callback(site.server.netem)
        pairs, smoothed = [Pair(site, family) for family in FAMILIES], {}
        for pair in pairs:
            pair.exchange(number)
            smoothed[pair.port] = Tcp(pair.near).rtt_us
        all_ended(site, pairs)
        raws = {row["rport"]: row for row in tools.done("raw")}
        smooths = {row["rport"]: row for row in tools.done("smooth")}
    for pair in pairs:
        raw, smooth = raws[pair.port], smooths[pair.port]
        assert raw["count"] == smooth["count"] == number + 2
        slowest = max(pair.took_us)
        assert ms * 1000 <= raw["min_us"] <= raw["p50_us"] <= raw["p90_us"] <= raw["p99_us"] <= raw["max_us"] <= slowest
        # The acknowledgement comes with the answer at the latest.
        median = sorted(pair.took_us)[math.ceil(len(pair.took_us) / 2) - 1]
        assert raw["p50_us"] <= median * 9 / 8
        assert ms * 1000 <= smooth["min_us"] <= smoothed[pair.port] <= smooth["max_us"] <= slowest


def test_smoothed_is_what_ss_shows(site: Lab) -> None:
    """The connection is older than the tool, so that the handshake gives no sample; neither does the last exchange,
    which nothing follows. The others are known to the microsecond."""
    pair = Pair(site, "6")
    pair.exchange()
    seen = []
    with Tools(site.client, smooth="--smoothed") as tools:
        for _ in range(30):
            pair.exchange()
            seen.append(Tcp(pair.near).rtt_us)
        child = site.client.spawn(["ss", "-HtinO", f"dport = :{pair.port}"], stdout=subprocess.PIPE, text=True)
        text = child.communicate(timeout=DEADLINE)[0]
        pair.exchange()
        (row,) = tools.done("smooth")
    pair.end()
    assert round(float(re.search(r" rtt:([\d.]+)/", text)[1]) * 1000) == seen[-1]  # type: ignore[index]
    assert (row["count"], row["min_us"], row["max_us"]) == (len(seen), min(seen), max(seen))
    assert row["mean_us"] == round(sum(seen) / len(seen), 1)
    for percent in (50, 90, 99):
        exact = sorted(seen)[math.ceil(percent / 100 * len(seen)) - 1]
        assert abs(row[f"p{percent}_us"] - exact) <= exact / 8
    for low, high, count in row["histogram"]:
        assert sum(low <= value <= high for value in seen) == count


# --- whose ------------------------------------------------------------------------------------------------------------


def test_every_key(site: Lab) -> None:
    """Two listeners; one has two connections of IPv4 and one of IPv6, the other one of IPv4."""
    both, other = listen(site, "mapped"), listen(site)
    ways = ("none", "laddr", "raddr", "lport", "rport", "pid", "connection")
    arguments = {name: f"--by {name}" for name in ways}
    arguments |= {"two": "--by raddr,rport", "six": "-6", "one_port": f"-R {other.getsockname()[1]}"}
    with Tools(site.client, **arguments) as tools:
        pairs = [Pair(site, "4", both), Pair(site, "4", both), Pair(site, "6", both), Pair(site, "4", other)]
        for number, pair in enumerate(pairs, 3):
            pair.exchange(number)
        all_ended(site, pairs)
        counts = dict(zip(pairs, (5, 6, 7, 8), strict=True))
        a, _, c, d = pairs
        server4, server6 = site.server.ipv4, site.server.ipv6
        client4, client6 = site.client.ipv4, site.client.ipv6
        (row,) = tools.done("none")
        assert row["count"] == 26

        def by(name: str, *keys: str) -> dict[Any, int]:
            rows = tools.done(name)
            return {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row["count"] for row in rows}

        assert by("laddr", "laddr") == {client4: 19, client6: 7}
        assert by("raddr", "raddr") == {server4: 19, server6: 7}
        assert by("lport", "lport") == {pair.ports[0]: count for pair, count in counts.items()}
        assert by("rport", "rport") == {a.port: 18, d.port: 8}
        assert by("connection", "lport", "rport") == {pair.ports: count for pair, count in counts.items()}
        assert by("two", "raddr", "rport") == {(server4, a.port): 11, (server6, c.port): 7, (server4, d.port): 8}
        (row,) = tools.done("pid")
        assert (row["pid"], row["comm"]) == (os.getpid(), Path("/proc/self/comm").read_text().strip())
        (six,), (one,) = tools.done("six"), tools.done("one_port")
        # Other traffic of the machine is filtered, too.
        assert (six["count"], tools.stats("six")["filtered"] >= 19) == (7, True)
        assert (one["count"], tools.stats("one_port")["filtered"] >= 18) == (8, True)


def test_the_owner_is_who_accepted(site: Lab) -> None:
    """One process listens, its child accepts: a connection is one row all the same, and the child's."""
    with Tools(site.server, connection="--by connection", pid="--by pid") as tools:
        parent = Puppet(site.server, "parent")
        port = next(ports)
        parent.do("listener = socket.create_server((address, port))", address=site.server.ipv4, port=port)
        parent.do(
            "ours, theirs = socket.socketpair()\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    open('/proc/self/comm', 'w').write('child')\n"
            "    theirs.recv(1); made = listener.accept()[0]\n"
            "    for _ in range(5): made.recv(100); made.sendall(b'answer')\n"
            "    made.recv(1); made.close(); theirs.send(b'x'); os._exit(0)"
        )
        near = site.client.socket(socket.AF_INET)
        near.connect((site.server.ipv4, port))
        until(lambda: any((s.lport, s.state) == (port, "ESTABLISHED") for s in site.server.sockets()), "the handshake")
        parent.do("ours.send(b'x')")
        for _ in range(5):
            near.sendall(b"request")
            assert near.recv(100) == b"answer"
        near.close()
        parent.do("ours.recv(1)")
        child = parent.ask("os.waitpid(child, 0)[0]")
        until(lambda: not any(s.lport == port and s.rport for s in site.server.sockets()), "the end")
        (row,) = tools.done("connection")
        assert (row["count"], row["pid"], row["comm"]) == (7, child, "child")
        # The handshake is over before anybody accepts: it is the listener's.
        by_pid = {row["pid"]: (row["comm"], row["count"]) for row in tools.done("pid")}
        assert by_pid == {parent.pid: ("parent", 1), child: ("child", 6)}
        parent.kill()


# --- intervals and limits ---------------------------------------------------------------------------------------------


def test_intervals_sum_to_the_total(site: Lab) -> None:
    with Tools(site.client, often="--by rport -i 0.05") as tools:
        pairs = [Pair(site), Pair(site, "6")]
        exchanges = 0
        begun = time.monotonic()
        while time.monotonic() < begun + 1:  # twenty borders
            for pair in pairs:
                pair.exchange()
            exchanges += 1
        all_ended(site, pairs)
        total = {row["rport"]: row for row in tools.done("often")}
        intervals = tools.intervals("often")
    assert {port: row["count"] for port, row in total.items()} == {pair.port: exchanges + 2 for pair in pairs}
    for port, row in total.items():
        parts = [part for part in intervals if part["rport"] == port]
        assert len(parts) > 2
        assert sum(part["count"] for part in parts) == row["count"]
        assert min(part["min_us"] for part in parts) == row["min_us"]
        assert max(part["max_us"] for part in parts) == row["max_us"]
        octaves: dict[int, int] = {}
        for low, _, count in (octave for part in parts for octave in part["histogram"]):
            octaves[low] = octaves.get(low, 0) + count
        assert {low: count for low, _, count in row["histogram"] if count} == {k: v for k, v in octaves.items() if v}


def test_more_keys_than_there_is_room_for(site: Lab) -> None:
    with Tools(site.client, few="--by connection --max-keys 2", strict="--by lport --max-keys 2 --strict") as tools:
        pairs = [Pair(site) for _ in range(10)]
        for pair in pairs:
            pair.exchange(3)
        all_ended(site, pairs)
        rows = tools.done("few", lost=8 * 5)
        assert sorted(row["lport"] for row in rows) == sorted(pair.ports[0] for pair in pairs[:2])
        assert [row["count"] for row in rows] == [5, 5]
        assert len(tools.done("strict", status=5, lost=8 * 5)) == 2
