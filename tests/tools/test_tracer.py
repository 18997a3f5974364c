"""`tracer` against the calls really made: each end of a connection begins once, and ends once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.record import PORTS, Host, Script, Seen, Socket, Test, Watch, recorded

TRACER = Watch("tracer", "--port", PORTS)
PORT = 9000

Rows = list[dict[str, Any]]


class Pair:
    """A connection from host to host: `child` in the server and `connection` in the client."""

    def __init__(self, script: Script, family: str = "4", *, port: int = PORT, accept: bool = True) -> None:
        self.hosts, self.port = script.hosts, port
        self.server, self.client = script.server.process("server"), script.client.process("client")
        self.listener = self.server.listener(port, script.server.address(family))
        self.connection = self.client.socket(family)
        self.connection.connect(script.server.address(family), port)
        self.local = self.connection.name()
        if accept:
            self.child = self.listener.accept()

    def close(self, first: str = "client") -> None:
        """Both ends, one after the other, until the kernel has done with them."""
        one, other = (self.connection, self.child)[:: 1 if first == "client" else -1]
        close(one, other)

    def rows(self, seen: Seen) -> Rows:
        """Those of both ends."""
        ends = {self.port, self.local.ret}
        return [row for row in seen.rows(TRACER) if {row["lport"], row["rport"]} == ends]


def close(one: Socket, other: Socket) -> None:
    one.close()
    other.until_end()
    other.close()
    other.process.host.until_sockets(0, "==", state="LAST_ACK")
    one.process.host.until_sockets(state="TIME_WAIT")


def steps(rows: Rows, *hosts: Host) -> dict[str, list[str]]:
    """What happened in each host, in the order of the rows."""
    return {host.role: [row["action"] for row in rows if row["netns"] == host.inode] for host in hosts}


@pytest.mark.parametrize("family", ["4", "6"])
@pytest.mark.parametrize("first", ["client", "server"])
@recorded(TRACER)
def test_both_ends(script: Script, family: str, first: str) -> Test:
    pair = Pair(script, family)
    cookies = {script.client: pair.connection.cookie(), script.server: pair.child.cookie()}
    pair.close(first)
    seen = yield
    rows = seen.rows(TRACER)
    assert steps(rows, *script.hosts) == {"client": ["CONNECT", "CLOSE"], "server": ["ACCEPT", "CLOSE"]}
    assert [row["action"] for row in rows] == ["CONNECT", "ACCEPT", "CLOSE", "CLOSE"]
    # The ends may close on two processors at a time, and the row of the later one be first.
    assert rows[0]["time"] <= rows[1]["time"] <= min(row["time"] for row in rows[2:])
    for host, process, lport, rport in (
        (script.client, pair.client, pair.local.ret, PORT),
        (script.server, pair.server, PORT, pair.local.ret),
    ):
        own = seen.rows(TRACER, host)
        for row in own:
            assert (row["lport"], row["rport"], row["family"]) == (lport, rport, int(family))
            assert (row["laddr"], row["raddr"]) == (host.address(family), host.peer.address(family))
            assert (row["pid"], row["comm"], row["uid"]) == (process.pid, process.comm, 0)
        # Somebody has asked for it before the end, and nobody before that.
        cookie = cookies[host].ret
        given = {row["cookie"] for row in own}
        assert own[-1]["cookie"] == cookie
        assert given == {cookie} if seen.machine.gives_cookies else given <= {cookie, None}


@recorded(TRACER)
def test_older_than_the_tool(script: Script) -> Test:
    with script.older():
        pair = Pair(script)
    pair.close()
    seen = yield
    rows = seen.rows(TRACER)
    assert steps(rows, *script.hosts) == {"client": ["CLOSE"], "server": ["CLOSE"]}
    assert {(row["netns"], row["pid"], row["comm"]) for row in rows} == {
        (script.client.inode, pair.client.pid, "client"),
        (script.server.inode, pair.server.pid, "server"),
    }


@recorded(TRACER)
def test_a_reset_is_an_end(script: Script) -> Test:
    pair = Pair(script)
    pair.connection.linger()
    pair.connection.close()
    pair.child.until_state("CLOSE")
    pair.child.close()
    seen = yield
    rows = seen.rows(TRACER)
    assert steps(rows, *script.hosts) == {"client": ["CONNECT", "CLOSE"], "server": ["ACCEPT", "CLOSE"]}


@recorded(TRACER)
def test_never_accepted(script: Script) -> Test:
    """It ends, as it began, in the listener's name."""
    pair = Pair(script, accept=False)
    script.server.until_sockets(1, "==", "recv_q", state="LISTEN", lport=PORT)
    pair.listener.close()
    pair.connection.until_state("CLOSE")
    pair.connection.close()
    seen = yield
    rows = seen.rows(TRACER)
    assert steps(rows, *script.hosts) == {"client": ["CONNECT", "CLOSE"], "server": ["CLOSE"]}
    assert [row["pid"] for row in seen.rows(TRACER, script.server)] == [pair.server.pid]


@recorded(TRACER)
def test_what_never_was_a_connection(script: Script) -> Test:
    """Refused, or given up: no row. A listener has none either."""
    script.server.blackhole("198.51.100.0/24")
    client, server = script.client.process("client"), script.server.process("server")
    refused, silent = client.socket(), client.socket()
    call = refused.connect(script.server.ipv4, PORT + 1, may_fail=True)
    waiting = silent.start("198.51.100.7", PORT + 2)
    script.client.until_sockets(1, "==", state="SYN_SENT")
    silent.close()
    server.listener(PORT + 3).close()
    pair = Pair(script)  # its rows come after those that there must not be
    pair.close()
    seen = yield
    assert (call.errno, waiting.errno) == ("ECONNREFUSED", "EINPROGRESS")
    rows = pair.rows(seen)
    assert steps(rows, *script.hosts) == {"client": ["CONNECT", "CLOSE"], "server": ["ACCEPT", "CLOSE"]}
    assert seen.rows(TRACER) == rows


@recorded(TRACER)
def test_again_with_the_same_socket(script: Script) -> Test:
    """A socket that was disconnected may connect again, and begins anew."""
    pair = Pair(script)
    other = pair.server.listener(PORT + 1)
    pair.connection.disconnect()
    pair.connection.connect(script.server.ipv4, PORT + 1)
    second = other.accept()
    close(pair.connection, second)
    pair.child.until_state("CLOSE")
    pair.child.close()
    seen = yield
    rows = seen.rows(TRACER)
    assert {row["rport"] for row in rows if row["netns"] == script.client.inode} == {PORT, PORT + 1}
    for port, cport in ((PORT, pair.local.ret), (PORT + 1, second.accepted.ret)):
        own = [row for row in rows if {row["lport"], row["rport"]} == {port, cport}]
        assert steps(own, *script.hosts) == {"client": ["CONNECT", "CLOSE"], "server": ["ACCEPT", "CLOSE"]}
    assert len(rows) == 8
