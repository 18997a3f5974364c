"""`tracer` against the calls really made: each end of a connection begins once, and ends once."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

PORTS = range(9000, 10000)
ports = itertools.count(PORTS.start)
Rows = list[dict[str, Any]]


class Pair(NamedTuple):
    """`child` in the server and `connection` in the client, by the listener's port."""

    port: int
    cport: int


class Site(NamedTuple):
    lab: Lab
    server: Puppet
    client: Puppet
    older: Pair
    tool: RunningTool

    def opened(self, family: int = socket.AF_INET, *, accept: bool = True) -> Pair:
        return open_pair(self.lab, self.server, self.client, family, accept=accept)

    def rows(self, pair: Pair, closed: int) -> Rows:
        """The rows of a connection when it has been seen to end so many times."""

        def found() -> Rows:
            ends = {pair.port, pair.cport}
            return [row for row in self.tool.rows if {row["lport"], row["rport"]} == ends]

        self.tool.wait_for(lambda _: [row["step"] for row in found()].count("CLOSE") >= closed)
        return found()

    def steps(self, rows: Rows) -> dict[str, list[str]]:
        """What happened in each host, in the order of the rows."""
        return {host.role: [row["step"] for row in rows if row["netns"] == host.inode] for host in self.lab.hosts}


def open_pair(lab: Lab, server: Puppet, client: Puppet, family: int, *, accept: bool = True) -> Pair:
    names = {"port": next(ports), "address": lab.server.address(family), "family": family}
    server.do("listener = socket.socket(family); listener.bind((address, port)); listener.listen()", **names)
    client.do("connection = socket.socket(family); connection.connect((address, port))", **names)
    if accept:
        server.do("child, _ = listener.accept()")
    return Pair(names["port"], client.ask("connection.getsockname()[1]"))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab, ExitStack() as stack:
        server, client = Puppet(lab.server, "server"), Puppet(lab.client, "client")
        older = open_pair(lab, server, client, socket.AF_INET)
        server.do("older = child"), client.do("older = connection")
        tool = stack.enter_context(RunningTool("tracer", "--port", f"{PORTS.start}-{PORTS.stop - 1}"))
        yield Site(lab, server, client, older, tool)
        done = tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["4", "6"])
@pytest.mark.parametrize("first", ["client", "server"])
def test_both_ends(site: Site, family: int, first: str) -> None:
    pair = site.opened(family)
    closing = [(site.client, "connection"), (site.server, "child")]
    for puppet, name in closing if first == "client" else reversed(closing):
        puppet.do(f"{name}.close()")
    rows = site.rows(pair, 2)
    assert site.steps(rows) == {"client": ["CONNECT", "CLOSE"], "server": ["ACCEPT", "CLOSE"]}
    assert [row["step"] for row in rows] == ["CONNECT", "ACCEPT", "CLOSE", "CLOSE"]
    # The ends may close on two processors at a time, and the row of the later one be first.
    assert rows[0]["time"] <= rows[1]["time"] <= min(row["time"] for row in rows[2:])
    for row in rows:
        host, puppet, lport, rport = (
            (site.lab.client, site.client, pair.cport, pair.port)
            if row["netns"] == site.lab.client.inode
            else (site.lab.server, site.server, pair.port, pair.cport)
        )
        assert (row["lport"], row["rport"]) == (lport, rport)
        assert (row["laddr"], row["raddr"]) == (host.address(family), host.peer.address(family))
        assert row["family"] == (4 if family == socket.AF_INET else 6)
        assert (row["pid"], row["comm"], row["uid"]) == (puppet.pid, puppet.comm, 0)
    cookies = {(row["netns"], row["cookie"]) for row in rows if row["cookie"] is not None}
    assert len(cookies) in (0, 2)  # each end has one of its own, where the kernel gives them


def test_older_than_the_tool(site: Site) -> None:
    for puppet in (site.client, site.server):
        puppet.do("older.close()")
    rows = site.rows(site.older, 2)
    assert site.steps(rows) == {"client": ["CLOSE"], "server": ["CLOSE"]}
    assert {(row["netns"], row["pid"], row["comm"]) for row in rows} == {
        (site.lab.client.inode, site.client.pid, "client"),
        (site.lab.server.inode, site.server.pid, "server"),
    }


def test_a_reset_is_an_end(site: Site) -> None:
    pair = site.opened()
    site.client.do("connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
                   "connection.close()")  # fmt: skip
    rows = site.rows(pair, 2)
    assert site.steps(rows) == {"client": ["CONNECT", "CLOSE"], "server": ["ACCEPT", "CLOSE"]}
    site.server.do("child.close()")


def test_never_accepted(site: Site) -> None:
    """It ends, as it began, in the listener's name."""
    pair = site.opened(accept=False)
    child = (pair.port, pair.cport, "ESTABLISHED")
    until(lambda: any((s.lport, s.rport, s.state) == child for s in site.lab.server.sockets()), "the child")
    site.server.do("listener.close()")
    rows = site.rows(pair, 2)
    assert site.steps(rows) == {"client": ["CONNECT", "CLOSE"], "server": ["CLOSE"]}
    assert {row["pid"] for row in rows if row["netns"] == site.lab.server.inode} == {site.server.pid}
    site.client.do("connection.close()")


def test_what_never_was_a_connection(site: Site) -> None:
    """Refused, or given up: no row. A listener has none either."""
    refused, silent = next(ports), next(ports)
    site.lab.server.blackhole("198.51.100.0/24")
    assert site.client.ask("socket.socket().connect_ex((address, port))",
                           address=site.lab.server.ipv4, port=refused) != 0  # fmt: skip
    site.client.do(
        "waiting = socket.socket(); waiting.setblocking(False); waiting.connect_ex((address, port)); waiting.close()",
        address="198.51.100.7", port=silent,
    )  # fmt: skip
    listening = next(ports)
    site.server.do("socket.create_server((address, port)).close()", address=site.lab.server.ipv4, port=listening)
    pair = site.opened()  # its rows come after those that there must not be
    site.client.do("connection.close()"), site.server.do("child.close()")
    site.rows(pair, 2)
    unwanted = {refused, silent, listening}
    assert [row for row in site.tool.rows if {row["lport"], row["rport"]} & unwanted] == []


def test_again_with_the_same_socket(site: Site) -> None:
    """A socket that was disconnected may connect again, and begins anew."""
    first = site.opened()
    site.server.do("other = socket.create_server((address, port))", address=site.lab.server.ipv4, port=next(ports))
    site.client.do("import ctypes; assert ctypes.CDLL(None).connect(connection.fileno(), bytes(16), 16) == 0\n"
                   "connection.connect(tuple(target))", target=site.server.ask("other.getsockname()"))  # fmt: skip
    site.server.do("second, _ = other.accept()")
    port, cport = site.server.ask("(second.getsockname()[1], second.getpeername()[1])")
    site.client.do("connection.close()")
    site.server.do("second.close(); child.close()")
    for pair in (first, Pair(port, cport)):
        assert site.steps(site.rows(pair, 2)) == {"client": ["CONNECT", "CLOSE"], "server": ["ACCEPT", "CLOSE"]}
