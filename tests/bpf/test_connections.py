"""bpf/visit.bpf.h: both ways to visit the entries of the table visit all of them."""

from __future__ import annotations

import socket
from contextlib import nullcontext
from typing import Any

import pytest

from tcpscope.errors import UnsupportedError
from tcpscope.filters import Family, Filter
from tcpscope.kernel.features import Answer, Kernel
from tcpscope.kernel.spec import Program
from tcpscope.lab.hosts import Host, Lab, held
from tcpscope.session import Session
from tests.conftest import until
from tests.puppets import Puppet
from tests.tables import left

pytestmark = pytest.mark.kernel

CONNECTIONS = 20
TFO_WITHOUT_COOKIES = 0x207  # client, server, neither needs a cookie
ESTABLISHED, SYN_RECV = 1, 3


class Only(Kernel):
    """This kernel, which visits the entries of a map only in the way `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way

    def can(self, program: Program) -> Answer:
        if program.hook in ("flush", "live") and not program.name.endswith(self._way):
            return Answer(False, "the other way is tried")
        return super().can(program)


def open_session(way: str, event: str, lab: Lab) -> Session:
    kernel = Only(way)
    try:
        return Session(event, event, Filter(netns=lab.client.inode), kernel=kernel)
    except UnsupportedError as error:
        # On a kernel where everything else can be hooked too, a refusal would be a fault of ours.
        if "flush" not in str(error) or (way == "__element" and kernel.fentry):
            raise
        pytest.skip(f"{error}; {error.hint}")


def rows_of(session: Session) -> list[Any]:
    assert session.layout is not None
    decode = session.layout.decoder().rows
    return [row for batch in session.batches() for row in decode(batch)]


@pytest.mark.parametrize("way", ["__each", "__element"])
def test_those_that_are_open_now(lab: Lab, way: str) -> None:
    puppet = Puppet(lab.client)
    with open_session(way, "life", lab) as session:
        puppet.do(
            "listener = socket.create_server(('127.0.0.1', 0))\n"
            "ends = [(socket.create_connection(listener.getsockname()), listener.accept()[0]) for n in range(count)]",
            count=CONNECTIONS,
        )
        ports = puppet.ask("[client.getsockname()[1] for client, _ in ends]")
        session.loaded.run("live")
        rows = rows_of(session)
        assert sorted(row.lport for row in rows if row.role == "ACTIVE") == sorted(ports)
        assert sorted(row.rport for row in rows if row.role == "PASSIVE") == sorted(ports)
        assert {row.end for row in rows} == {"OPEN"}


@pytest.mark.parametrize("way", ["__each", "__element"])
def test_what_waits_at_the_end(lab: Lab, way: str) -> None:
    """In SYN_SENT an entry waits for its first change, if nothing tells the local port before the run ends."""
    puppet = Puppet(lab.client)
    with open_session(way, "transition", lab) as session, held(lab.server):
        session.loaded.detach("connect__fentry", "connect__kprobe", "connect__retransmit")
        puppet.do(
            "clients = [socket.socket() for n in range(count)]\n"
            "for client in clients: client.setblocking(False); client.connect_ex((address, 7))",
            count=CONNECTIONS,
            address=str(lab.server.ipv4),
        )
        assert not rows_of(session)
        session.end()
        rows = rows_of(session)
        ports = puppet.ask("[client.getsockname()[1] for client in clients]")
        assert sorted(row.lport for row in rows) == sorted(ports)
        assert {f"{row.old_state}>{row.new_state}" for row in rows} == {"CLOSE>SYN_SENT"}


def test_an_attempt_that_found_no_place(lab: Lab) -> None:
    """Its outcome is told by the state alone, and once: what connect() returns is no second attempt."""
    puppet = Puppet(lab.client)
    one = {"connections": 1}
    with Session("attempt", "attempt", Filter(netns=lab.client.inode), entries=one) as session, held(lab.server):
        puppet.do(
            "waiting = socket.socket(); waiting.setblocking(False); waiting.connect_ex((address, 7))\n"
            "for n in range(count): socket.socket().connect_ex(('127.0.0.1', 7))",
            count=CONNECTIONS,
            address=str(lab.server.ipv4),
        )
        assert [(row.outcome, row.errno, row.pid) for row in rows_of(session)] == [
            ("REFUSED", "ECONNREFUSED", None)
        ] * CONNECTIONS
        assert session.counters()["table_full"] == CONNECTIONS


def crowded(host: Host) -> Puppet:
    """A process with connections there, and a function `more` that makes as many more."""
    crowd = Puppet(host, "crowd")
    crowd.do(
        "listener = socket.create_server(('127.0.0.1', 0), backlog=count)\n"
        "address = listener.getsockname()\n"
        "def more(): return [(socket.create_connection(address), listener.accept()[0]) for _ in range(count)]\n"
        "older = more()",
        count=5 * CONNECTIONS,
    )
    return crowd


@pytest.mark.parametrize(("event", "family"), [("transition", None), ("attempt", None), ("life", None), ("life", 6)])
def test_what_the_filter_excludes_takes_no_place(lab: Lab, event: str, family: Family | None) -> None:
    """Sockets of another network namespace, and with -6 those of IPv4: ten times as many as there are places."""
    crowd = crowded(lab.client if family else lab.server)
    wanted, places = Puppet(lab.client, "wanted"), {"connections": CONNECTIONS}
    with Session(event, event, Filter(netns=lab.client.inode, family=family), entries=places) as session:
        crowd.do("younger = more()")
        wanted.do(
            "listener = socket.create_server(('::1', 0), family=socket.AF_INET6)\n"
            "client = socket.create_connection(listener.getsockname()[:2]); child, _ = listener.accept()\n"
            "client.close(); child.recv(1); child.close()"
        )
        crowd.do("older = younger = None")
        until(lambda: all(found.state != "LAST_ACK" for found in lab.client.sockets()), "the end of all connections")
        session.end()
        rows = rows_of(session)
        account = session.account()
    assert {row.family for row in rows} == {6} and len(rows) >= (1 if event == "attempt" else 2)
    assert {row.comm for row in rows} == {"wanted"}
    assert (account.table_full, account.missed) == (0, 0)


def test_round_trips_that_the_filter_excludes_take_no_place(lab: Lab) -> None:
    crowd, wanted = crowded(lab.server), Filter(netns=lab.client.inode)
    places = {"last_seen": CONNECTIONS}
    with Session("rtt", None, wanted, constants={"want_owner": True}, entries=places) as session:
        crowd.do("younger = more()\nfor client, child in older: client.send(b'x'); child.recv(1); child.send(b'x')")
        Puppet(lab.client).do(
            "listener = socket.create_server(('127.0.0.1', 0))\n"
            "client = socket.create_connection(listener.getsockname())"
        )
        session.end()
        account = session.account()
    assert account.seen >= 1
    assert (account.table_full, account.lost) == (0, 0)


@pytest.mark.parametrize("early", [False, True])
def test_what_has_been_accepted_needs_no_place(lab: Lab, early: bool) -> None:
    """With TCP Fast Open a child is accepted before its handshake has ended; then it gives up its place at that end."""
    for host in lab.hosts:
        host.sysctl("tcp_fastopen", TFO_WITHOUT_COOKIES)
    client, server = Puppet(lab.client), Puppet(lab.server)
    state = "child.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]"
    with Session("accepted", "accepted", Filter(netns=lab.server.inode)) as session:
        server.do(
            "listener = socket.create_server((address, 7))\n"
            "listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)",
            address=lab.server.ipv4,
        )
        with held(lab.server) if early else nullcontext():
            client.do(
                "made = socket.socket(); made.setblocking(False)\n"
                "try: made.sendto(b'early', flags, (address, 7))\n"
                "except BlockingIOError: pass",
                address=lab.server.ipv4,
                flags=socket.MSG_FASTOPEN,
            )
            server.do("child, _ = listener.accept()")
            assert not early or server.ask(state) == SYN_RECV
        until(lambda: server.ask(state) == ESTABLISHED, "the end of the handshake")
        assert [row.rport for row in rows_of(session)] == [client.ask("made.getsockname()[1]")]
        assert left(session, lab.server) == 1  # the listener
