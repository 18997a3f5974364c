"""`rtt` against the exchanges really made, netem's delay, TCP_INFO and `ss -ti`.

The rule, for one end of a connection: the handshake gives a sample, each acknowledgement that delivers something of
this end gives one, and so does that of its FIN. A client that makes N requests, each after the answer to the one
before, has N + 2 samples when all is over; so has the server with its N answers. Nothing is sent twice.

Two tools watch the hosts of a lab for the first tests; each connection there has a port of its own.
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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tcpscope.errors import UnsupportedError
from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import DEVICE, Host, Lab, held
from tests.conftest import DEADLINE, RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

FAMILIES = ("4", "6", "mapped")
MSG_EOR = 0x80
SO_COOKIE = 57
ENDS = ("laddr", "lport", "raddr", "rport")

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
        self.kind = socket.AF_INET6 if family == "6" else socket.AF_INET
        self.near = lab.client.socket(self.kind)
        started = time.monotonic()
        self.near.connect((lab.server.address(self.kind), self.port))
        self.took_us = [(time.monotonic() - started) * 1e6]
        self.far, _ = self.listener.accept()
        for made in (self.near, self.far):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ports = (self.near.getsockname()[1], self.port)
        self.smoothed = [Tcp(self.near).rtt_us]
        self.exchanges = 0

    def exchange(self, number: int = 1) -> None:
        """So many requests, each after the answer to the one before."""
        for _ in range(number):
            started = time.monotonic()
            self.near.sendall(b"request")
            assert self.far.recv(100) == b"request"
            self.far.sendall(b"answer")
            assert self.near.recv(100) == b"answer"
            self.took_us.append((time.monotonic() - started) * 1e6)
            self.smoothed.append(Tcp(self.near).rtt_us)
            self.exchanges += 1

    def settle(self) -> None:
        for made in (self.near, self.far):
            until(lambda made=made: Tcp(made).unacked == 0, "the last acknowledgement")

    def end(self, first: str = "client") -> None:
        """One side closes, then the other."""
        one, other = (self.near, self.far) if first == "client" else (self.far, self.near)
        self.closed = time.monotonic()
        one.close()
        assert other.recv(1) == b""
        other.close()

    def gone(self, lab: Lab) -> bool:
        ends = {(found.lport, found.rport): found.state for host in lab.hosts for found in host.sockets()}
        if {ends.get(self.ports), ends.get(self.ports[::-1])} - {None, "TIME_WAIT"}:
            return False
        self.took_us.append((time.monotonic() - self.closed) * 1e6)
        return True

    @property
    def samples(self) -> int:
        """At either end, when it is over."""
        return 1 + self.exchanges + 1


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


def all_ended(lab: Lab, pairs: list[Pair], first: str = "client") -> None:
    for pair in pairs:
        pair.settle()
        pair.end(first)
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
        """The rows of the intervals so far."""
        return [row for row in self._tools[name].rows if not row["total"]]


class Watch:
    """A lab, a tool at its client and one at its server, and what they must have seen at the end."""

    def __init__(self, lab: Lab, tools: dict[Host, Tools]) -> None:
        self.lab, self._tools = lab, tools
        self._pairs: list[Pair] = []
        self._expected: dict[Host, dict[tuple[int, ...], int]] = {host: {} for host in lab.hosts}

    def pair(self, family: str = "4", listener: socket.socket | None = None) -> Pair:
        return self.add(Pair(self.lab, family, listener))

    def add(self, pair: Pair) -> Pair:
        self._pairs.append(pair)
        return pair

    def rows(self, host: Host, pair: Pair, samples: int) -> Rows:
        """Of one end, as soon as there are so many samples. That no more come is checked at the very end."""
        ports = pair.ports if host is self.lab.client else pair.ports[::-1]
        self._expected[host][ports] = samples
        rows: Rows = []

        def enough() -> bool:
            rows[:] = [row for row in self._tools[host].intervals("watch") if (row["lport"], row["rport"]) == ports]
            return sum(row["count"] for row in rows) >= samples

        until(enough, f"{samples} samples of {host.role}:{ports[0]}, there are {rows}", 30)
        return rows

    def check(self) -> None:
        """Not one sample too many, not one too few, one total for each connection, and the intervals sum to it."""
        for host, tools in self._tools.items():
            totals = tools.done("watch")
            counts = {(row["lport"], row["rport"]): row["count"] for row in totals}
            assert len(counts) == len(totals) == len(self._pairs)
            assert {ports: counts[ports] for ports in self._expected[host]} == self._expected[host]
            for row in totals:
                check_sum(row, [part for part in tools.intervals("watch") if all(part[n] == row[n] for n in ENDS)])
                assert row["pid"] == os.getpid()
                assert 0 < row["min_us"] <= row["p50_us"] <= row["p90_us"] <= row["p99_us"] <= row["max_us"]
                assert row["min_us"] <= row["mean_us"] <= row["max_us"]


def check_sum(row: dict[str, Any], parts: Rows) -> None:
    assert sum(part["count"] for part in parts) == row["count"]
    assert min(part["min_us"] for part in parts) == row["min_us"]
    assert max(part["max_us"] for part in parts) == row["max_us"]
    octaves: Counter[int] = Counter()
    for low, _, count in (octave for part in parts for octave in part["histogram"]):
        octaves[low] += count
    assert {low: count for low, _, count in row["histogram"] if count} == +octaves
    assert octaves.total() == row["count"]


@contextmanager
def patient_lab() -> Iterator[Lab]:
    """TCP waits ten seconds before it sends data again: nothing is, on the slowest kernel."""
    with Lab() as lab:
        for host in lab.hosts:
            host.sysctl("tcp_no_metrics_save", 1)
            for prefix, how in (
                ("192.0.2.0/24", ["scope", "link", "src", host.ipv4]),
                ("2001:db8::/64", ["metric", "256"]),
            ):
                route = ["ip", "route", "replace", prefix, "dev", DEVICE, "proto", "kernel", *how, "rto_min", "10s"]
                host.run(subprocess.run, route, check=True)
        yield lab
        assert [host.counters()["TcpRetransSegs"] for host in lab.hosts] == [0, 0]


@pytest.fixture(scope="module")
def older() -> list[Pair]:
    """What existed before the tools of `watch`."""
    return []


@pytest.fixture(scope="module")
def watch(older: list[Pair]) -> Iterator[Watch]:
    with patient_lab() as lab, ExitStack() as stack:
        older.append(Pair(lab))
        older[0].exchange(20)
        older[0].settle()
        tools = {host: stack.enter_context(Tools(host, watch="--by connection -i 0.3")) for host in lab.hosts}
        watch = Watch(lab, tools)
        yield watch
        watch.check()


@pytest.fixture(scope="module")
def site() -> Iterator[Lab]:
    with patient_lab() as lab:
        yield lab


def functions_cannot_be_hooked() -> bool:
    kernel = Kernel()
    return not kernel.fentry and not kernel.kprobe


# --- how many ---------------------------------------------------------------------------------------------------------


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
    assert (released - sent) * 1e6 <= max(row["max_us"] for row in rows) <= (end - begin) * 1e6
    longest = max(high for row in rows for _, high, count in row["histogram"] if count)
    others = [high for row in rows for _, high, count in row["histogram"] for _ in range(count)]
    others.remove(longest)
    assert max(others) < 300_000


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


def test_packets_sent_together_are_told_apart(watch: Watch) -> None:
    """Two packets that one acknowledgement let out have the same time stamp; each is acknowledged by its own."""
    client = watch.lab.client
    with ExitStack() as stack:
        delay(client, 20)
        stack.callback(client.netem)
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


# --- how long ---------------------------------------------------------------------------------------------------------


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


# --- whose ------------------------------------------------------------------------------------------------------------


def test_every_key(site: Lab) -> None:
    """Two listeners; one has two connections of IPv4 and one of IPv6, the other one of IPv4."""
    both, other = listen(site, "mapped"), listen(site)
    arguments = {name: f"--by {name}" for name in ("none", "laddr", "raddr", "lport", "rport", "pid")}
    arguments |= {"two": "--by raddr,rport"}
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
        assert by("two", "raddr", "rport") == {(server4, a.port): 11, (server6, c.port): 7, (server4, d.port): 8}
        (row,) = tools.done("pid")
        assert (row["pid"], row["comm"]) == (os.getpid(), Path("/proc/self/comm").read_text().strip())


def test_filters(site: Lab) -> None:
    listeners = {family: listen(site, family) for family in FAMILIES}
    port = {family: listener.getsockname()[1] for family, listener in listeners.items()}
    wanted: dict[str, Callable[[str], bool]] = {
        f"-p {os.getpid()}": lambda family: True,
        "-p 1": lambda family: False,
        f"--lport {port['mapped']}": lambda family: family == "mapped",
        f"--rport {port['4']}": lambda family: False,
        "-4": lambda family: family != "6",
        "-6": lambda family: family == "6",
        f"--raddr {site.client.ipv6}": lambda family: family == "6",
        f"--laddr 192.0.2.0/24 -p {os.getpid()}": lambda family: family != "6",
    }
    cases = {case: f"--by connection {case}" for case in wanted}
    with Tools(site.server, **cases) as tools, Tools(site.client, one=f"--by connection -R {port['4']}") as at_client:
        pairs = {family: Pair(site, family, listener) for family, listener in listeners.items()}
        for number, pair in enumerate(pairs.values(), 4):
            pair.exchange(number)
        all_ended(site, list(pairs.values()))
        samples = sum(pair.samples for pair in pairs.values())
        for case, wants in wanted.items():
            found = {(row["rport"], row["lport"]): row["count"] for row in tools.done(case)}
            chosen = {pair.ports: pair.samples for family, pair in pairs.items() if wants(family)}
            assert found == chosen, case
            # Other traffic of the machine is filtered, too.
            assert tools.stats(case)["filtered"] >= samples - sum(chosen.values())
        (row,) = at_client.done("one")
        assert (row["lport"], row["count"]) == (pairs["4"].ports[0], pairs["4"].samples)


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


def test_intervals_sum_to_the_total(watch: Watch) -> None:
    """The traffic runs over the borders; how the intervals sum is checked for all connections of `watch`."""
    pairs = [watch.pair(), watch.pair("6")]
    begun = time.monotonic()
    while time.monotonic() < begun + 1:  # three borders
        for pair in pairs:
            pair.exchange()
    all_ended(watch.lab, pairs)
    for pair in pairs:
        for host in watch.lab.hosts:
            assert len(watch.rows(host, pair, pair.samples)) > 2


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
            assert sorted(row["lport"] for row in rows) == sorted(pair.ports[0] for pair in pairs[:2])
            assert [row["count"] for row in rows] == [5, 5]


def test_each_interval_has_room_again(site: Lab) -> None:
    with Tools(site.server, one="--by connection --max-keys 1 -i 0.1") as tools:
        pairs = []
        for _ in range(4):
            pairs.append(Pair(site))
            all_ended(site, pairs[-1:])
            until(
                lambda: sum(r["count"] for r in tools.intervals("one") if r["rport"] == pairs[-1].ports[0]) == 2,
                "its samples in an interval",
            )
        assert {row["rport"]: row["count"] for row in tools.done("one")} == {pair.ports[0]: 2 for pair in pairs}
