"""`states` against the calls really made. One tool watches one host; each test has a port of its own there.

Both ends of most connections are in the same host, so that every packet is handled in the context of whoever sent it:
the process on the CPU is the wrong owner then.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime
from typing import Any, NamedTuple

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import Host, Lab
from tests.conftest import RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

SO_COOKIE = 57
ACTIVE_OPEN = ["CLOSE>SYN_SENT", "SYN_SENT>ESTABLISHED"]
PASSIVE_OPEN = ["LISTEN>SYN_RECV", "SYN_RECV>ESTABLISHED"]
CLOSES_FIRST = ["ESTABLISHED>FIN_WAIT1", "FIN_WAIT1>FIN_WAIT2", "FIN_WAIT2>CLOSE"]
CLOSES_SECOND = ["ESTABLISHED>CLOSE_WAIT", "CLOSE_WAIT>LAST_ACK", "LAST_ACK>CLOSE"]
BLACKHOLE = "198.51.100.0/24"

Rows = list[dict[str, Any]]
ports = itertools.count(8000)


class Older(NamedTuple):
    """What existed before the tool."""

    server: Puppet
    client: Puppet
    port: int


class Watched(NamedTuple):
    host: Host
    tool: RunningTool
    older: Older
    server: Puppet
    client: Puppet

    def rows(self, **wanted: Any) -> Rows:
        """The rows so far of which all these columns have these values."""
        return [row for row in self.tool.rows if all(row[name] == value for name, value in wanted.items())]

    def until(self, *last: str, **wanted: Any) -> Rows:
        """The rows of these values as soon as the transitions `last` are among them."""
        self.tool.wait_for(lambda _: set(last) <= set(steps(self.rows(**wanted))))
        return self.rows(**wanted)


def steps(rows: Rows) -> list[str]:
    return [f"{row['old_state']}>{row['new_state']}" for row in rows]


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with Lab() as lab, ExitStack() as stack:
        host = lab.client
        lab.server.blackhole(BLACKHOLE)
        older = Older(Puppet(host, "older-server"), Puppet(host, "older-client"), next(ports))
        open_pair(older.server, older.client, host.ipv4, older.port)
        server, client = Puppet(host, "server"), Puppet(host, "client")
        server.ask("1"), client.ask("1")
        tool = stack.enter_context(RunningTool("states", "--netns", str(host.inode)))
        yield Watched(host, tool, older, server, client)
        done = tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0
        assert done.stats["shown"] == len(done.rows)


def open_pair(server: Puppet, client: Puppet, address: str, port: int, family: int = socket.AF_INET) -> None:
    """`listener` and `child` in the server, `connection` in the client."""
    server.do(
        "listener = socket.socket(family); listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "listener.bind((address, port)); listener.listen()",
        family=family, address=address, port=port,
    )  # fmt: skip
    client.do(
        "before = time.monotonic(); connection = socket.socket(family); connection.connect((address, port))\n"
        "after = time.monotonic(); lport = connection.getsockname()[1]",
        family=family, address=address, port=port,
    )  # fmt: skip
    server.do("child, peer = listener.accept()")


def close_all(*puppets: Puppet) -> None:
    for puppet in puppets:
        puppet.do("[globals().pop(name).close() for name in ('child', 'connection', 'listener') if name in globals()]")


def timed(puppet: Puppet, code: str) -> tuple[float, float]:
    """When a call began and ended, on the clock that the kernel's time stamps are of."""
    puppet.do(f"begin = time.monotonic()\n{code}\nend = time.monotonic()")
    begin, end = puppet.ask("(begin, end)")
    return begin, end


def knows(hook: str) -> bool:
    """Whether this kernel offers the hook, by the kernel's own account."""
    spec = Spec.of("connections")
    return plan(spec, plan_refusals(spec, Kernel()))[hook].program is not None


@pytest.fixture(scope="module")
def follows() -> Callable[[str], str | None]:
    """What `followed_by` must say: nothing at all where the kernel has no hook for it."""
    known = knows("timewait")
    return lambda what: what if known else None


def check_ends(rows: Rows, *, laddr: str, raddr: str, family: int, pid: int | None, comm: str | None) -> None:
    for row in rows:
        assert (row["laddr"], row["raddr"], row["family"]) == (laddr, raddr, family), row
        assert (row["pid"], row["comm"]) == (pid, comm), row


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_server_closes_first_then_time_wait(
    watched: Watched, follows: Callable[[str], str | None], family: socket.AddressFamily
) -> None:
    server, client, port = watched.server, watched.client, next(ports)
    address, version = watched.host.address(family), 4 if family == socket.AF_INET else 6
    open_pair(server, client, address, port, family)
    lport = client.ask("lport")
    server.do("child.shutdown(socket.SHUT_WR)")
    watched.until("FIN_WAIT1>FIN_WAIT2", lport=port, rport=lport)
    assert client.ask("connection.recv(9) == b''")
    client.do("connection.close()")
    rows = watched.until("FIN_WAIT2>CLOSE", lport=port, rport=lport)
    close_all(server)

    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_FIRST]
    assert [row["followed_by"] for row in rows] == [None] * 4 + [follows("TIME_WAIT")]
    check_ends(rows, laddr=address, raddr=address, family=version, pid=server.pid, comm="server")
    assert {row["role"] for row in rows} == {"PASSIVE"}

    rows = watched.until("LAST_ACK>CLOSE", rport=port)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_SECOND]
    assert [row["followed_by"] for row in rows] == [None] * 4 + [follows("NOTHING")]
    check_ends(rows, laddr=address, raddr=address, family=version, pid=client.pid, comm="client")
    assert {row["role"] for row in rows} == {"ACTIVE"}
    # The port is known on the first transition too, though it was chosen after it.
    assert {row["lport"] for row in rows} == {lport}
    assert {row["uid"] for row in rows} == {0}
    assert {row["netns"] for row in rows} == {watched.host.inode}
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


def test_server_closes_first_then_timed_fin_wait2(watched: Watched, follows: Callable[[str], str | None]) -> None:
    """A socket that nobody holds waits for the other end's FIN as a timewait socket in FIN_WAIT2."""
    server, client, port = watched.server, watched.client, next(ports)
    open_pair(server, client, watched.host.ipv4, port)
    lport = client.ask("lport")
    server.do("child.close()")
    rows = watched.until("FIN_WAIT2>CLOSE", lport=port, rport=lport)
    close_all(client, server)
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_FIRST]
    assert rows[-1]["followed_by"] == follows("FIN_WAIT2")


def test_server_closes_second(watched: Watched, follows: Callable[[str], str | None]) -> None:
    server, client, port = watched.server, watched.client, next(ports)
    open_pair(server, client, watched.host.ipv4, port)
    lport = client.ask("lport")
    client.do("connection.shutdown(socket.SHUT_WR)")
    assert server.ask("child.recv(9) == b''")
    close_all(server)
    rows = watched.until("LAST_ACK>CLOSE", lport=port, rport=lport)
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_SECOND]
    assert rows[-1]["followed_by"] == follows("NOTHING")
    rows = watched.until("FIN_WAIT2>CLOSE", rport=port)
    close_all(client)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_FIRST]
    assert rows[-1]["followed_by"] == follows("TIME_WAIT")
    check_ends(rows, laddr=watched.host.ipv4, raddr=watched.host.ipv4, family=4, pid=client.pid, comm="client")


def test_a_reset_connection_goes_at_once(watched: Watched, follows: Callable[[str], str | None]) -> None:
    """Unread data turns close() into a reset."""
    server, client, port = watched.server, watched.client, next(ports)
    open_pair(server, client, watched.host.ipv4, port)
    lport = client.ask("lport")
    client.do("connection.send(b'never read')")
    server.do("import select; select.select([child], [], [])")
    close_all(server)
    rows = watched.until("ESTABLISHED>CLOSE", lport=port, rport=lport)
    assert steps(rows) == [*PASSIVE_OPEN, "ESTABLISHED>CLOSE"]
    assert rows[-1]["followed_by"] == follows("NOTHING")
    rows = watched.until("ESTABLISHED>CLOSE", rport=port)
    close_all(client)
    assert steps(rows) == [*ACTIVE_OPEN, "ESTABLISHED>CLOSE"]
    assert rows[-1]["pid"] == client.pid


def test_v4_mapped_is_ipv4(watched: Watched) -> None:
    """Sockets of AF_INET6 at both ends that talk IPv4."""
    server, client, port = watched.server, watched.client, next(ports)
    server.do(
        "listener = socket.socket(socket.AF_INET6); listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)\n"
        "listener.bind(('::', port)); listener.listen()",
        port=port,
    )
    client.do(
        "connection = socket.socket(socket.AF_INET6); connection.connect((address, port))\n"
        "lport = connection.getsockname()[1]",
        address=f"::ffff:{watched.host.ipv4}", port=port,
    )  # fmt: skip
    lport = client.ask("lport")
    server.do("child, _ = listener.accept()")
    assert server.ask("child.family == socket.AF_INET6")
    close_all(client)
    assert server.ask("child.recv(9) == b''")  # otherwise both may close at a time
    close_all(server)
    rows = watched.until("LAST_ACK>CLOSE", lport=port, rport=lport)
    address = watched.host.ipv4
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_SECOND]
    check_ends(rows, laddr=address, raddr=address, family=4, pid=server.pid, comm="server")
    rows = watched.until("FIN_WAIT2>CLOSE", rport=port)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_FIRST]
    check_ends(rows, laddr=address, raddr=address, family=4, pid=client.pid, comm="client")
    rows = watched.until("LISTEN>CLOSE", lport=port, rport=None)
    assert {(row["family"], row["laddr"], row["raddr"]) for row in rows} == {(6, "::", None)}


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_refused(watched: Watched, follows: Callable[[str], str | None], family: socket.AddressFamily) -> None:
    client, port, address = watched.client, next(ports), watched.host.address(family)
    client.do("connection = socket.socket(family); error = connection.connect_ex((address, port))",
              family=family, address=address, port=port)  # fmt: skip
    assert client.ask("os.strerror(error)") == "Connection refused"
    close_all(client)
    rows = watched.until("SYN_SENT>CLOSE", rport=port)
    assert steps(rows) == ["CLOSE>SYN_SENT", "SYN_SENT>CLOSE"]
    check_ends(rows, laddr=address, raddr=address, family=4 if family == socket.AF_INET else 6,
               pid=client.pid, comm="client")  # fmt: skip
    assert rows[0]["lport"] is not None
    assert rows[0]["lport"] == rows[1]["lport"]
    assert rows[0]["in_state_us"] is None
    assert rows[1]["in_state_us"] is not None
    assert rows[1]["followed_by"] == follows("NOTHING")


def test_no_answer(watched: Watched) -> None:
    """Nobody answers until the client gives up."""
    client, port, address = watched.client, next(ports), "198.51.100.7"
    client.do("connection = socket.socket(); connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)")
    begin, end = timed(client, f"error = connection.connect_ex(('{address}', {port}))")
    assert client.ask("os.strerror(error)") == "Connection timed out"
    close_all(client)
    rows = watched.until("SYN_SENT>CLOSE", rport=port)
    assert steps(rows) == ["CLOSE>SYN_SENT", "SYN_SENT>CLOSE"]
    check_ends(rows, laddr=watched.host.ipv4, raddr=address, family=4, pid=client.pid, comm="client")
    assert rows[0]["lport"] == rows[1]["lport"]
    assert rows[0]["lport"] is not None
    assert 1_000_000 <= rows[1]["in_state_us"] <= (end - begin) * 1e6


def test_times_in_states(watched: Watched) -> None:
    """Each time in a state lies between the times that the programs' own clocks allow."""
    server, client, port = watched.server, watched.client, next(ports)
    wall = time.time()
    open_pair(server, client, watched.host.ipv4, port)
    accepted = time.monotonic()
    called, returned, lport = client.ask("(before, after, lport)")
    client.do("import select; select.select([], [], [], 0.05)")
    first = timed(client, "connection.shutdown(socket.SHUT_WR)")
    arrived = timed(server, "child.recv(1)")[1]
    watched.until("FIN_WAIT1>FIN_WAIT2", rport=port)
    client.do("select.select([], [], [], 0.05)")
    second = timed(server, "child.close()")
    ended = timed(client, "connection.recv(1)")[1]
    rows = {row["old_state"]: row for row in watched.until("FIN_WAIT2>CLOSE", rport=port)}
    children = {row["old_state"]: row for row in watched.until("LAST_ACK>CLOSE", lport=port, rport=lport)}
    close_all(client, server)

    def between(row: dict[str, Any], shortest: float, longest: float) -> None:
        assert shortest * 1e6 - 1 <= row["in_state_us"] <= longest * 1e6 + 1, row

    # What is sent within a call of one end may reach the other after it: there, what has been received counts.
    between(rows["SYN_SENT"], 0, returned - called)
    between(rows["ESTABLISHED"], first[0] - returned, first[1] - called)
    between(children["ESTABLISHED"], first[0] - accepted, arrived - called)
    between(children["CLOSE_WAIT"], second[0] - arrived, second[1] - first[0])
    # The FIN may be acknowledged within shutdown(), or by the timer of the delayed acknowledgement.
    waited = rows["FIN_WAIT1"]["in_state_us"] + rows["FIN_WAIT2"]["in_state_us"]
    assert (second[0] - first[1]) * 1e6 - 2 <= waited <= (ended - first[0]) * 1e6 + 2
    assert rows["FIN_WAIT2"]["in_state_us"] >= 50_000
    assert children["LISTEN"]["in_state_us"] is None
    # The time stamps themselves: from connect() to shutdown(), and against the wall clock, which may be adjusted.
    stamps = {state: datetime.fromisoformat(row["time"]).timestamp() for state, row in rows.items()}
    assert first[0] - returned <= stamps["ESTABLISHED"] - stamps["CLOSE"] + 1e-5
    assert stamps["ESTABLISHED"] - stamps["CLOSE"] - 1e-5 <= first[1] - called
    assert wall - 1 < stamps["CLOSE"] < stamps["FIN_WAIT2"] < time.time() + 1


def test_older_than_the_tool(watched: Watched) -> None:
    """The owner comes from the seed; how long the first state lasted is not known."""
    (server, client, port), address = watched.older, watched.host.ipv4
    lport = client.ask("lport")
    client.do("connection.shutdown(socket.SHUT_WR)")
    assert server.ask("child.recv(9) == b''")
    server.do("child.close()")
    rows = watched.until("LAST_ACK>CLOSE", lport=port, rport=lport)
    assert steps(rows) == CLOSES_SECOND
    assert [row["in_state_us"] is None for row in rows] == [True, False, False]
    check_ends(rows, laddr=address, raddr=address, family=4, pid=server.pid, comm="older-server")
    rows = watched.until("FIN_WAIT2>CLOSE", rport=port, lport=lport)
    assert steps(rows) == CLOSES_FIRST
    assert [row["in_state_us"] is None for row in rows] == [True, False, False]
    check_ends(rows, laddr=address, raddr=address, family=4, pid=client.pid, comm="older-client")

    # The listener is older too; its new child is its own.
    watched.client.do("connection = socket.create_connection((address, port))", address=address, port=port)
    new = watched.client.ask("connection.getsockname()[1]")
    rows = watched.until("SYN_RECV>ESTABLISHED", lport=port, rport=new)
    assert {row["pid"] for row in rows} == {server.pid}
    server.do("listener.close()")
    rows = watched.until("LISTEN>CLOSE", lport=port, rport=None)
    assert [(row["pid"], row["in_state_us"], row["role"]) for row in rows] == [(server.pid, None, "LISTENER")]
    close_all(watched.client)


def test_listener(watched: Watched, follows: Callable[[str], str | None]) -> None:
    server, port = watched.server, next(ports)
    address = watched.host.ipv4
    first = timed(server, f"listener = socket.socket(); listener.bind(('{address}', {port})); listener.listen()")
    second = timed(server, "listener.close(); del listener")
    rows = watched.until("LISTEN>CLOSE", lport=port)
    assert steps(rows) == ["CLOSE>LISTEN", "LISTEN>CLOSE"]
    check_ends(rows, laddr=address, raddr=None, family=4, pid=server.pid, comm="server")
    assert {(row["role"], row["rport"]) for row in rows} == {("LISTENER", None)}
    assert rows[0]["in_state_us"] is None
    assert (second[0] - first[1]) * 1e6 - 1 <= rows[1]["in_state_us"] <= (second[1] - first[0]) * 1e6 + 1
    assert rows[1]["followed_by"] == follows("NOTHING")


def test_accepted_by_another_process(watched: Watched) -> None:
    """Until accept() a child is the listener's; then it is of the process that called accept()."""
    port = next(ports)
    listener = watched.host.socket(socket.AF_INET)
    listener.bind((watched.host.ipv4, port))
    attach = "listener = socket.socket(fileno=number)"
    lister = Puppet(watched.host, "lister", pass_fds=[listener.fileno()])
    worker = Puppet(watched.host, "worker", pass_fds=[listener.fileno()])
    lister.do(f"{attach}; listener.listen()", number=listener.fileno())
    worker.do(attach, number=listener.fileno())
    client = watched.client
    client.do("connection = socket.create_connection((address, port))", address=watched.host.ipv4, port=port)
    lport = client.ask("connection.getsockname()[1]")
    watched.until(*PASSIVE_OPEN, lport=port, rport=lport)
    worker.do("child, _ = listener.accept()")
    close_all(client)
    watched.until("ESTABLISHED>CLOSE_WAIT", lport=port, rport=lport)
    worker.do("child.close()")
    rows = watched.until("LAST_ACK>CLOSE", lport=port, rport=lport)
    listener.close()
    owners = [(row["pid"], row["comm"]) for row in rows]
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_SECOND]
    assert owners == [(lister.pid, "lister")] * 2 + [(worker.pid, "worker")] * 3
    rows = watched.rows(lport=port, rport=None)
    assert [(row["pid"], row["new_state"]) for row in rows] == [(lister.pid, "LISTEN")]


def test_owner_is_kept_after_its_end(watched: Watched) -> None:
    server, port = watched.server, next(ports)
    client = Puppet(watched.host, "mortal")
    open_pair(server, client, watched.host.ipv4, port)
    client.do("connection.shutdown(socket.SHUT_WR)")
    watched.until("FIN_WAIT1>FIN_WAIT2", rport=port)
    lport = client.ask("lport")
    server.do("child.send(b'this keeps the socket alive' * 10)")
    pid = client.pid
    client.do("connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 120)")
    # What was not read makes the end of the process a reset: the other end is told then, with its own owner.
    client.kill()
    rows = watched.until("FIN_WAIT2>CLOSE", rport=port)
    assert {(row["pid"], row["comm"]) for row in rows} == {(pid, "mortal")}
    rows = watched.until("CLOSE_WAIT>CLOSE", lport=port, rport=lport)
    close_all(server)
    assert {(row["pid"], row["comm"]) for row in rows} == {(server.pid, "server")}


def test_owner_is_kept_while_the_socket_outlives_it(watched: Watched) -> None:
    """The process is gone, the kernel still closes its connection: the rest happens in nobody's context."""
    server, port = watched.server, next(ports)
    client = Puppet(watched.host, "forgotten")
    open_pair(server, client, watched.host.ipv4, port)
    lport, pid = client.ask("lport"), client.pid
    client.do("connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 120)")  # stays a full socket in FIN_WAIT2
    client.kill()
    watched.until("FIN_WAIT1>FIN_WAIT2", rport=port)
    server.do("child.close()")
    rows = watched.until("FIN_WAIT2>CLOSE", rport=port)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_FIRST]
    assert {(row["pid"], row["comm"], row["lport"]) for row in rows} == {(pid, "forgotten", lport)}
    close_all(server)


def test_reuseport(watched: Watched) -> None:
    """Nobody can say whose child it will be; whoever accepts it owns it. A listener that is gone owns nothing."""
    port, address = next(ports), watched.host.ipv4
    puppets = [Puppet(watched.host, "first"), Puppet(watched.host, "second")]
    for puppet in puppets:
        puppet.do(
            "listener = socket.socket(); listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
            "listener.bind((address, port)); listener.listen(); listener.setblocking(False)",
            address=address, port=port,
        )  # fmt: skip
    until(lambda: len(watched.rows(lport=port, rport=None)) == 2, "both listeners")
    assert [row["comm"] for row in watched.rows(lport=port, rport=None)] == ["first", "second"]

    client = watched.client
    for _ in range(4):
        client.do("connection = socket.create_connection((address, port))", address=address, port=port)
        lport = client.ask("connection.getsockname()[1]")
        watched.until(*PASSIVE_OPEN, lport=port, rport=lport)  # it waits in one of the two queues
        accepter = next(puppet for puppet in puppets if _accepts(puppet))
        close_all(client)
        watched.until("ESTABLISHED>CLOSE_WAIT", lport=port, rport=lport)
        accepter.do("child.close()")
        rows = watched.until("LAST_ACK>CLOSE", lport=port, rport=lport)
        assert [row["comm"] for row in rows[:2]] == [None, None]
        assert [row["pid"] for row in rows[:2]] == [None, None]
        assert [row["uid"] for row in rows[:2]] == [None, None]
        assert {(row["pid"], row["comm"]) for row in rows[2:]} == {(accepter.pid, accepter.comm)}

    puppets[0].do("listener.close()")
    watched.until("LISTEN>CLOSE", lport=port, rport=None)
    client.do("connection = socket.create_connection((address, port))", address=address, port=port)
    lport = client.ask("connection.getsockname()[1]")
    rows = watched.until(*PASSIVE_OPEN, lport=port, rport=lport)
    assert puppets[0].pid not in {row["pid"] for row in rows}
    close_all(client)
    close_all(puppets[1])


def _accepts(puppet: Puppet) -> bool:
    puppet.do(
        "try: child, _ = listener.accept(); accepts = True\n"
        "except BlockingIOError: accepts = False"
    )  # fmt: skip
    return bool(puppet.ask("accepts"))


def test_cookie(watched: Watched) -> None:
    """What SO_COOKIE says, on every row where the kernel gives cookies to tracing programs (5.12)."""
    server, client, port = watched.server, watched.client, next(ports)
    open_pair(server, client, watched.host.ipv4, port)
    cookie = f".getsockopt(socket.SOL_SOCKET, {SO_COOKIE}, 8)"
    own = client.ask(f"struct.unpack('Q', connection{cookie})")[0]
    child = server.ask(f"struct.unpack('Q', child{cookie})")[0]
    listener = server.ask(f"struct.unpack('Q', listener{cookie})")[0]
    lport = client.ask("lport")
    close_all(client)
    assert server.ask("child.recv(9) == b''")  # otherwise both may close at a time
    close_all(server)
    watched.until("LISTEN>CLOSE", lport=port, rport=None)
    everywhere = Kernel().enumerator("BPF_FUNC_check_mtu") is not None
    for wanted, cookie, last in (
        ({"rport": port}, own, "FIN_WAIT2>CLOSE"),
        ({"lport": port, "rport": lport}, child, "LAST_ACK>CLOSE"),
        ({"lport": port, "rport": None}, listener, "LISTEN>CLOSE"),
    ):
        seen = [row["cookie"] for row in watched.until(last, **wanted)]
        assert seen[-1] == cookie
        assert set(seen) == {cookie} if everywhere else set(seen) <= {cookie, None}
