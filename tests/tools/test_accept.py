"""`accept` against the servers' own clocks, `ss` and SO_COOKIE. One tool watches the server's host."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import Lab
from tcpscope.lab.sockets import Socket
from tests.conftest import RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

PORTS = range(8000, 9000)
IPPROTO_MPTCP = 262
FAST_OPEN = 0x207  # client, server, neither needs a cookie
ACCEPT, ACCEPT4 = 43, 288  # x86-64

LIBRARY = """
import ctypes, mmap, select
libc = ctypes.CDLL(None, use_errno=True)
accepted, listeners = [], {}
def listen(port, family, address, backlog=16, protocol=0, reuse=False):
    listeners[port] = made = socket.socket(family, socket.SOCK_STREAM, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if reuse else socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((address, port))
    made.listen(backlog)
def cookie(made):
    return struct.unpack("Q", made.getsockopt(socket.SOL_SOCKET, 57, 8))[0]
def accept(port):
    begin = time.monotonic()
    made, peer = listeners[port].accept()
    end = time.monotonic()
    accepted.append(made)
    return peer[1], begin, end
def readable(port):
    select.select([listeners[port]], [], [])
    return time.monotonic()
def later(seconds):
    select.select([], [], [], seconds)
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def accept_by_uring(port, flags):
    "One accept, asked for and waited for with the bare system calls: man io_uring_setup, io_uring_enter."
    SETUP, ENTER, ACCEPT, GETEVENTS = 425, 426, 13, 1
    params = (ctypes.c_uint32 * 30)()
    ring = check(libc.syscall(SETUP, 4, params))
    try:
        entries, completions = params[0], params[1]
        _, tail, mask, _, _, _, array = params[10:17]
        done_head, done_tail, done_mask, _, _, cqes = params[20:26]
        requests = mmap.mmap(ring, array + 4 * entries, offset=0)
        answers = mmap.mmap(ring, cqes + 16 * completions, offset=0x8000000)
        slots = mmap.mmap(ring, 64 * entries, offset=0x10000000)
        slots[:64] = struct.pack("=BBHiQQIIQ24x", ACCEPT, flags, 0, listeners[port].fileno(), 0, 0, 0, 0, 7)
        requests[array : array + 4] = bytes(4)
        requests[tail : tail + 4] = struct.pack("=I", 1)
        check(libc.syscall(ENTER, ring, 1, 1, GETEVENTS, None, 0))
        user, result, _ = struct.unpack_from("=QiI", answers, cqes)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        accepted.append(socket.socket(fileno=result))
        return accepted[-1].getpeername()[1]
    finally:
        os.close(ring)
"""

Row = dict[str, Any]
ports = iter(PORTS)


class Older(NamedTuple):
    """What began before the tool."""

    waiting: tuple[int, int]  # in an accept queue: ports of the listener and of the client
    alone: tuple[Puppet, int]  # blocked in accept() on the only listener of that port
    shared: tuple[Puppet, int]  # the same, on one of two
    resting: int  # a listener that nobody has called


class Site(NamedTuple):
    lab: Lab
    server: Puppet
    client: Puppet
    older: Older
    tool: RunningTool

    def row(self, lport: int, rport: int) -> Row:
        def found(rows: list[Row]) -> list[Row]:
            return [row for row in rows if (row["lport"], row["rport"]) == (lport, rport)]

        (row,) = found(self.tool.wait_for(found))
        assert row["netns"] == self.lab.server.inode
        return row

    def listen(self, puppet: Puppet | None = None, *, address: str | None = None, **options: Any) -> int:
        port = options.pop("port", None) or next(ports)
        names = {"family": socket.AF_INET, "address": address or self.lab.server.ipv4} | options
        arguments = ", ".join(f"{name}={name}" for name in names)
        (puppet or self.server).do(f"listen(port, {arguments})", port=port, **names)
        return port

    def connect(self, port: int, *, family: int = socket.AF_INET, address: str | None = None) -> int:
        return connect(self.client, port, family, address or self.lab.server.address(family))

    def listener(self, port: int) -> Socket:
        """What `ss -ltn` says."""
        (found,) = (s for s in self.lab.server.sockets() if s.lport == port and s.state == "LISTEN")
        return found


def connect(client: Puppet, port: int, family: int, address: str) -> int:
    """The client's port, when the connection is established at its end."""
    client.do("made = socket.socket(family); before = time.monotonic(); made.connect((address, port))\n"
              "connections = globals().setdefault('connections', []); connections.append(made)",
              port=port, family=family, address=address)  # fmt: skip
    number: int = client.ask("made.getsockname()[1]")
    return number


def blocked_in_accept(puppet: Puppet) -> bool:
    number = Path(f"/proc/{puppet.pid}/syscall").read_text().split()[0]
    return number in (str(ACCEPT), str(ACCEPT4))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab, ExitStack() as stack:
        for host in lab.hosts:
            host.sysctl("tcp_fastopen", FAST_OPEN)
        server, alone, shared = (Puppet(lab.server, name) for name in ("server", "alone", "shared"))
        client = Puppet(lab.client, "client")
        for puppet in (server, alone, shared):
            puppet.do(LIBRARY)
        made = Site(lab, server, client, None, None)  # type: ignore[arg-type]
        older = made.listen()
        waiting = older, made.connect(older)
        both = made.listen(reuse=True)
        made.listen(shared, port=both, reuse=True)
        calls = (alone, made.listen(alone)), (shared, both)
        resting = made.listen()
        for puppet, port in calls:
            puppet.tell("blocked = accept(port)", port=port)
            until(lambda puppet=puppet: blocked_in_accept(puppet), "accept() to block")
        arguments = ("accept", "--netns", str(lab.server.inode))
        tool = stack.enter_context(RunningTool(*arguments))
        yield Site(lab, server, client, Older(waiting, *calls, resting), tool)
        done = tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0


def cookies_are_given() -> bool:
    return Kernel().enumerator("BPF_FUNC_check_mtu") is not None


def test_a_listener_older_than_the_tool(site: Site) -> None:
    """It gets a cookie from the tool: this comes first, because a look at all sockets gives one to each."""
    port = site.older.resting
    rport = site.connect(port)
    assert site.server.ask("accept(port)", port=port)[0] == rport
    row = site.row(port, rport)
    assert row["wait_us"] is not None
    if cookies_are_given():
        assert row["listener_cookie"] == site.server.ask("cookie(listeners[port])")
        assert row["cookie"] == site.server.ask("cookie(accepted[-1])")


def test_waited_since_before_the_tool(site: Site) -> None:
    port, rport = site.older.waiting
    until(lambda: site.listener(port).recv_q == 1, "it to wait still")
    assert site.server.ask("accept(port)", port=port)[0] == rport
    row = site.row(port, rport)
    assert row["wait_us"] is None
    assert (row["pid"], row["listener"], row["accept_queue"]) == (site.server.pid, site.lab.server.ipv4, 0)
    assert row["raddr"] == site.lab.client.ipv4


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["4", "6"])
def test_who_accepts_and_how_long_it_waited(site: Site, family: int) -> None:
    address, version = site.lab.server.address(family), 4 if family == socket.AF_INET else 6
    port = site.listen(family=family, address=address)
    rport = site.connect(port, family=family)
    readable = site.server.ask("readable(port)")
    site.server.do("later(0.05)")
    peer, begin, end = site.server.ask("accept(port)")
    row = site.row(port, rport)
    assert peer == rport
    assert (begin - readable) * 1e6 - 1 <= row["wait_us"] <= (end - site.client.ask("before")) * 1e6 + 1
    assert row["wait_us"] >= 50_000
    assert (row["laddr"], row["raddr"], row["family"]) == (address, site.lab.client.address(family), version)
    assert (row["pid"], row["comm"], row["uid"]) == (site.server.pid, "server", 0)
    assert row["listener"] == address
    if cookies_are_given():
        assert row["listener_cookie"] == site.server.ask("cookie(listeners[port])")
        assert row["cookie"] == site.server.ask("cookie(accepted[-1])")


def test_the_queue_of_that_moment(site: Site) -> None:
    """The same lengths and limit that `ss -ltn` shows after each accept()."""
    port = site.listen(backlog=5)
    for _ in range(6):
        site.connect(port)
    until(lambda: site.listener(port).recv_q == 6, "six that wait")
    for left in reversed(range(6)):
        rport, _, _ = site.server.ask("accept(port)")
        row, seen = site.row(port, rport), site.listener(port)
        assert (row["accept_queue"], row["accept_limit"]) == (seen.recv_q, seen.send_q) == (left, 5)
        assert row["listener_cookie"] in (seen.cookie, None)
    assert row["listener_cookie"] == seen.cookie  # ss has asked for it


@pytest.mark.parametrize(
    ("bound", "family", "to", "laddr"),
    [
        ("0.0.0.0", socket.AF_INET, "192.0.2.2", "192.0.2.2"),
        ("::", socket.AF_INET6, "2001:db8::2", "2001:db8::2"),
        ("::", socket.AF_INET6, "192.0.2.2", "192.0.2.2"),
        ("::ffff:192.0.2.2", socket.AF_INET6, "192.0.2.2", "192.0.2.2"),
    ],
    ids=["any", "any6", "dual-stack", "mapped"],
)
def test_the_listener_is_named(site: Site, bound: str, family: int, to: str, laddr: str) -> None:
    port = site.listen(family=family, address=bound)
    rport = site.connect(port, family=socket.AF_INET6 if ":" in to else socket.AF_INET, address=to)
    site.server.do("accept(port)")
    row = site.row(port, rport)
    assert (row["listener"], row["laddr"]) == (bound.removeprefix("::ffff:"), laddr)
    assert row["family"] == (6 if ":" in to else 4)
    assert row["listener_cookie"] in (site.listener(port).cookie, None)
    assert (row["accept_queue"], row["accept_limit"]) == (0, 16)


def test_accept_without_flags(site: Site) -> None:
    """Python calls accept4(); here is the older call, by the C library."""
    port = site.listen()
    rport = site.connect(port)
    site.server.do("accepted.append(socket.socket(fileno=check(libc.accept(listeners[port].fileno(), None, None))))")
    assert site.server.ask("accepted[-1].getpeername()[1]") == rport
    assert site.row(port, rport)["pid"] == site.server.pid


@pytest.mark.parametrize("flags", [0, 16], ids=["inline", "async"])
def test_accept_through_io_uring(site: Site, flags: int) -> None:
    port = site.listen()
    rport = site.connect(port)
    site.server.ask("readable(port)")
    try:
        assert site.server.ask("accept_by_uring(port, flags)", port=port, flags=flags) == rport
    except AssertionError as error:
        reason = re.search(r"\[Errno (\d+)\]", str(error))
        if reason is None or os.strerror(int(reason[1])) not in ("Function not implemented", "Operation not permitted"):
            raise
        switch = Path("/proc/sys/kernel/io_uring_disabled")
        assert not Kernel().has_type("io_kiocb") or switch.read_text().strip() != "0"
        pytest.skip("this kernel has no io_uring, or does not let us")
    row = site.row(port, rport)
    assert row["listener"] == site.lab.server.ipv4
    assert (row["accept_queue"], row["accept_limit"]) == (0, 16)
    assert (row["pid"], row["comm"], row["uid"]) == (site.server.pid, "server", 0)


def test_workers_on_one_listener(site: Site) -> None:
    """Each connection is of the worker that accepted it; --count adds them up."""
    listener = site.lab.server.socket(socket.AF_INET)
    port = next(ports)
    listener.bind((site.lab.server.ipv4, port))
    listener.listen(16)
    workers = [Puppet(site.lab.server, name, pass_fds=[listener.fileno()]) for name in ("first", "second", "third")]
    for worker in workers:
        worker.do(LIBRARY)
        worker.do("listeners[port] = socket.socket(fileno=number)", port=port, number=listener.fileno())
    expected: Counter[int] = Counter()
    with RunningTool("accept", "--count", "-L", str(port), "--netns", str(site.lab.server.inode)) as counting:
        for worker in itertools.islice(itertools.cycle([workers[0], *workers[:2], *workers]), 12):
            rport = site.connect(port)
            assert worker.ask("accept(port)")[0] == rport
            row = site.row(port, rport)
            assert (row["pid"], row["comm"]) == (worker.pid, worker.comm)
            expected[worker.pid] += 1
        done = counting.stop()
    counts: Counter[int] = Counter()
    for row in done.rows:
        if row.get("total", True):
            counts[row["pid"]] += row["count"]
    assert counts == expected
    listener.close()
    for worker in workers:
        worker.kill()


def test_listeners_that_share_a_port(site: Site) -> None:
    """SO_REUSEPORT: whose queue it waited in is known when it is accepted."""
    others = [Puppet(site.lab.server, name) for name in ("one", "two")]
    port = next(ports)
    for other in others:
        other.do(LIBRARY)
        site.listen(other, port=port, reuse=True)
        other.do("listeners[port].setblocking(False)")
    cookies = {other.pid: other.ask("cookie(listeners[port])") for other in others}
    for _ in range(6):
        rport = site.connect(port)
        until(lambda: any(s.lport == port and s.recv_q for s in site.lab.server.sockets()), "it to wait")
        for other in others:
            other.do("try: found = accept(port)[0]\nexcept BlockingIOError: found = None")
        (owner,) = (other for other in others if other.ask("found") == rport)
        row = site.row(port, rport)
        assert (row["pid"], row["comm"]) == (owner.pid, owner.comm)
        assert row["listener_cookie"] == cookies[owner.pid]
    for other in others:
        other.kill()


def test_a_call_that_began_before_the_tool(site: Site) -> None:
    puppet, port = site.older.alone
    rport = site.connect(port)
    puppet.answer()
    row = site.row(port, rport)
    assert (row["pid"], row["comm"], row["listener"]) == (puppet.pid, "alone", site.lab.server.ipv4)
    assert (row["accept_queue"], row["accept_limit"]) == (0, 16)
    # The next call is one like any other, and seen once.
    rport = site.connect(port)
    puppet.do("accept(port)", port=port)
    assert site.row(port, rport)["pid"] == puppet.pid
    assert len([row for row in site.tool.rows if row["lport"] == port]) == 2


def test_a_call_that_began_before_the_tool_on_a_shared_port(site: Site) -> None:
    """Which of the listeners it was is only known where the call's end is hooked, not the function's."""
    puppet, port = site.older.shared
    shared = None
    for _ in range(40):  # until the kernel has chosen the listener that is waited at
        rport = site.connect(port)
        child = (port, rport, "ESTABLISHED")  # not the request
        until(lambda child=child: any((s.lport, s.rport, s.state) == child for s in site.lab.server.sockets()),
              "the child")
        if site.server.ask("bool(select.select([listeners[port]], [], [], 0)[0])", port=port):
            site.server.do("accept(port)")
        else:
            puppet.answer()
            shared = site.row(port, rport)
            break
    assert shared is not None
    spec = Spec.of("connections")
    by_call = plan(spec, plan_refusals(spec, Kernel()))["accept"].program
    assert by_call is not None
    assert (shared["pid"], shared["comm"]) == (puppet.pid, "shared")
    if by_call.name == "accept__syscall":
        assert shared["listener_cookie"] in (puppet.ask("cookie(listeners[port])", port=port), None)
        assert (shared["listener"], shared["accept_queue"]) == (site.lab.server.ipv4, 0)
    else:
        names = ("listener", "listener_cookie", "accept_queue", "accept_limit")
        assert [shared[name] for name in names] == [None] * 4


def test_reset_before_accept(site: Site) -> None:
    """accept() returns it all the same."""
    port = site.listen()
    rport = site.connect(port)
    site.server.ask("readable(port)")
    site.client.do("made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
                   "connections.remove(made); made.close()")  # fmt: skip
    until(lambda: not any(s.lport == port and s.rport for s in site.lab.server.sockets()), "the reset")
    site.server.do("made, peer = listeners[port].accept()")
    row = site.row(port, rport)
    assert (row["pid"], row["raddr"], row["accept_queue"]) == (site.server.pid, site.lab.client.ipv4, 0)
    assert row["wait_us"] is not None
    site.server.do("made.close()")


def test_fast_open(site: Site) -> None:
    """A connection may be accepted before its handshake has ended."""
    port = site.listen()
    site.server.do("listeners[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)")
    before = site.lab.server.counters()["TcpExtTCPFastOpenPassive"]
    site.client.do("made = socket.socket(); connections.append(made); before = time.monotonic()\n"
                   "made.sendto(b'early', socket.MSG_FASTOPEN, (address, port))",
                   address=site.lab.server.ipv4, port=port)  # fmt: skip
    peer, _, end = site.server.ask("accept(port)")
    row = site.row(port, peer)
    assert site.lab.server.counters()["TcpExtTCPFastOpenPassive"] == before + 1
    assert 0 <= row["wait_us"] <= (end - site.client.ask("before")) * 1e6
    assert (row["raddr"], row["listener"]) == (site.lab.client.ipv4, site.lab.server.ipv4)


def test_mptcp(site: Site) -> None:
    """The socket that was called is a TCP socket behind an MPTCP one; so is the child, if its peer speaks MPTCP."""
    try:
        site.lab.server.socket(socket.AF_INET, protocol=IPPROTO_MPTCP).close()
    except OSError:
        assert not Kernel().has_type("mptcp_sock") or site.lab.server.sysctl("mptcp/enabled") == "0"
        pytest.skip("this kernel has no MPTCP")
    port = site.listen(protocol=IPPROTO_MPTCP)
    plain = site.connect(port)
    assert site.server.ask("accept(port)")[0] == plain
    site.client.do("made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); made.connect((address, port))\n"
                   "connections.append(made)", address=site.lab.server.ipv4, port=port)  # fmt: skip
    both = site.client.ask("made.getsockname()[1]")
    assert site.server.ask("accept(port)")[0] == both
    for rport in (plain, both):
        row = site.row(port, rport)
        assert (row["pid"], row["listener"], row["accept_queue"]) == (site.server.pid, site.lab.server.ipv4, 0)
        assert row["wait_us"] is not None


def test_every_accept_has_one_row(site: Site) -> None:
    """As many as the kernel counts as opened passively, less those that nobody has accepted."""
    port = site.listen(backlog=64)
    before = site.lab.server.counters()["TcpPassiveOpens"]
    expected = {site.connect(port) for _ in range(30)}
    until(lambda: site.listener(port).recv_q == 30, "all to wait")
    assert site.lab.server.counters()["TcpPassiveOpens"] == before + 30
    taken = [site.server.ask("accept(port)[0]") for _ in range(20)]
    rows = site.tool.wait_for(lambda rows: len([row for row in rows if row["lport"] == port]) >= 20)
    assert [row["rport"] for row in rows if row["lport"] == port] == taken
    assert set(taken) < expected
