"""What the tests of `rtt` stand on.

The rule, for one end of a connection: the handshake gives a sample, each acknowledgement that delivers something of
this end gives one, and so does that of its FIN. A client that makes N requests, each after the answer to the one
before, has N + 2 samples when all is over; so has the server with its N answers. Nothing is sent twice.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tcpscope.errors import UnsupportedError
from tcpscope.lab.hosts import DEVICE, Host, Lab
from tests.conftest import RunningTool, until
from tests.lacks import no_netem

FAMILIES = ("4", "6", "mapped")
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
        self._expected[host][self._ends(host, pair)] = samples
        rows: Rows = []

        def enough() -> bool:
            rows[:] = self.so_far(host, pair)
            return sum(row["count"] for row in rows) >= samples

        until(enough, f"{samples} samples of {self._ends(host, pair)} at the {host.role}")
        return rows

    def so_far(self, host: Host, pair: Pair) -> Rows:
        """The intervals of one end."""
        ends = self._ends(host, pair)
        return [row for row in self._tools[host].intervals("watch") if (row["lport"], row["rport"]) == ends]

    def _ends(self, host: Host, pair: Pair) -> tuple[int, ...]:
        return pair.ports if host is self.lab.client else pair.ports[::-1]

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
            host.sysctl("tcp_early_retrans", 0)  # with several packets out, probes of the tail do not wait for rto_min
            for prefix, how in (
                ("192.0.2.0/24", ["scope", "link", "src", host.ipv4]),
                ("2001:db8::/64", ["metric", "256"]),
            ):
                route = ["ip", "route", "replace", prefix, "dev", DEVICE, "proto", "kernel", *how, "rto_min", "10s"]
                host.run(subprocess.run, route, check=True)
        yield lab
        assert [host.counters()["TcpRetransSegs"] for host in lab.hosts] == [0, 0]


def delay(host: Host, ms: float) -> None:
    """Delay what the host sends, or skip when this kernel provably has no netem."""
    try:
        host.netem(delay_ms=ms)
    except UnsupportedError:
        assert no_netem()
        pytest.skip("this kernel has no netem")
