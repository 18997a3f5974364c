"""`connect` against what the client programs saw: their errno, their clock, their addresses.

One tool watches the client of a lab for all tests of this file; each test has remote ports of its own there, which tell
its rows from those of others. Beside it run one with --failed and two with --count, over the same connections. At the
end every port has had exactly so many rows as its test has asked for: nothing came later, and nothing twice.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import Lab, held
from tests.conftest import RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

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
# io_uring without a library: one entry, IORING_OP_CONNECT, waited for.
URING = r"""
import mmap
def uring_connect(address, port):
    made(address)
    parameters = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 4, parameters)
    if ring < 0:
        return name(ctypes.get_errno()), None
    words = struct.unpack_from("30I", parameters)
    sq_entries, cq_entries = words[:2]
    sq_tail, sq_array, cq_head, cq_tail, cqes = words[11], words[16], words[20], words[21], words[25]
    sq = mmap.mmap(ring, sq_array + sq_entries * 4, offset=0)
    cq = mmap.mmap(ring, cqes + cq_entries * 16, offset=0x8000000)
    entries = mmap.mmap(ring, sq_entries * 64, offset=0x10000000)
    target = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + b"\0" * 8
    place = ctypes.create_string_buffer(target, 16)
    entry = struct.pack("=BBHiQQIIQ", 16, 0, 0, s.fileno(), 16, ctypes.addressof(place), 0, 0, 7)
    entries[0:64] = entry.ljust(64, b"\0")
    sq[sq_array:sq_array + 4] = struct.pack("=I", 0)
    sq[sq_tail:sq_tail + 4] = struct.pack("=I", 1)
    begin = time.monotonic()
    if libc.syscall(426, ring, 1, 1, 1, None, 0) < 0:
        return name(ctypes.get_errno()), None
    end = time.monotonic()
    data, result, _ = struct.unpack_from("=QiI", cq, cqes)
    os.close(ring)
    assert data == 7
    return name(-result), (begin, end)
"""

Row = dict[str, Any]
Saw = list[Any]  # errno's name, begin, end
ports = itertools.count(7000)


def new_port() -> int:
    return next(ports)


class Site:
    """The lab, its programs, and the tools: the one that shows each row, and those of test_together()."""

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
        """Of all but the attempt that is older than the tool."""
        older = sum(s.retransmits for s in self.lab.client.sockets() if s.rport == 6999)
        return self.lab.client.counters()["TcpExtTCPSynRetrans"] - older


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


@pytest.fixture(scope="module")
def sees_every_call() -> bool:
    """Not only the system call connect()."""
    return knows("connected", "connected__fexit")


SYNCNT_1 = [(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab, ExitStack() as stack:
        lab.server.blackhole("198.51.100.0/24")
        lab.server.blackhole("2001:db8:51::/64")
        client, older, server = Puppet(lab.client, "client"), Puppet(lab.client, "older"), Puppet(lab.server, "server")
        client.do(CALLS), older.do(CALLS), server.do(LISTEN)
        assert older.ask("started(address, 6999)", address=SILENT["4"]) == "EINPROGRESS"
        here = "--netns", str(lab.client.inode)
        started = [
            RunningTool("connect", *here),
            RunningTool("connect", "--failed", *here),
            RunningTool("connect", "--count", *here),
            RunningTool("connect", "--count", "--by", "comm,outcome", "-i", "1", "--time", "none", *here),
        ]
        found = Site(lab, [stack.enter_context(tool) for tool in started], client, server, older)
        yield found
        done = found.tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0
        assert done.stats["shown"] == len(done.rows)
        assert Counter(row["rport"] for row in done.rows) == +found.expected


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
def test_established(site: Site, family: str, call: str) -> None:
    port, address = site.listen(), site.target(family)
    saw = site.call(call, address, port)
    laddr, lport = site.client.ask("local()")
    cookie = site.client.ask("cookie()")
    site.close()
    assert saw[0] == "none"
    row = site.row(port, saw, outcome="ESTABLISHED", syn_sent=True, syn_retrans=0, raddr=shown(address), lport=lport,
                   laddr=shown(laddr), family=version(family))  # fmt: skip
    assert row["latency_us"] is not None
    everywhere = Kernel().enumerator("BPF_FUNC_check_mtu") is not None
    assert row["cookie"] == cookie if everywhere else row["cookie"] in (cookie, None)


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
def test_refused(site: Site, family: str, call: str) -> None:
    port, address = new_port(), site.target(family)
    saw = site.call(call, address, port)
    assert saw[0] == "ECONNREFUSED"
    # Whoever asks again after the error was fetched is not told why, and no new attempt was made.
    assert site.call("again", address, port)[0] == ("ECONNABORTED" if call == "nonblocking" else "ECONNREFUSED")
    site.close()
    local = site.lab.client.address(socket.AF_INET6 if family == "6" else socket.AF_INET)
    count = 1 if call == "nonblocking" else 2
    row, *_ = site.rows(port, count, outcome="REFUSED", errno="ECONNREFUSED", syn_sent=True, syn_retrans=0,
                        raddr=shown(address), laddr=local, family=version(family), pid=site.client.pid)  # fmt: skip
    assert row["lport"] is not None
    assert row["latency_us"] <= span_us(saw) + 1


def test_the_second_call_fetches_the_error(site: Site) -> None:
    port, address = new_port(), site.target("4")
    assert site.call("started", address, port) == "EINPROGRESS"
    site.client.ask("outcome(fetch=False)")
    assert site.call("again", address, port)[0] == "ECONNREFUSED"
    site.row(port, outcome="REFUSED", errno="ECONNREFUSED")
    # From here on the socket is as good as new.
    assert site.call("again", NOWHERE["4"], port + 1000)[0] == "ENETUNREACH"
    site.row(port + 1000, outcome="UNREACHABLE", errno="ENETUNREACH", syn_sent=False)
    site.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_latency_with_a_retransmission(site: Site, family: str) -> None:
    """The answer waits until the SYN was sent again: the client's clock says how long, at least and at most."""
    port, address = site.listen(), site.target(family)
    with held(site.lab.server):
        assert site.call("started", address, port) == "EINPROGRESS"
        until(lambda: site.retransmitted(port), "a second SYN")
        waited = site.client.ask("time.monotonic() - after")
    saw = site.client.ask("outcome()")
    site.close()
    row = site.row(port, saw, outcome="ESTABLISHED", syn_retrans=1, syn_sent=True)
    assert row["latency_us"] >= waited * 1e6 - 1 >= 900_000


def test_timed_out(site: Site) -> None:
    """All families at the same time, blocking and not."""
    calls = [(Puppet(site.lab.client, f"patient-{family}"), family, new_port(), how)
             for family, how in zip((*FAMILIES, "4"), ("blocking", "nonblocking", "blocking", "nonblocking"),
                                    strict=True)]  # fmt: skip
    for puppet, *_ in calls:
        puppet.do(CALLS)
    before, retransmitted, parts = site.syn_retransmissions(), 0, []
    for puppet, family, port, how in calls:
        puppet.tell(f"saw = {how}(address, port, options=options)",
                    address=SILENT[family], port=port, options=SYNCNT_1)  # fmt: skip
    for puppet, family, port, _ in calls:
        puppet.answer()
        saw = puppet.ask("saw")
        assert saw[0] == "ETIMEDOUT"
        site.close(puppet)
        row = site.row(port, saw, owner=puppet, outcome="TIMED_OUT", syn_sent=True, raddr=shown(SILENT[family]),
                       family=version(family))  # fmt: skip
        retransmitted += row["syn_retrans"]
        parts.append(row["latency_us"] / span_us(saw))
        assert row["latency_us"] >= 1_000_000
        assert row["lport"] is not None
        puppet.kill()
    assert retransmitted == site.syn_retransmissions() - before >= len(calls)
    assert max(parts) >= 0.9  # a program may be woken up late, but not all of them


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
def test_no_route(site: Site, family: str, call: str) -> None:
    port = new_port()
    saw = site.call(call, NOWHERE[family], port)
    site.close()
    assert saw[0] == "ENETUNREACH"
    row = site.row(port, saw, outcome="UNREACHABLE", syn_sent=False, syn_retrans=0, latency_us=None, lport=None,
                   raddr=shown(NOWHERE[family]), family=version(family))  # fmt: skip
    assert row["laddr"] == ("::" if family == "6" else "0.0.0.0")


@pytest.mark.parametrize("family", ["4", "6"])
def test_no_route_from_a_port(site: Site, family: str) -> None:
    """Bound before: that end is known though no SYN was sent."""
    port, host = new_port(), site.lab.client
    local = host.ipv6 if family == "6" else host.ipv4
    saw = site.call("blocking", NOWHERE[family], port, local=[local, 31000])
    site.close()
    site.row(port, saw, outcome="UNREACHABLE", errno="ENETUNREACH", laddr=local, lport=31000, syn_sent=False)


def test_routes_that_say_no(site: Site) -> None:
    """Each kind of route has its errno, which connect() returns before a SYN."""
    outcomes = {"EACCES": "FAILED", "EHOSTUNREACH": "UNREACHABLE", "EINVAL": "FAILED"}
    for number, kind in enumerate(("prohibit", "unreachable", "blackhole")):
        address, port = f"203.0.113.{200 + number}", new_port()
        done = site.lab.client.spawn(["ip", "route", "add", kind, address])
        assert done.wait() == 0
        saw = site.call("blocking", address, port)
        site.close()
        row = site.row(port, saw, syn_sent=False, latency_us=None, raddr=address)
        assert row["outcome"] == outcomes.pop(saw[0])
    assert not outcomes


def test_a_neighbour_that_is_not_there(site: Site) -> None:
    """The kernel looks for its link address in vain, and tells itself so by ICMP."""
    port, client = new_port(), site.lab.client
    probes = client.sysctl("ipv4/neigh/veth0/app_solicit")
    client.sysctl("ipv4/neigh/veth0/app_solicit", 1)
    try:
        saw = site.call("blocking", NOBODY, port)
    finally:
        client.sysctl("ipv4/neigh/veth0/app_solicit", probes)
    site.close()
    assert saw[0] == "EHOSTUNREACH"
    row = site.row(port, saw, outcome="UNREACHABLE", syn_sent=True, raddr=NOBODY)
    assert row["latency_us"] >= 0.9 * span_us(saw)


def test_unreachable_behind_a_router(site: Site) -> None:
    """The router answers with ICMP. What comes while connect() is still at it decides nothing: the next SYN does."""
    port, server = new_port(), site.lab.server
    server.sysctl("ip_forward", 1)
    assert server.spawn(["ip", "route", "add", "unreachable", BEHIND]).wait() == 0
    assert site.lab.client.spawn(["ip", "route", "add", BEHIND, "via", server.ipv4]).wait() == 0
    saw = site.call("blocking", BEHIND, port)
    site.close()
    server.sysctl("ip_forward", 0)
    assert saw[0] == "EHOSTUNREACH"
    site.row(port, saw, outcome="UNREACHABLE", syn_sent=True, raddr=BEHIND)


def test_no_free_port(site: Site) -> None:
    port, address, client = site.listen(), site.target("4"), site.lab.client
    usual = client.sysctl("ip_local_port_range")
    client.sysctl("ip_local_port_range", "40000 40001")
    try:
        lports = set()
        for number in range(2):
            assert site.call("blocking", address, port)[0] == "none"
            lports.add(site.client.ask("local()[1]"))
            site.client.do(f"full_{number} = s")
        saw = site.call("blocking", address, port)
        also = site.call("nonblocking", address, port)
    finally:
        client.sysctl("ip_local_port_range", usual.replace("\t", " "))
    site.client.do("full_0.close(), full_1.close(), s.close()")
    assert (saw[0], also[0]) == ("EADDRNOTAVAIL", "EADDRNOTAVAIL")
    rows = site.rows(port, 4, pid=site.client.pid, raddr=address)
    assert {row["lport"] for row in rows[:2]} == lports == {40000, 40001}
    for row, seen in zip(rows[2:], (saw, also), strict=True):
        assert (row["outcome"], row["errno"]) == ("FAILED", "EADDRNOTAVAIL")
        assert (row["syn_sent"], row["lport"], row["syn_retrans"]) == (False, None, 0)
        assert row["latency_us"] is not None
        assert row["latency_us"] <= span_us(seen) + 1


def test_both_ends_are_taken(site: Site) -> None:
    """Two sockets at the same local port cannot be connected to the same remote one."""
    port, address = site.listen(), site.target("4")
    how = {"local": [site.lab.client.ipv4, 31001],
           "options": [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)]}  # fmt: skip
    assert site.call("blocking", address, port, **how)[0] == "none"
    site.client.do("first = s")
    saw = site.call("blocking", address, port, **how)
    site.client.do("first.close(), s.close()")
    assert saw[0] == "EADDRNOTAVAIL"
    first, second = site.rows(port, 2, lport=31001, laddr=site.lab.client.ipv4)
    assert (first["outcome"], second["outcome"]) == ("ESTABLISHED", "FAILED")
    assert (second["errno"], second["syn_sent"]) == ("EADDRNOTAVAIL", False)


ABORTS = {
    "close": "s.close()",
    "shutdown": "s.shutdown(socket.SHUT_RDWR)",
    "shutdown-write": "s.shutdown(socket.SHUT_WR)",
    "disconnect": "assert disconnect() == 'none'",
}


@pytest.mark.parametrize("way", ABORTS)
@pytest.mark.parametrize("family", ["4", "6"])
def test_aborted(site: Site, way: str, family: str) -> None:
    port = new_port()
    before = site.lab.client.counters()["TcpAttemptFails"]
    assert site.call("started", SILENT[family], port) == "EINPROGRESS"
    begin, after, laddr, lport = site.client.ask("(begin, after, *local())")
    site.client.do(f"closing = time.monotonic()\n{ABORTS[way]}\nend = time.monotonic()")
    closing, end = site.client.ask("(closing, end)")
    # The row does not wait until the socket is destroyed.
    row = site.row(port, outcome="ABORTED", errno="none", syn_sent=True, syn_retrans=0, laddr=laddr, lport=lport,
                   raddr=SILENT[family])  # fmt: skip
    site.close()
    assert (closing - after) * 1e6 - 1 <= row["latency_us"] <= (end - begin) * 1e6 + 1
    assert site.lab.client.counters()["TcpAttemptFails"] == before  # it is nobody's failure


@pytest.mark.parametrize("way", ["shutdown", "disconnect"])
def test_aborted_while_another_thread_waits(site: Site, way: str) -> None:
    """The waiting call returns an error that nobody on the network has sent. There are kernels that refuse to
    disconnect what a thread waits for: the attempt goes on."""
    port = new_port()
    site.client.do(
        "made(address, options=options); seen = []\n"
        "waiter = threading.Thread(target=lambda: seen.extend(again(address, port))); waiter.start()",
        address=SILENT["4"], port=port, options=SYNCNT_1,
    )  # fmt: skip
    until(lambda: any(s.rport == port for s in site.lab.client.sockets()), "a SYN")
    site.client.do(
        "try: error = disconnect() if way == 'disconnect' else s.shutdown(socket.SHUT_RDWR) or 'none'\n"
        "except OSError as problem: error = name(problem.errno)\n"
        "waiter.join()",
        way=way,
    )  # fmt: skip
    error, seen = site.client.ask("(error, seen)")
    site.close()
    if error == "EBUSY":
        assert seen[0] == "ETIMEDOUT"
        site.row(port, seen, outcome="TIMED_OUT")
    else:
        assert error == "none"
        assert seen[0] in ("ECONNRESET", "ECONNABORTED", "EPIPE")
        site.row(port, seen, outcome="ABORTED", syn_sent=True)


def test_its_process_is_killed(site: Site) -> None:
    port = new_port()
    mortal = Puppet(site.lab.client, "mortal")
    mortal.do(CALLS)
    mortal.tell("blocking(address, port)", address=SILENT["4"], port=port)
    until(lambda: any(s.rport == port for s in site.lab.client.sockets()), "a SYN")
    mortal.kill()
    site.row(port, owner=mortal, outcome="ABORTED", errno="none", syn_sent=True)


def test_killed(site: Site) -> None:
    port = new_port()
    assert site.call("started", SILENT["4"], port) == "EINPROGRESS"
    ss = site.lab.client.spawn(["ss", "-K", "dport", "=", f":{port}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, complaint = ss.communicate()
    if b"not supported" in complaint:
        site.close()
        site.row(port, outcome="ABORTED")
        pytest.skip(f"CONFIG_INET_DIAG_DESTROY is not set: {complaint.decode().strip()}")
    saw = site.client.ask("outcome()")
    site.close()
    assert saw[0] == "ECONNABORTED"
    row = site.row(port, saw, outcome="KILLED", syn_sent=True)
    assert row["latency_us"] is not None


def test_calls_that_say_nothing_new(site: Site) -> None:
    """EINPROGRESS, EALREADY, EISCONN: one attempt, one row."""
    port, address = site.listen(), site.target("4")
    with held(site.lab.server):
        assert site.call("started", address, port) == "EINPROGRESS"
        assert site.call("again", address, port)[0] == "EALREADY"
        assert site.call("again", address, port)[0] == "EALREADY"
    saw = site.client.ask("outcome()")
    assert site.call("again", address, port)[0] == "none"  # the first call after it says that it is
    assert site.call("again", address, port)[0] == "EISCONN"
    site.close()
    site.row(port, saw, outcome="ESTABLISHED")


def test_on_a_listener(site: Site) -> None:
    """connect() of a socket that listens is refused: not an attempt."""
    port = new_port()
    site.client.do("made('192.0.2.1').listen()")
    assert site.call("again", site.target("4"), port)[0] == "EISCONN"
    site.close()
    site.expected[port] = 0


@pytest.mark.parametrize("how", ["signal", "timeout"])
def test_an_interrupted_call(site: Site, how: str) -> None:
    """It returns early; the row comes with the outcome."""
    port, address = site.listen(), site.target("4")
    site.client.do("made(address)", address=address)
    if how == "signal":
        # Again and again: the first one may come before the call.
        interruption = "signal.signal(signal.SIGALRM, lambda *_: 0); signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)"
    else:
        interruption = "s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack('ll', 0, 50000))"
    target = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)
    with held(site.lab.server):
        site.client.do(f"{interruption}\nbegin = time.monotonic()")
        error = site.client.ask("raw_connect(target, 16)", target=target.hex())
        site.client.do("signal.setitimer(signal.ITIMER_REAL, 0)")
        assert error == ("EINTR" if how == "signal" else "EINPROGRESS")
        assert not [row for row in site.tool.rows if row["rport"] == port]
    saw = site.client.ask("outcome()")
    site.close()
    row = site.row(port, saw, outcome="ESTABLISHED")
    if how == "timeout":
        assert row["latency_us"] >= 50_000 - 10_000  # the time is counted in jiffies


@pytest.mark.parametrize("bound", [False, True])
def test_a_socket_is_used_again_after_a_failure(site: Site, bound: bool) -> None:
    """Refused, then aborted after a second, then established: the figures are those of each attempt alone."""
    refused, port, address = new_port(), site.listen(), site.target("4")
    local = [site.lab.client.ipv4, 31002] if bound else None
    first = site.call("blocking", address, refused, local=local)
    row = site.row(refused, first, outcome="REFUSED")
    lports = [row["lport"]]
    with held(site.lab.server):
        site.client.do("s.setblocking(False)")
        assert site.call("again", address, port)[0] == "EINPROGRESS"
        lports.append(site.client.ask("local()[1]"))
        until(lambda: site.retransmitted(port), "a second SYN")
        assert site.client.ask("disconnect()") == "none"
    site.client.do("s.setblocking(True)")
    last = site.call("again", address, port)
    lports.append(site.client.ask("local()[1]"))
    site.close()
    aborted, established = site.rows(port, 2, pid=site.client.pid)
    assert [row["lport"], aborted["lport"], established["lport"]] == lports
    assert (aborted["outcome"], aborted["syn_retrans"]) == ("ABORTED", 1)
    assert (established["outcome"], established["syn_retrans"]) == ("ESTABLISHED", 0)
    assert established["latency_us"] <= span_us(last) + 1
    assert aborted["latency_us"] >= 900_000
    assert set(lports) == {31002} if bound else None not in lports


def test_a_socket_is_used_again_after_a_connection(site: Site) -> None:
    one, two, address = site.listen(), site.listen(), site.target("4")
    assert site.call("blocking", address, one)[0] == "none"
    lports = [site.client.ask("local()[1]")]
    assert site.client.ask("disconnect()") == "none"
    assert site.call("again", address, two)[0] == "none"
    lports.append(site.client.ask("local()[1]"))
    assert site.client.ask("disconnect()") == "none"
    nowhere = new_port()
    saw = site.call("again", NOWHERE["4"], nowhere)
    assert saw[0] == "ENETUNREACH"
    site.close()
    rows = [site.row(one, outcome="ESTABLISHED"), site.row(two, outcome="ESTABLISHED")]
    assert [row["lport"] for row in rows] == lports
    site.row(nowhere, saw, outcome="UNREACHABLE", lport=None, laddr="0.0.0.0")


def test_an_address_at_the_end_of_memory(site: Site) -> None:
    """An IPv4 address is shorter than one of IPv6: nothing behind it is read."""
    port = new_port()
    target = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(NOWHERE["4"]) + bytes(8)
    site.client.do(
        "import mmap; pages = mmap.mmap(-1, 2 * mmap.PAGESIZE); made(address)\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(pages)); end = start + mmap.PAGESIZE\n"
        "assert libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0\n"
        "pages[mmap.PAGESIZE - 16:mmap.PAGESIZE] = bytes.fromhex(target)\n"
        "error = name(libc.connect(s.fileno(), ctypes.c_void_p(end - 16), 16) and ctypes.get_errno())",
        address=NOWHERE["4"], target=target.hex(),
    )  # fmt: skip
    assert site.client.ask("error") == "ENETUNREACH"
    site.close()
    site.row(port, outcome="UNREACHABLE", errno="ENETUNREACH", raddr=NOWHERE["4"])


def test_what_is_in_use_may_not_be_disconnected(site: Site) -> None:
    """connect() with AF_UNSPEC is no attempt, whatever comes of it."""
    port = site.listen()
    assert site.call("blocking", site.target("4"), port)[0] == "none"
    site.client.do("reader = threading.Thread(target=s.recv, args=(1,), daemon=True); reader.start()")
    assert site.client.ask("disconnect()") in ("none", "EBUSY")
    site.server.do("child, _ = listeners[port].accept(); child.close()", port=port)
    site.client.do("reader.join(); s.close()")
    site.row(port, outcome="ESTABLISHED")


def test_addresses_that_are_none(site: Site) -> None:
    """Too short, or of another family: what was not given is not made up."""
    target = (socket.AF_INET.to_bytes(2, "little") + (7999).to_bytes(2, "big") + socket.inet_aton("203.0.113.9")).hex()
    site.client.do("made('192.0.2.1')")
    assert site.client.ask("raw_connect(target, 8)", target=target) == "EINVAL"
    assert site.client.ask("raw_connect(target, 16)", target="01" + target[2:] + "00" * 8) == "EAFNOSUPPORT"
    site.close()
    short, other = site.rows(None, 2, outcome="FAILED", syn_sent=False, raddr=None, lport=None, pid=site.client.pid)
    assert [short["errno"], other["errno"]] == ["EINVAL", "EAFNOSUPPORT"]


def test_fast_open(site: Site, sees_every_call: bool) -> None:
    """sendto() connects: with the cookie of the first connection the second one's SYN carries data."""
    client, address = site.lab.client, site.target("4")
    site.lab.server.sysctl("tcp_fastopen", 3)
    client.sysctl("tcp_fastopen", 1)
    port = site.listen(fastopen=16)
    for count in (1, 2):
        saw = site.call("fast", address, port)
        lport = site.client.ask("local()[1]")
        assert saw[0] == "none"
        row = site.rows(port, count, outcome="ESTABLISHED", errno="none", syn_sent=True, pid=site.client.pid)[-1]
        assert row["lport"] == lport
        site.close()
    assert client.counters()["TcpExtTCPFastOpenActive"] == 1

    # TCP_FASTOPEN_CONNECT: connect() does nothing, and the SYN leaves with the first write.
    deferred = [(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)]
    opens = client.counters()["TcpActiveOpens"]
    begin = site.call("blocking", address, port, options=deferred)
    assert begin[0] == "none"
    assert client.counters()["TcpActiveOpens"] == opens
    site.client.do("s.send(b'x'); poll = select.poll(); poll.register(s, select.POLLOUT); poll.poll()\n"
                   "end, lport = time.monotonic(), local()[1]")  # fmt: skip
    end, lport = site.client.ask("(end, lport)")
    row = site.rows(port, 3, outcome="ESTABLISHED", errno="none", syn_sent=True)[-1]
    site.close()
    assert row["lport"] == lport
    assert row["latency_us"] <= (end - begin[1]) * 1e6 + 1

    # Given up before anything was written. connect() has returned 0: no call failed.
    assert site.call("blocking", address, port, options=deferred)[0] == "none"
    site.close()
    row = site.rows(port, 4)[-1]
    assert (row["outcome"], row["errno"], row["syn_sent"]) == ("ABORTED", "none", False)

    refused = new_port()
    saw = site.call("fast", address, refused)
    site.close()
    assert saw[0] == "ECONNREFUSED"
    site.row(refused, saw, outcome="REFUSED")
    nowhere = new_port()
    assert site.call("fast", NOWHERE["4"], nowhere)[0] == "ENETUNREACH"
    site.close()
    site.expected[nowhere] = 0
    if sees_every_call:
        site.row(nowhere, outcome="UNREACHABLE", errno="ENETUNREACH", syn_sent=False, latency_us=None)


def test_mptcp(site: Site) -> None:
    """To a server of plain TCP: one subflow, which is the connection."""
    address, port = site.target("4"), site.listen()
    try:
        enabled = site.lab.client.sysctl("mptcp/enabled")
    except Exception:
        assert not Path("/proc/sys/net/mptcp").exists()
        pytest.skip("this kernel has no MPTCP")
    if enabled == "0":
        site.lab.client.sysctl("mptcp/enabled", 1)
    for call in ("blocking", "nonblocking"):
        count = 1 if call == "blocking" else 2
        saw = site.call(call, address, port, protocol=IPPROTO_MPTCP)
        lport = site.client.ask("local()[1]")
        site.close()
        assert saw[0] == "none"
        row = site.rows(port, count, outcome="ESTABLISHED", errno="none", pid=site.client.pid, comm="client")[-1]
        assert row["lport"] == lport
        assert row["latency_us"] <= span_us(saw) + 1
    refused, nowhere = new_port(), new_port()
    saw = site.call("blocking", address, refused, protocol=IPPROTO_MPTCP)
    site.close()
    assert saw[0] == "ECONNREFUSED"
    site.row(refused, saw, outcome="REFUSED")
    saw = site.call("blocking", NOWHERE["4"], nowhere, protocol=IPPROTO_MPTCP)
    site.close()
    assert saw[0] == "ENETUNREACH"
    site.row(nowhere, saw, outcome="UNREACHABLE")


def test_io_uring(site: Site, sees_every_call: bool) -> None:
    address, port, refused, nowhere = site.target("4"), site.listen(), new_port(), new_port()
    puppet = Puppet(site.lab.client, "ring")
    puppet.do(CALLS + URING)
    error, times = puppet.ask("uring_connect(address, port)", address=address, port=port)
    if times is None:
        assert error in ("ENOSYS", "EPERM")
        pytest.skip(f"this kernel has no io_uring for us: io_uring_setup() says {error}")
    assert error == "none"
    site.row(port, [error, *times], owner=puppet, outcome="ESTABLISHED")
    error, times = puppet.ask("uring_connect(address, port)", address=address, port=refused)
    assert error == "ECONNREFUSED"
    site.row(refused, [error, *times], owner=puppet, outcome="REFUSED")
    error, times = puppet.ask("uring_connect(address, port)", address=NOWHERE["4"], port=nowhere)
    assert error == "ENETUNREACH"
    site.expected[nowhere] = 0
    if sees_every_call:
        site.row(nowhere, [error, *times], owner=puppet, outcome="UNREACHABLE")
    puppet.kill()


def test_older_than_the_tool(site: Site) -> None:
    """The owner is known, the beginning is not."""
    laddr, lport = site.older.ask("local()")
    site.close(site.older)
    row = site.row(6999, owner=site.older, latency_us=None, laddr=laddr, lport=lport, syn_sent=True,
                   raddr=SILENT["4"])  # fmt: skip
    assert (row["outcome"], row["errno"]) == ("ABORTED", "none")


@pytest.mark.parametrize("ending", ["established", "reset", "closed"])
def test_both_ends_begin(site: Site, ending: str) -> None:
    """SYNs that cross on their way: each end opens actively, and there is no listener."""
    client, server, port = site.lab.client, site.lab.server, new_port()
    lport = 32000 + ["established", "reset", "closed"].index(ending)
    opens = client.counters()["TcpActiveOpens"]
    with held(client):
        with held(server):
            site.client.ask("started(address, port, local=local_)", address=server.ipv4, port=port,
                            local_=[client.ipv4, lport])  # fmt: skip
            site.server.do("s = socket.socket(); s.setblocking(False); s.bind((mine, port)); s.connect_ex((to, lport))",
                           mine=server.ipv4, port=port, to=client.ipv4, lport=lport)  # fmt: skip
        until(lambda: any(s.rport == port and s.state == "SYN_RECV" for s in client.sockets()), "the other SYN")
        if ending == "reset":
            site.server.do("s.close()")
        elif ending == "closed":
            site.close()
    if ending == "closed":
        site.row(port, outcome="ABORTED", errno="none", lport=lport, syn_sent=True)
        site.server.do("s.close()")
        return
    saw = site.client.ask("outcome()")
    site.close()
    site.server.do("s.close()")
    assert client.counters()["TcpActiveOpens"] == opens + 1
    if ending == "established":
        assert saw[0] == "none"
        site.row(port, saw, outcome="ESTABLISHED", lport=lport, syn_sent=True)
    else:
        assert saw[0] == "ECONNRESET"
        site.row(port, saw, outcome="RESET", lport=lport, syn_sent=True)


def test_together(site: Site) -> None:
    """The other three against the rows: the same connections, put together."""
    rows = site.tool.rows
    failed, counted, intervals = site.others
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
