"""`accept` against the servers' own clocks, the kernel's socket tables and counters, and SO_COOKIE."""

from __future__ import annotations

import itertools
import socket
import struct
from collections import Counter
from typing import Any

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool
from tests.record import PORTS, Call, Process, Script, Seen, Socket, Test, Watch, recorded
from tests.record.script import IPPROTO_TCP, TCP_FASTOPEN

ACCEPT = Watch("accept", "--port", PORTS)
COUNT = Watch("accept", "--count", "--port", PORTS)
PORT = 8000
IPPROTO_MPTCP = 262
FAST_OPEN = 0x207  # client, server, neither needs a cookie
ACCEPT4 = 288  # the system call's number
IOSQE_ASYNC = 16
ACCEPT4_I386, SOCKETCALL_I386 = 364, 102

Row = dict[str, Any]


class Caller:
    """The client. It keeps all of its connections."""

    def __init__(self, script: Script) -> None:
        self.process = script.client.process("client")
        self.server = script.server

    def connect(self, family: str = "4", address: str | None = None) -> tuple[Socket, Call, Call]:
        """A connection that is established at the client's end, the call that made it, and its own name."""
        made = self.process.socket(family)
        return made, made.connect(address or self.server.address(family), PORT), made.name()


def only_row(seen: Seen, script: Script) -> Row:
    """That of the one connection that was accepted, and of none at the client."""
    assert seen.rows(ACCEPT, script.client) == []
    return seen.row(ACCEPT, script.server)


def check_listener(
    row: Row, address: str | None, queue: int | None = 0, limit: int | None = 16, cookie: int | None = None
) -> None:
    found = row["listener"], row["accept_queue"], row["accept_limit"], row["listener_cookie"]
    assert found == (address, queue, limit, row["listener_cookie"] if cookie is None else cookie)


def given(seen: Seen, row: Row, **cookies: Call) -> None:
    """Cookies that nobody has asked for before the call are there where the kernel gives them to tracing programs."""
    for name, cookie in cookies.items():
        assert row[name] == cookie.ret if seen.machine.gives_cookies else row[name] in (cookie.ret, None)


def check_owner(row: Row, owner: Process) -> None:
    assert (row["pid"], row["comm"], row["uid"]) == (owner.pid, owner.comm, 0)


@recorded(ACCEPT)
def test_a_listener_older_than_the_tool(script: Script) -> Test:
    with script.older():
        server = script.server.process("server")
        listener = server.listener(PORT)
    _, connected, local = Caller(script).connect()
    child = listener.accept()
    own, its = child.cookie(), listener.cookie()
    seen = yield
    row = only_row(seen, script)
    assert (row["lport"], row["rport"]) == (PORT, local.ret) == (PORT, child.accepted.ret)
    assert 0 <= row["wait_us"] <= child.accepted.end_us - connected.begin_us + 1
    check_owner(row, server)
    check_listener(row, script.server.ipv4)
    given(seen, row, cookie=own, listener_cookie=its)


@pytest.mark.kernel
def test_a_listener_older_than_the_tool_is_given_a_cookie(lab: Lab, run_tool: type[RunningTool]) -> None:
    """By this tool, and at its start: others that run beside it would give one, too, and so does a look at sockets."""
    listener, client = lab.server.socket(socket.AF_INET), lab.client.socket(socket.AF_INET)
    with listener, client:
        listener.bind((lab.server.ipv4, PORT))
        listener.listen()
        with run_tool("accept", "--netns", str(lab.server.inode)) as tool:
            client.connect((lab.server.ipv4, PORT))
            listener.accept()[0].close()
            (row,) = tool.wait_for(lambda rows: rows)
        (cookie,) = struct.unpack("Q", listener.getsockopt(socket.SOL_SOCKET, 57, 8))  # SO_COOKIE
    given_to_programs = Kernel().enumerator("BPF_FUNC_check_mtu") is not None
    assert row["listener_cookie"] == (cookie if given_to_programs else None)


@recorded(ACCEPT)
def test_waited_since_before_the_tool(script: Script) -> Test:
    with script.older():
        server = script.server.process("server")
        listener = server.listener(PORT)
        _, _, local = Caller(script).connect()
        script.server.until_sockets(1, "==", "recv_q", state="LISTEN", lport=PORT)
    waits = script.server.diag("recv_q", state="LISTEN", lport=PORT)
    child = listener.accept()
    seen = yield
    assert waits.ret == 1
    row = only_row(seen, script)
    assert row["wait_us"] is None
    assert (row["lport"], row["raddr"], row["rport"]) == (PORT, script.client.ipv4, local.ret)
    assert child.accepted.ret == local.ret
    check_owner(row, server)
    check_listener(row, script.server.ipv4)


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(ACCEPT)
def test_who_accepts_and_how_long_it_waited(script: Script, family: str) -> Test:
    address = script.server.address(family)
    server = script.server.process("server")
    listener = server.listener(PORT, address)
    _, connected, local = Caller(script).connect(family)
    readable = listener.until_ready()
    server.pause(50_000)
    child = listener.accept()
    own, its = child.cookie(), listener.cookie()
    seen = yield
    call, row = child.accepted, only_row(seen, script)
    assert call.begin_us - readable.end_us - 1 <= row["wait_us"] <= call.end_us - connected.begin_us + 1
    assert row["wait_us"] >= 50_000
    assert (row["laddr"], row["lport"]) == (address, PORT)
    assert (row["raddr"], row["rport"]) == (script.client.address(family), local.ret) == (call.data, call.ret)
    assert row["family"] == int(family)
    check_owner(row, server)
    check_listener(row, address)
    given(seen, row, cookie=own, listener_cookie=its)


@recorded(ACCEPT)
def test_the_queue_of_that_moment(script: Script) -> Test:
    """The same lengths and limit that `ss -ltn` shows after each accept()."""
    server, client = script.server.process("server"), Caller(script)
    listener = server.listener(PORT, backlog=5)
    for _ in range(6):
        client.connect()
    script.server.until_sockets(6, "==", "recv_q", state="LISTEN", lport=PORT)
    taken = [(listener.accept(), script.server.sockets()) for _ in range(6)]
    seen = yield
    rows = seen.rows(ACCEPT, script.server)
    assert [row["rport"] for row in rows] == [child.accepted.ret for child, _ in taken]
    for row, (_, sockets), left in zip(rows, taken, reversed(range(6)), strict=True):
        (found,) = (found for found in sockets.sockets if found.state == "LISTEN")
        assert (found.recv_q, found.send_q) == (left, 5)
        check_listener(row, script.server.ipv4, found.recv_q, found.send_q, found.cookie)  # until_sockets asked for it


@pytest.mark.parametrize(
    ("bound", "to", "laddr"),
    [
        ("0.0.0.0", "192.0.2.2", "192.0.2.2"),
        ("::", "2001:db8::2", "2001:db8::2"),
        ("::", "192.0.2.2", "192.0.2.2"),
        ("::ffff:192.0.2.2", "192.0.2.2", "192.0.2.2"),
    ],
    ids=["any", "any6", "dual-stack", "mapped"],
)
@recorded(ACCEPT)
def test_the_listener_is_named(script: Script, bound: str, to: str, laddr: str) -> Test:
    listener = script.server.process("server").listener(PORT, bound, dual=":" in bound)
    _, _, local = Caller(script).connect("6" if ":" in to else "4", to)
    listener.accept()
    its = listener.cookie()
    seen = yield
    row = only_row(seen, script)
    assert (row["laddr"], row["lport"], row["rport"]) == (laddr, PORT, local.ret)
    assert row["family"] == (6 if ":" in to else 4)
    check_listener(row, bound.removeprefix("::ffff:"))
    given(seen, row, listener_cookie=its)


@recorded(ACCEPT)
def test_accept_without_flags(script: Script) -> Test:
    """By accept(), not accept4()."""
    server = script.server.process("server")
    listener = server.listener(PORT)
    _, _, local = Caller(script).connect()
    child = listener.accept(None)
    seen = yield
    row = only_row(seen, script)
    assert row["rport"] == local.ret == child.accepted.ret
    check_owner(row, server)


@pytest.mark.parametrize("flags", [0, IOSQE_ASYNC], ids=["inline", "async"])
@recorded(ACCEPT)
def test_accept_through_io_uring(script: Script, flags: int) -> Test:
    server = script.server.process("server")
    listener = server.listener(PORT)
    _, _, local = Caller(script).connect()
    listener.until_ready()
    child = listener.uring_accept(flags, may_fail=True)
    peer = child.peer(may_fail=True)
    seen = yield
    if child.accepted.errno in ("ENOSYS", "EPERM"):
        assert not seen.machine.kernel.has_type("io_kiocb") or seen.machine.config["io_uring_disabled"] != "0"
        pytest.skip("this kernel has no io_uring, or does not let us")
    assert (child.accepted.errno, peer.ret) == ("none", local.ret)
    row = only_row(seen, script)
    assert row["rport"] == local.ret
    check_owner(row, server)
    check_listener(row, script.server.ipv4)


@pytest.mark.parametrize("number", [ACCEPT4_I386, SOCKETCALL_I386])
@recorded(ACCEPT)
def test_accept_of_i386(script: Script, number: int) -> Test:
    server, worker = script.server.process("server"), script.server.process("worker")
    listener = worker.take(server.listener(PORT))
    _, _, local = Caller(script).connect()
    call = listener("i386_accept", worker.slot(), number, may_fail=True)
    seen = yield
    if call.errno == "ENOSYS":
        assert not seen.machine.kernel.has_type("compat_robust_list_head")
        pytest.skip("this kernel has no calls of i386")
    row = only_row(seen, script)
    assert row["rport"] == local.ret
    check_owner(row, worker)
    check_listener(row, script.server.ipv4)


@recorded(ACCEPT)
def test_another_call_of_i386_is_no_accept(script: Script) -> Test:
    """keyctl() has the number of accept4() on x86-64, and returns the descriptor of a connection."""
    with script.older():
        server = script.server.process("server")
        listener = server.listener(PORT)
        client = Caller(script)
        _, _, local = client.connect()
        child = listener.accept()
    call = listener("i386_keyctl", child.slot, may_fail=True)
    seen = yield
    if call.errno == "ENOSYS":
        assert not seen.machine.kernel.has_type("compat_robust_list_head")
        pytest.skip("this kernel has no calls of i386")
    assert (call.ret, child.accepted.ret) == (2, local.ret)
    assert seen.rows(ACCEPT, script.server) == []


@recorded(ACCEPT, COUNT)
def test_workers_on_one_listener(script: Script) -> Test:
    """Each connection is of the worker that accepted it; --count adds them up."""
    client, lister = Caller(script), script.server.process("lister")
    listener = lister.listener(PORT)
    workers = [script.server.process(name) for name in ("first", "second", "third")]
    listeners = {worker: worker.take(listener) for worker in workers}
    order = list(itertools.islice(itertools.cycle([workers[0], *workers[:2], *workers]), 12))
    taken = []
    for worker in order:
        _, _, local = client.connect()
        taken.append((local, listeners[worker].accept()))
    seen = yield
    rows = seen.rows(ACCEPT, script.server)
    assert [row["rport"] for row in rows] == [local.ret for local, _ in taken] == [c.accepted.ret for _, c in taken]
    for row, worker in zip(rows, order, strict=True):
        check_owner(row, worker)
    assert seen.rows(ACCEPT, script.client) == []
    run, counts = seen.run(COUNT), Counter[tuple[int, str]]()
    for row in run.rows:
        if row.get("total", True):
            counts[row["pid"], row["comm"]] += row["count"]
    ours = {process.pid for process in (lister, client.process, *workers)}
    assert {key: count for key, count in counts.items() if key[0] in ours} == Counter(
        (worker.pid, worker.comm) for worker in order
    )
    assert run.stats is not None
    assert counts.total() == run.stats["shown"]


@recorded(ACCEPT)
def test_listeners_that_share_a_port(script: Script) -> Test:
    """SO_REUSEPORT: whose queue it waited in is known when it is accepted."""
    client, owners = Caller(script), [script.server.process(name) for name in ("one", "two")]
    listeners = [owner.listener(PORT, reuse_port=True) for owner in owners]
    cookies = [listener.cookie() for listener in listeners]
    tried = []
    for listener in listeners:
        listener.blocking(False)
    for _ in range(6):
        _, _, local = client.connect()
        script.server.until_sockets(1, "==", "recv_q", state="LISTEN", lport=PORT)
        tried.append((local, [listener.accept(may_fail=True) for listener in listeners]))
    seen = yield
    rows = seen.rows(ACCEPT, script.server)
    for row, (local, children) in zip(rows, tried, strict=True):
        assert sorted(child.accepted.errno for child in children) == ["EAGAIN", "none"]
        (number,) = (number for number, child in enumerate(children) if child.accepted.ret == local.ret)
        assert row["rport"] == local.ret
        check_owner(row, owners[number])
        check_listener(row, script.server.ipv4, cookie=cookies[number].ret)


@recorded(ACCEPT)
def test_a_call_that_began_before_the_tool(script: Script) -> Test:
    with script.older():
        alone = script.server.process("alone")
        listener = alone.listener(PORT)
        child = listener.accept(wait=False)
        script.server.until_waiting(ACCEPT4, alone)
    client = Caller(script)
    _, _, first = client.connect()
    child.accepted.join()
    _, _, second = client.connect()
    listener.accept()
    seen = yield
    assert child.accepted.ret == first.ret
    # The second call is one like any other, and seen once.
    rows = seen.rows(ACCEPT, script.server)
    assert [row["rport"] for row in rows] == [first.ret, second.ret]
    for row in rows:
        check_owner(row, alone)
        check_listener(row, script.server.ipv4)


@recorded(ACCEPT)
def test_a_call_that_began_before_the_tool_on_a_shared_port(script: Script) -> Test:
    """Which of the listeners it was the child's birth has told, where the call's end does not."""
    with script.older():
        owners = [script.server.process(name) for name in ("one", "two")]
        listeners = [owner.listener(PORT, reuse_port=True) for owner in owners]
        cookies = [listener.cookie() for listener in listeners]
        same = [script.server.agent.take(listener) for listener in listeners]
        children = [listener.accept(wait=False) for listener in listeners]
        script.server.until_waiting(ACCEPT4, *owners)
    _, _, local = Caller(script).connect()
    script.server.until_sockets(1, field="owned", state="ESTABLISHED", lport=PORT)  # one of them has accepted it
    for listener, child in zip(same, children, strict=True):
        listener.shutdown("both")
        child.accepted.join()
    seen = yield
    assert sorted(child.accepted.errno for child in children) == ["EINVAL", "none"]
    (number,) = (number for number, child in enumerate(children) if child.accepted.errno == "none")
    row = only_row(seen, script)
    assert row["rport"] == local.ret == children[number].accepted.ret
    check_owner(row, owners[number])
    check_listener(row, script.server.ipv4, cookie=cookies[number].ret)


@recorded(ACCEPT)
def test_reset_before_accept(script: Script) -> Test:
    """accept() returns it all the same."""
    server = script.server.process("server")
    listener = server.listener(PORT)
    made, _, local = Caller(script).connect()
    listener.until_ready()
    made.linger()
    made.close()
    script.server.until_sockets(1, "==", lport=PORT)  # the listener
    child = listener.accept()
    seen = yield
    row = only_row(seen, script)
    assert (row["raddr"], row["rport"]) == (script.client.ipv4, local.ret) == (child.accepted.data, child.accepted.ret)
    assert row["wait_us"] is not None
    check_owner(row, server)
    check_listener(row, script.server.ipv4)


@recorded(ACCEPT)
def test_fast_open(script: Script) -> Test:
    """A connection may be accepted before its handshake has ended."""
    for host in script.hosts:
        host.sysctl("tcp_fastopen", FAST_OPEN)
    listener = script.server.process("server").listener(PORT)
    listener.option(IPPROTO_TCP, TCP_FASTOPEN, 5)
    made = script.client.process("client").socket()
    before = script.server.counters()
    sent = made.send_to("early", script.server.ipv4, PORT)
    child = listener.accept()
    after = script.server.counters()
    seen = yield
    row = only_row(seen, script)
    assert after.counters["TcpExtTCPFastOpenPassive"] == before.counters["TcpExtTCPFastOpenPassive"] + 1
    assert 0 <= row["wait_us"] <= child.accepted.end_us - sent.begin_us
    assert (row["raddr"], row["rport"]) == (script.client.ipv4, child.accepted.ret)
    check_listener(row, script.server.ipv4)


@recorded(ACCEPT)
def test_mptcp(script: Script) -> Test:
    """The socket that was called is a TCP socket behind an MPTCP one; so is the child, if its peer speaks MPTCP."""
    server, client = script.server.process("server"), script.client.process("client")
    for host in script.hosts:
        host.agent("sysctl", "mptcp/enabled", 1, may_fail=True)
    listener = server.listener(PORT, protocol=IPPROTO_MPTCP, may_fail=True)
    locals_, children = [], []
    for protocol in (0, IPPROTO_MPTCP):
        made = client.socket(protocol=protocol, may_fail=True)
        made.connect(script.server.ipv4, PORT, may_fail=True)
        locals_.append(made.name(may_fail=True))
        children.append(listener.accept(may_fail=True))
    seen = yield
    if listener.made.errno != "none":
        assert not seen.machine.kernel.has_type("mptcp_sock")
        pytest.skip("this kernel has no MPTCP")
    rows = seen.rows(ACCEPT, script.server)
    assert [row["rport"] for row in rows] == [local.ret for local in locals_] == [c.accepted.ret for c in children]
    for row in rows:
        assert row["wait_us"] is not None
        check_owner(row, server)
        check_listener(row, script.server.ipv4)


@recorded(ACCEPT)
def test_every_accept_has_one_row(script: Script) -> Test:
    """As many as the kernel counts as opened passively, less those that nobody has accepted."""
    server, client = script.server.process("server"), Caller(script)
    listener = server.listener(PORT, backlog=64)
    before = script.server.counter("TcpPassiveOpens")
    made = [client.connect()[2] for _ in range(30)]
    script.server.until_sockets(30, "==", "recv_q", state="LISTEN", lport=PORT)
    after = script.server.counter("TcpPassiveOpens")
    taken = [listener.accept().accepted for _ in range(20)]
    seen = yield
    assert after.ret == before.ret + 30
    assert [row["rport"] for row in seen.rows(ACCEPT, script.server)] == [call.ret for call in taken]
    assert {call.ret for call in taken} < {local.ret for local in made}
