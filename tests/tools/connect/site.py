"""What the tests of `connect` stand on.

One tool watches the client of a lab for all tests of a file; each test has remote ports of its own there, which tell
its rows from those of others. Beside it run one with --failed and two with --count, over the same connections. At the
end every port has had exactly so many rows as its test has asked for: nothing came later, and nothing twice.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
from collections import Counter
from typing import Any

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool
from tests.puppets import Puppet

FAMILIES = ("4", "6", "mapped")
SILENT = {"4": "198.51.100.7", "6": "2001:db8:51::7", "mapped": "::ffff:198.51.100.7"}  # never answer
NOWHERE = {"4": "203.0.113.7", "6": "2001:db8:f::7", "mapped": "::ffff:203.0.113.7"}  # no route goes there
NOBODY = "192.0.2.9"  # on the link, but not there
BEHIND = "203.0.113.130"  # the server is asked to forward, and has no route
IPPROTO_MPTCP, TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, SO_COOKIE = 262, 23, 30, 57

# In the client. Each leaves `s`, the socket, and returns what it saw: the errno's name, and its clock before and after.
CALLS = r"""
import ctypes, errno, select, signal, threading
libc = ctypes.CDLL(None, use_errno=True)
MSG_FASTOPEN = 0x20000000

def name(number):
    return errno.errorcode[number] if number else "none"

def made(address, local=None, options=(), protocol=0):
    global s
    s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, protocol)
    for level, option, value in options:
        s.setsockopt(level, option, bytes.fromhex(value) if isinstance(value, str) else value)
    if local:
        s.bind(tuple(local))
    return s

def again(address, port):
    begin = time.monotonic()
    error = s.connect_ex((address, port))
    return name(error), begin, time.monotonic()

def blocking(address, port, **how):
    made(address, **how)
    return again(address, port)

def started(address, port, **how):
    '''Returns before the outcome is known.'''
    global begin, after
    made(address, **how).setblocking(False)
    begin = time.monotonic()
    error = s.connect_ex((address, port))
    after = time.monotonic()
    return name(error)

def outcome(fetch=True):
    '''Of what was started. Without `fetch` the error stays in the socket.'''
    poll = select.poll()
    poll.register(s, select.POLLOUT)
    poll.poll()
    end = time.monotonic()
    return (name(s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) if fetch else None), begin, end

def nonblocking(address, port, **how):
    error = started(address, port, **how)
    return outcome() if error == "EINPROGRESS" else (error, begin, time.monotonic())

def fast(address, port, data="x", **how):
    made(address, **how)
    begin = time.monotonic()
    try:
        s.sendto(data.encode(), MSG_FASTOPEN, (address, port))
        error = 0
    except OSError as problem:
        error = problem.errno
    return name(error), begin, time.monotonic()

def disconnect():
    return name(0 if libc.connect(s.fileno(), b"\0" * 16, 16) == 0 else ctypes.get_errno())

def raw_connect(address, size):
    address = bytes.fromhex(address)
    return name(0 if libc.connect(s.fileno(), address, size) == 0 else ctypes.get_errno())

def retransmissions():
    '''Of the SYN, as long as nothing else was sent. Takes the socket's lock. 0 when it is closed.'''
    if s.fileno() < 0:
        return 0
    (tcpi_total_retrans,) = struct.unpack_from("I", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)
    return tcpi_total_retrans

def local():
    return s.getsockname()[:2]

def cookie():
    return struct.unpack("Q", s.getsockopt(socket.SOL_SOCKET, 57, 8))[0]
"""

LISTEN = r"""
listeners = {}
def listen(port, address="::", protocol=0, fastopen=0):
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, protocol)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if fastopen:
        listener.setsockopt(socket.IPPROTO_TCP, 23, fastopen)
    listener.bind((address, port))
    listener.listen(16)
    listeners[port] = listener
"""

Row = dict[str, Any]
Saw = list[Any]  # errno's name, begin, end
ports = itertools.count(7000)


def new_port() -> int:
    return next(ports)


class Site:
    """The lab, its programs, and the tools: the one that shows each row, and those of compare_others()."""

    def __init__(self, lab: Lab, tools: list[RunningTool], client: Puppet, server: Puppet, older: Puppet) -> None:
        self.lab, self.client, self.server, self.older = lab, client, server, older
        self.tool, *self.others = tools
        self.expected: Counter[int | None] = Counter()

    def rows(self, port: int | None, count: int = 1, **wanted: Any) -> list[Row]:
        """The rows with that remote port, as soon as there are so many. There must be no more at the end."""
        self.expected[port] = count
        rows = self.tool.wait_for(lambda rows: sum(row["rport"] == port for row in rows) >= count)
        found = [row for row in rows if row["rport"] == port]
        assert len(found) == count
        for name, value in wanted.items():
            assert [row[name] for row in found] == [value] * count, (name, found)
        return found

    def row(self, port: int | None, saw: Saw | None = None, *, owner: Puppet | None = None, **wanted: Any) -> Row:
        """The one row with that remote port, with what every row of the client has."""
        owner = owner or self.client
        (row,) = self.rows(port, 1, pid=owner.pid, comm=owner.comm, uid=0, netns=self.lab.client.inode, **wanted)
        if saw is not None:
            assert row["errno"] == saw[0], row
            if row["latency_us"] is not None:
                assert row["latency_us"] <= span_us(saw) + 1, row
        return row

    def listen(self, **how: Any) -> int:
        port = new_port()
        self.server.do("listen(port, **how)", port=port, how=how)
        return port

    def target(self, family: str) -> str:
        server = self.lab.server
        return {"4": server.ipv4, "6": server.ipv6, "mapped": f"::ffff:{server.ipv4}"}[family]

    def call(self, function: str, address: str, port: int, **how: Any) -> Saw:
        saw: Saw = self.client.ask(f"{function}(address, port, **how)", address=address, port=port, how=how)
        return saw

    def close(self, *puppets: Puppet) -> None:
        for puppet in puppets or (self.client,):
            puppet.do("s.close()")

    def retransmitted(self, port: int) -> bool:
        return any(s.rport == port and s.retransmits for s in self.lab.client.sockets())

    def syn_retransmissions(self) -> int:
        """Of all but the attempt that is older than the tool, which goes on meanwhile, until it is closed."""

        def older() -> int:
            return int(self.older.ask("retransmissions()"))

        while True:
            before = older()
            counted = self.lab.client.counters()["TcpExtTCPSynRetrans"]
            if older() == before:
                return counted - before

    def compare_others(self) -> None:
        """The other three against the rows: the same connections, put together."""
        # There are some of both kinds, even if no other test ran.
        for port, outcome in ((new_port(), "REFUSED"), (self.listen(), "ESTABLISHED")):
            self.call("blocking", self.target("4"), port)
            self.close()
            self.row(port, outcome=outcome)
        rows = self.tool.rows
        failed, counted, intervals = self.others
        wanted = [row for row in rows if row["outcome"] != "ESTABLISHED"]
        failed.wait_for(lambda found: len(found) >= len(wanted))
        done = failed.stop()
        # Each tool has read the clock for itself.
        texts = [[json.dumps({name: row[name] for name in row if name not in ("time", "latency_us", "cookie")})
                  for row in each] for each in (done.rows, wanted)]  # fmt: skip
        assert sorted(texts[0]) == sorted(texts[1])
        assert done.stats["filtered"] >= len(rows) - len(wanted)

        total = counted.stop().rows
        assert {(row["raddr"], row["rport"]): row["count"] for row in total} == Counter(
            (row["raddr"], row["rport"]) for row in rows
        )
        assert [row["count"] for row in total] == sorted((row["count"] for row in total), reverse=True)
        assert all(row["total"] for row in total)

        done = intervals.stop(signal.SIGTERM)
        kinds = Counter((row["comm"], row["outcome"]) for row in rows)
        assert {(row["comm"], row["outcome"]): row["count"] for row in done.rows if row["total"]} == kinds
        periods: Counter[Any] = Counter()
        for row in done.rows:
            if not row["total"]:
                periods[row["comm"], row["outcome"]] += row["count"]
        assert periods == kinds
        assert set(done.rows[0]) == {"comm", "outcome", "count", "total"}
        assert os.getpid() not in {row["pid"] for row in rows}


def span_us(saw: Saw) -> float:
    return (saw[2] - saw[1]) * 1e6


def shown(address: str) -> str:
    """As a row has it."""
    return address.removeprefix("::ffff:")


def version(family: str) -> int:
    return 6 if family == "6" else 4


def knows(hook: str, what: str) -> bool:
    """Whether this kernel offers this way of the hook."""
    spec = Spec.of("connections")
    program = plan(spec, plan_refusals(spec, Kernel()), event="attempt")[hook].program
    return program is not None and program.name == what


PATIENT = [(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 127)]  # hours
SYNCNT_1 = [(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)]
