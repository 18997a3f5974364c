"""`states` against the calls really made.

Both ends of most connections are in the same host, so that every packet is handled in the context of whoever sent it:
the process on the CPU is the wrong owner then.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.record import PORTS, Call, Process, Script, Seen, Socket, Test, Watch, recorded

STATES = Watch("states", "--port", PORTS)
PORT = 8000
ACTIVE_OPEN = ["CLOSE>SYN_SENT", "SYN_SENT>ESTABLISHED"]
PASSIVE_OPEN = ["LISTEN>SYN_RECV", "SYN_RECV>ESTABLISHED"]
CLOSES_FIRST = ["ESTABLISHED>FIN_WAIT1", "FIN_WAIT1>FIN_WAIT2", "FIN_WAIT2>CLOSE"]
CLOSES_SECOND = ["ESTABLISHED>CLOSE_WAIT", "CLOSE_WAIT>LAST_ACK", "LAST_ACK>CLOSE"]
BLACKHOLE = "198.51.100.0/24"

Rows = list[dict[str, Any]]


class Pair:
    """A connection within one host: `child` in the server, `connection` in the client, both processes."""

    def __init__(self, script: Script, family: str = "4", names: tuple[str, str] = ("server", "client")) -> None:
        self.host = script.client
        self.server, self.client = map(self.host.process, names)
        self.address = self.host.address(family)
        self.listener = self.server.listener(PORT, self.address)
        self.connection = self.client.socket(family)
        self.connected = self.connection.connect(self.address, PORT)
        self.local = self.connection.name()
        self.child = self.listener.accept()

    def at_server(self, seen: Seen) -> Rows:
        return seen.rows(STATES, self.host, lport=PORT, rport=self.local.ret)

    def at_client(self, seen: Seen) -> Rows:
        return seen.rows(STATES, self.host, rport=PORT)


def steps(rows: Rows) -> list[str]:
    return [f"{row['old_state']}>{row['new_state']}" for row in rows]


def follows(seen: Seen, what: str) -> str | None:
    """What `followed_by` must say: nothing at all where the kernel has no hook for it."""
    return what if seen.machine.hook("transition", "timewait") else None


def check_ends(
    rows: Rows, *, laddr: str, raddr: str | None, family: int, owner: Process | None, comm: str | None = None
) -> None:
    pid, comm = (owner.pid, comm or owner.comm) if owner else (None, None)
    for row in rows:
        assert (row["laddr"], row["raddr"], row["family"]) == (laddr, raddr, family), row
        assert (row["pid"], row["comm"]) == (pid, comm), row


def closed(*sockets: Socket) -> None:
    for made in sockets:
        made.close()


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(STATES)
def test_server_closes_first_then_time_wait(script: Script, family: str) -> Test:
    pair = Pair(script, family)
    pair.child.shutdown()
    pair.child.until_state("FIN_WAIT2")
    end = pair.connection.until_end()
    closed(pair.connection)
    pair.host.until_sockets(state="TIME_WAIT")
    closed(pair.child, pair.listener)
    seen = yield

    assert end.ret == 0
    rows = pair.at_server(seen)
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_FIRST]
    assert [row["followed_by"] for row in rows] == [None] * 4 + [follows(seen, "TIME_WAIT")]
    address, version = pair.address, int(family)
    check_ends(rows, laddr=address, raddr=address, family=version, owner=pair.server)
    assert {row["role"] for row in rows} == {"PASSIVE"}

    rows = pair.at_client(seen)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_SECOND]
    assert [row["followed_by"] for row in rows] == [None] * 4 + [follows(seen, "NOTHING")]
    check_ends(rows, laddr=address, raddr=address, family=version, owner=pair.client)
    assert {row["role"] for row in rows} == {"ACTIVE"}
    # The port is known on the first transition too, though it was chosen after it.
    assert {row["lport"] for row in rows} == {pair.local.ret}
    assert {row["uid"] for row in rows} == {0}
    assert {row["netns"] for row in rows} == {pair.host.inode}
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


@recorded(STATES)
def test_server_closes_first_then_timed_fin_wait2(script: Script) -> Test:
    """A socket that nobody holds waits for the other end's FIN as a timewait socket in FIN_WAIT2."""
    pair = Pair(script)
    closed(pair.child)
    pair.host.until_sockets(0, "==", state="FIN_WAIT1")
    closed(pair.connection, pair.listener)
    seen = yield
    rows = pair.at_server(seen)
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_FIRST]
    assert rows[-1]["followed_by"] == follows(seen, "FIN_WAIT2")


@recorded(STATES)
def test_server_closes_second(script: Script) -> Test:
    pair = Pair(script)
    pair.connection.shutdown()
    end = pair.child.until_end()
    closed(pair.child, pair.listener)
    pair.host.until_sockets(0, "==", state="LAST_ACK")
    closed(pair.connection)
    seen = yield
    assert end.ret == 0
    rows = pair.at_server(seen)
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_SECOND]
    assert rows[-1]["followed_by"] == follows(seen, "NOTHING")
    rows = pair.at_client(seen)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_FIRST]
    assert rows[-1]["followed_by"] == follows(seen, "TIME_WAIT")
    check_ends(rows, laddr=pair.address, raddr=pair.address, family=4, owner=pair.client)


@recorded(STATES)
def test_a_reset_connection_goes_at_once(script: Script) -> Test:
    """Unread data turns close() into a reset."""
    pair = Pair(script)
    pair.connection.send("never read")
    pair.child.until_ready()
    closed(pair.child, pair.listener)
    pair.connection.until_state("CLOSE")
    closed(pair.connection)
    seen = yield
    rows = pair.at_server(seen)
    assert steps(rows) == [*PASSIVE_OPEN, "ESTABLISHED>CLOSE"]
    assert rows[-1]["followed_by"] == follows(seen, "NOTHING")
    rows = pair.at_client(seen)
    assert steps(rows) == [*ACTIVE_OPEN, "ESTABLISHED>CLOSE"]
    assert rows[-1]["pid"] == pair.client.pid


@recorded(STATES)
def test_v4_mapped_is_ipv4(script: Script) -> Test:
    """Sockets of AF_INET6 at both ends that talk IPv4."""
    host = script.client
    server, client = host.process("server"), host.process("client")
    listener = server.listener(PORT, "::", dual=True)
    connection = client.socket("mapped")
    connection.connect(host.address("mapped"), PORT)
    local = connection.name()
    child = listener.accept()
    own = child.name()
    closed(connection)
    end = child.until_end()  # otherwise both may close at a time
    closed(child, listener)
    host.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    assert own.data == host.address("mapped")  # AF_INET6
    assert end.ret == 0
    rows = seen.rows(STATES, host, lport=PORT, rport=local.ret)
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_SECOND]
    check_ends(rows, laddr=host.ipv4, raddr=host.ipv4, family=4, owner=server)
    rows = seen.rows(STATES, host, rport=PORT)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_FIRST]
    check_ends(rows, laddr=host.ipv4, raddr=host.ipv4, family=4, owner=client)
    rows = seen.rows(STATES, host, lport=PORT, rport=None)
    assert steps(rows) == ["CLOSE>LISTEN", "LISTEN>CLOSE"]
    assert {(row["family"], row["laddr"], row["raddr"]) for row in rows} == {(6, "::", None)}


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(STATES)
def test_refused(script: Script, family: str) -> Test:
    host = script.client
    client, address = host.process("client"), host.address(family)
    connection = client.socket(family)
    call = connection.connect(address, PORT, may_fail=True)
    closed(connection)
    seen = yield
    assert call.errno == "ECONNREFUSED"
    rows = seen.rows(STATES, host, rport=PORT)
    assert steps(rows) == ["CLOSE>SYN_SENT", "SYN_SENT>CLOSE"]
    check_ends(rows, laddr=address, raddr=address, family=int(family), owner=client)
    assert rows[0]["lport"] is not None
    assert rows[0]["lport"] == rows[1]["lport"]
    assert rows[0]["in_state_us"] is None
    assert rows[1]["in_state_us"] is not None
    assert rows[1]["followed_by"] == follows(seen, "NOTHING")


@recorded(STATES)
def test_no_answer(script: Script) -> Test:
    """Nobody answers until the client gives up."""
    host, address = script.client, "198.51.100.7"
    script.server.blackhole(BLACKHOLE)
    client = host.process("client")
    connection = client.socket()
    connection.option(6, 7, 1)  # TCP_SYNCNT
    call = connection.connect(address, PORT, may_fail=True)
    closed(connection)
    seen = yield
    assert call.errno == "ETIMEDOUT"
    rows = seen.rows(STATES, host, rport=PORT)
    assert steps(rows) == ["CLOSE>SYN_SENT", "SYN_SENT>CLOSE"]
    check_ends(rows, laddr=host.ipv4, raddr=address, family=4, owner=client)
    assert rows[0]["lport"] == rows[1]["lport"]
    assert rows[0]["lport"] is not None
    assert 1_000_000 <= rows[1]["in_state_us"] <= call.took_us


@recorded(STATES)
def test_times_in_states(script: Script) -> Test:
    """Each time in a state lies between the times that the programs' own clocks allow."""
    pair = Pair(script)
    pair.client.pause(50_000)
    first = pair.connection.shutdown()
    arrived = pair.child.until_end()
    pair.connection.until_state("FIN_WAIT2")
    pair.client.pause(50_000)
    second = pair.child.close()
    ended = pair.connection.until_end()
    closed(pair.connection, pair.listener)
    seen = yield
    rows = {row["old_state"]: row for row in pair.at_client(seen)}
    children = {row["old_state"]: row for row in pair.at_server(seen)}
    connected, accepted = pair.connected, pair.child.accepted

    def between(row: dict[str, Any], shortest_us: float, longest_us: float) -> None:
        assert shortest_us - 1 <= row["in_state_us"] <= longest_us + 1, row

    # What is sent within a call of one end may reach the other after it: there, what has been received counts.
    between(rows["SYN_SENT"], 0, connected.took_us)
    between(rows["ESTABLISHED"], first.begin_us - connected.end_us, first.end_us - connected.begin_us)
    between(children["ESTABLISHED"], first.begin_us - accepted.end_us, arrived.end_us - connected.begin_us)
    between(children["CLOSE_WAIT"], second.begin_us - arrived.end_us, second.end_us - first.begin_us)
    # The FIN may be acknowledged within shutdown(), or by the timer of the delayed acknowledgement.
    waited = rows["FIN_WAIT1"]["in_state_us"] + rows["FIN_WAIT2"]["in_state_us"]
    assert second.begin_us - first.end_us - 2 <= waited <= ended.end_us - first.begin_us + 2
    assert rows["FIN_WAIT2"]["in_state_us"] >= 50_000
    assert children["LISTEN"]["in_state_us"] is None
    # The time stamps themselves: from connect() to shutdown(), and against the wall clock, which may be adjusted.
    stamps = {state: datetime.fromisoformat(row["time"]).timestamp() * 1e6 for state, row in rows.items()}
    assert first.begin_us - connected.end_us <= stamps["ESTABLISHED"] - stamps["CLOSE"] + 10
    assert stamps["ESTABLISHED"] - stamps["CLOSE"] - 10 <= first.end_us - connected.begin_us
    began, over = seen.machine.wall_clock_us
    assert began - 1e6 < stamps["CLOSE"] < stamps["FIN_WAIT2"] < over + 1e6


@recorded(STATES)
def test_older_than_the_tool(script: Script) -> Test:
    """The owner comes from the seed; how long the first state lasted is not known."""
    with script.older():
        pair = Pair(script, names=("older-server", "older-client"))
    host, address = pair.host, pair.address
    pair.connection.shutdown()
    end = pair.child.until_end()
    closed(pair.child)
    host.until_sockets(state="TIME_WAIT")
    # The listener is older too; its new child is its own.
    client = host.process("client")
    connection = client.socket()
    connection.connect(address, PORT)
    new = connection.name()
    host.until_sockets(state="ESTABLISHED", lport=PORT)
    closed(pair.listener)
    seen = yield
    assert end.ret == 0
    rows = pair.at_server(seen)
    assert steps(rows) == CLOSES_SECOND
    assert [row["in_state_us"] is None for row in rows] == [True, False, False]
    check_ends(rows, laddr=address, raddr=address, family=4, owner=pair.server)
    rows = seen.rows(STATES, host, rport=PORT, lport=pair.local.ret)
    assert steps(rows) == CLOSES_FIRST
    assert [row["in_state_us"] is None for row in rows] == [True, False, False]
    check_ends(rows, laddr=address, raddr=address, family=4, owner=pair.client)
    rows = seen.rows(STATES, host, lport=PORT, rport=new.ret)
    assert steps(rows)[:2] == PASSIVE_OPEN
    assert {row["pid"] for row in rows} == {pair.server.pid}
    rows = seen.rows(STATES, host, lport=PORT, rport=None)
    assert [(row["pid"], row["in_state_us"], row["role"]) for row in rows] == [(pair.server.pid, None, "LISTENER")]
    assert steps(rows) == ["LISTEN>CLOSE"]


@recorded(STATES)
def test_listener(script: Script) -> Test:
    host = script.client
    server = host.process("server")
    listener = server.socket()
    listener.bind(host.ipv4, PORT)
    first = listener.listen()
    second = listener.close()
    seen = yield
    rows = seen.rows(STATES, host, lport=PORT)
    assert steps(rows) == ["CLOSE>LISTEN", "LISTEN>CLOSE"]
    check_ends(rows, laddr=host.ipv4, raddr=None, family=4, owner=server)
    assert {(row["role"], row["rport"]) for row in rows} == {("LISTENER", None)}
    assert rows[0]["in_state_us"] is None
    assert second.begin_us - first.end_us - 1 <= rows[1]["in_state_us"] <= second.end_us - first.begin_us + 1
    assert rows[1]["followed_by"] == follows(seen, "NOTHING")


@recorded(STATES)
def test_accepted_by_another_process(script: Script) -> Test:
    """Until accept() a child is the listener's; then it is of the process that called accept()."""
    host = script.client
    lister, client = host.process("lister"), host.process("client")
    listener = lister.listener(PORT)
    worker = host.process("worker")
    same = worker.take(listener)
    connection = client.socket()
    connection.connect(host.ipv4, PORT)
    local = connection.name()
    host.until_sockets(state="ESTABLISHED", lport=PORT)
    child = same.accept()
    closed(connection)
    end = child.until_end()
    closed(child, listener, same)
    host.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    assert end.ret == 0
    rows = seen.rows(STATES, host, lport=PORT, rport=local.ret)
    owners = [(row["pid"], row["comm"]) for row in rows]
    assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_SECOND]
    assert owners == [(lister.pid, "lister")] * 2 + [(worker.pid, "worker")] * 3
    rows = seen.rows(STATES, host, lport=PORT, rport=None)
    assert [(row["pid"], row["new_state"]) for row in rows] == [(lister.pid, "LISTEN"), (lister.pid, "CLOSE")]


def outlived(script: Script) -> tuple[Pair, Call]:
    """The kernel keeps its client a full socket in FIN_WAIT2, also after the client's process has ended."""
    pair = Pair(script, names=("server", "mortal"))
    pair.connection.option(6, 8, 120)  # TCP_LINGER2
    return pair, pair.client.now()


@recorded(STATES)
def test_owner_is_kept_after_its_end(script: Script) -> Test:
    pair, _ = outlived(script)
    pair.connection.shutdown()
    pair.connection.until_state("FIN_WAIT2")
    pair.child.send("this keeps the socket alive" * 10)
    pair.connection.until_received(270)
    # What was not read makes the end of the process a reset: the other end is told then, with its own owner.
    pair.client.kill()
    pair.child.until_state("CLOSE")
    closed(pair.child, pair.listener)
    seen = yield
    rows = pair.at_client(seen)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_FIRST]
    assert {(row["pid"], row["comm"]) for row in rows} == {(pair.client.pid, "mortal")}
    rows = pair.at_server(seen)
    assert steps(rows) == [*PASSIVE_OPEN, "ESTABLISHED>CLOSE_WAIT", "CLOSE_WAIT>CLOSE"]
    assert {(row["pid"], row["comm"]) for row in rows} == {(pair.server.pid, "server")}


@recorded(STATES)
def test_owner_is_kept_while_the_socket_outlives_it(script: Script) -> Test:
    """The process is gone, the kernel still closes its connection: the rest happens in nobody's context."""
    pair, _ = outlived(script)
    pair.client.kill()
    pair.host.until_sockets(state="FIN_WAIT2", rport=PORT)
    closed(pair.child)
    pair.host.until_sockets(0, "==", state="FIN_WAIT2", rport=PORT)
    closed(pair.listener)
    seen = yield
    rows = pair.at_client(seen)
    assert steps(rows) == [*ACTIVE_OPEN, *CLOSES_FIRST]
    assert {(row["pid"], row["comm"], row["lport"]) for row in rows} == {(pair.client.pid, "mortal", pair.local.ret)}


@recorded(STATES)
def test_reuseport(script: Script) -> Test:
    """Two processes listen on one address. A child belongs, from its birth, to the one that the kernel chose."""
    host = script.client
    owners = [host.process("first"), host.process("second")]
    listeners = [owner.listener(PORT, reuse_port=True) for owner in owners]
    for listener in listeners:
        listener.blocking(False)
    client = host.process("client")
    tried = []
    for _ in range(4):
        connection = client.socket()
        connection.connect(host.ipv4, PORT)
        local = connection.name()
        host.until_sockets(1, "==", state="ESTABLISHED", lport=PORT)  # it waits in one of the two queues
        children = [listener.accept(may_fail=True) for listener in listeners]
        closed(connection)
        host.until_sockets(1, "==", state="CLOSE_WAIT", lport=PORT)
        for child in children:
            child("close", may_fail=True)
        host.until_sockets(0, "==", state="LAST_ACK")
        tried.append((local, children))
    closed(listeners[0])
    connection = client.socket()
    connection.connect(host.ipv4, PORT)
    last = connection.name()
    host.until_sockets(1, "==", state="ESTABLISHED", lport=PORT)
    closed(connection, listeners[1])
    seen = yield
    rows = seen.rows(STATES, host, lport=PORT, rport=None, new_state="LISTEN")
    assert [row["comm"] for row in rows] == ["first", "second"]
    for local, children in tried:
        (accepter,) = (owner for owner, child in zip(owners, children, strict=True) if child.accepted.errno == "none")
        rows = seen.rows(STATES, host, lport=PORT, rport=local.ret)
        assert steps(rows) == [*PASSIVE_OPEN, *CLOSES_SECOND]
        assert {(row["pid"], row["comm"]) for row in rows} == {(accepter.pid, accepter.comm)}
    rows = seen.rows(STATES, host, lport=PORT, rport=last.ret)
    assert steps(rows)[:2] == PASSIVE_OPEN
    assert {row["pid"] for row in rows} == {owners[1].pid}


@recorded(STATES)
def test_cookie(script: Script) -> Test:
    """What SO_COOKIE says, on every row where the kernel gives cookies to tracing programs (5.12)."""
    pair = Pair(script)
    own, child, listener = (made.cookie() for made in (pair.connection, pair.child, pair.listener))
    closed(pair.connection)
    end = pair.child.until_end()  # otherwise both may close at a time
    closed(pair.child)
    pair.host.until_sockets(0, "==", state="LAST_ACK")
    closed(pair.listener)
    seen = yield
    assert end.ret == 0
    for rows, cookie, last in (
        (pair.at_client(seen), own, "FIN_WAIT2>CLOSE"),
        (pair.at_server(seen), child, "LAST_ACK>CLOSE"),
        (seen.rows(STATES, pair.host, lport=PORT, rport=None), listener, "LISTEN>CLOSE"),
    ):
        assert steps(rows)[-1] == last
        cookies = [row["cookie"] for row in rows]
        assert cookies[-1] == cookie.ret
        assert set(cookies) == {cookie.ret} if seen.machine.gives_cookies else set(cookies) <= {cookie.ret, None}
