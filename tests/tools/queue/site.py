"""What the tests of `queue` stand on.

One tool with --events watches the server of a lab for all tests of a file; each test has a listener and a port of
its own there. The listeners belong to this process unless a test says otherwise, and nobody accepts. A run is over
when the clients have been reset: nothing is sent any more, and the counters stand still.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tcpscope.lab.hosts import Host, Lab, held
from tcpscope.lab.packets import raw_socket, syn
from tests.conftest import DEADLINE, RunningTool, until
from tests.lacks import functions_cannot_be_hooked

FAMILIES = ("4", "6", "mapped")
BACKLOG = 5
SMALL_BACKLOG = 3
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a RST
NOBODY = {socket.AF_INET: "198.51.100.0/24", socket.AF_INET6: "2001:db8:51::/64"}
SO_COOKIE, IPPROTO_MPTCP, TCP_FASTOPEN = 57, 262, 23

Rows = list[dict[str, Any]]
ports = itertools.count(9000)


class Site:
    """A lab, a tool that watches its server, and what has happened since."""

    def __init__(self, lab: Lab, tool: RunningTool) -> None:
        self.lab, self.tool = lab, tool
        self.all_before = Counter(lab.server.counters())

    def counted(self) -> int:
        """All refusals so far, by the tool."""
        return sum(row["count"] for row in self.tool.rows if row["cause"] != "COOKIE_SENT")

    def dropped(self) -> int:
        """All refusals so far, by the kernel."""
        name = "TcpExtListenDrops"
        return self.lab.server.counters()[name] - self.all_before[name]

    def rows(self, port: int, **wanted: Any) -> Rows:
        """The events of one listener of which these columns have these values."""
        return [
            row
            for row in self.tool.rows
            if row["lport"] == port and all(row[name] == value for name, value in wanted.items())
        ]


class Run:
    """A listener that nobody accepts from, and what its clients did; the counters since it was made."""

    def __init__(self, site: Site, family: str = "4", backlog: int = BACKLOG, port: int = 0, protocol: int = 0) -> None:
        self.site, self.server, self.client = site, site.lab.server, site.lab.client
        self.port = port or next(ports)
        self.kind = socket.AF_INET6 if family in ("6", "only6") else socket.AF_INET
        self.target = (self.server.address(self.kind), self.port)
        listens = socket.AF_INET if family == "4" else socket.AF_INET6
        self.laddr = "::" if family in ("mapped", "only6") else self.target[0]
        self.listener = self.server.socket(listens, protocol=protocol)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listens == socket.AF_INET6:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, family == "only6")
        self.listener.bind((self.laddr, self.port))
        self.listener.listen(backlog)
        self.clients: list[socket.socket] = []
        self.before = Counter(self.server.counters())

    def change(self, name: str) -> int:
        return self.server.counters()[f"TcpExt{name}"] - self.before[f"TcpExt{name}"]

    def start(self, number: int = 1) -> list[socket.socket]:
        """So many connects begin."""
        started = []
        for _ in range(number):
            made = self.client.socket(self.kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            made.setblocking(False)
            made.connect_ex(self.target)
            started.append(made)
        self.clients += started
        return started

    def connect(self, number: int = 1) -> list[socket.socket]:
        """So many connects succeed, one after the other, as the clients see it."""
        return [connected(made) for _ in range(number) for made in self.start()]

    def wait(self, number: int) -> None:
        """So many connects succeed, as the server sees it too: they wait for accept()."""
        self.connect(number)
        until(
            lambda: any((s.state, s.lport, s.recv_q) == ("LISTEN", self.port, number) for s in self.server.sockets()),
            f"{number} in the accept queue",
        )

    def fill(self) -> None:
        """One more than the limit, and all of them wait for accept()."""
        self.connect(BACKLOG + 1)
        until(lambda: accept_queue(self.server, self.port) == (BACKLOG + 1, BACKLOG), "a full accept queue")

    def overflow_at_syn(self, number: int) -> None:
        """The queue is full; then so many SYNs come."""
        self.fill()
        before = self.change("ListenOverflows")
        self.start(number)
        self.refused(before + number)

    def overflow_at_ack(self, number: int) -> None:
        """So many handshakes more than fit are at their last step when the queue becomes full."""
        self.wait(BACKLOG)
        with held(self.server):
            late = self.start(number + 1)
            until(lambda: requests(self.server, self.port) == number + 1, "SYNs")
        for made in late:
            assert select.select([], [made], [], DEADLINE)[1], "no connection"
        self.refused(number)

    def refused(self, number: int) -> None:
        """Wait until at least so many handshakes were refused; slow clients may have tried again meanwhile."""
        until(lambda: self.change("ListenOverflows") >= number, f"{number} overflows")

    def end(self) -> None:
        """Reset the clients. What came before stays counted, and nothing comes any more."""
        for made in self.clients:
            made.close()
        self.site.lab.flush()  # what had left before is handled, and counted

    def agree(self, *counters: str, **wanted: Any) -> Rows:
        """The events, as soon as they are as many as the counter says. That no more come is checked at the very end."""

        def same() -> bool:
            counted = sum(row["count"] for row in self.site.rows(self.port, **wanted))
            return all(counted == self.change(name) for name in counters)

        until(same, f"as many events as {' and '.join(counters)} say")
        return self.site.rows(self.port, **wanted)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.end()
        if functions_cannot_be_hooked() and kind is None:
            # The last moment before it closes is in no sample.
            until(lambda: self.site.counted() == self.site.dropped(), "all drops in samples")
        self.listener.close()


def cookie_of(made: socket.socket) -> int:
    (cookie,) = struct.unpack("Q", made.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return int(cookie)


def connected(made: socket.socket) -> socket.socket:
    assert select.select([], [made], [], DEADLINE)[1], "no connection"
    assert made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    return made


def requests(host: Host, port: int) -> int:
    return sum(found.state == "SYN_RECV" and found.lport == port for found in host.sockets())


def accept_queue(host: Host, port: int) -> tuple[int, int]:
    """Length and limit, as `ss -ltn` shows them."""
    child = host.spawn(["ss", "-Hltn", f"sport = :{port}"], stdout=subprocess.PIPE, text=True)
    (line,) = child.communicate(timeout=DEADLINE)[0].splitlines()
    _, length, limit, *_ = line.split()
    return int(length), int(limit)


@contextmanager
def sysctls(host: Host, **values: int) -> Iterator[None]:
    before = {name: host.sysctl(name) for name in values}
    try:
        for name, value in values.items():
            host.sysctl(name, value)
        yield
    finally:
        for name, old in before.items():
            host.sysctl(name, old)


def flood(run: Run, number: int) -> None:
    """So many SYNs of peers that never answer. Returns when all have been handled.

    More than four requests, and more than half of the backlog, are pruned (reqsk_timer_handler()): tests that count
    them have a smaller backlog than that.
    """
    run.client.blackhole(NOBODY[run.kind])
    network = NOBODY[run.kind].rpartition("/")[0]
    with run.client.run(raw_socket, run.kind) as raw:
        for host in range(1, number + 1):
            source = f"{network}{host:x}" if run.kind == socket.AF_INET6 else f"{network[:-1]}{host}"
            raw.sendto(syn(source, 10_000, *run.target, 1_000_000), (run.target[0], 0))
    run.site.lab.flush()
