"""bpf/missed.bpf.h: a transition that no program saw is noticed at the next one, and counted once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tcpscope import ports
from tcpscope.filters import Filter
from tcpscope.lab.hosts import Lab, held
from tcpscope.session import Session
from tests.conftest import until
from tests.puppets import Puppet
from tests.tables import left

pytestmark = pytest.mark.kernel

CONNECTIONS = 5

CONNECT = """
listener = socket.create_server(('127.0.0.1', 0))
clients = [socket.create_connection(listener.getsockname()) for n in range(count)]
children = [listener.accept()[0] for n in range(count)]
"""
SHUT_DOWN = "for each in clients: each.shutdown(socket.SHUT_WR)"
STATES = "{each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] for each in clients + children}"
ARE_SHUT_DOWN = "sorted(" + STATES + ") == [5, 8]"  # FIN_WAIT2, CLOSE_WAIT
DISCONNECT = """
import ctypes
for each in waiting:
    assert ctypes.CDLL(None).connect(each.fileno(), bytes(16), 16) == 0  # to AF_UNSPEC, which Python does not know
"""
CLOSE = "for n in range(count): children[n].close(); clients[n].close()"


@contextmanager
def unseen(session: Session) -> Iterator[None]:
    """Inside of the block no program is run when the state changes."""
    session.loaded.detach("state", "state_again")
    yield
    session.loaded.attach("state")
    session.loaded.attach("state_again")


def rows_of(session: Session) -> list[Any]:
    assert session.layout is not None
    decode = session.layout.decoder().rows
    return [row for batch in session.batches() for row in decode(batch)]


def missed(session: Session) -> int:
    return session.counters()["missed"]


def shut_down_unseen(session: Session, puppet: Puppet) -> None:
    """Connections in FIN_WAIT2 and CLOSE_WAIT that were last seen to be ESTABLISHED."""
    puppet.do(CONNECT, count=CONNECTIONS)
    with unseen(session):
        puppet.do(SHUT_DOWN)
        until(lambda: puppet.ask(ARE_SHUT_DOWN), "the FINs and their acknowledgements")


@pytest.mark.parametrize("event", ["transition", "life", "action"])
def test_the_end_was_not_seen(lab: Lab, event: str) -> None:
    puppet = Puppet(lab.client)
    with Session(event, event, Filter(netns=lab.client.inode)) as session:
        puppet.do(CONNECT, count=CONNECTIONS)
        with unseen(session):
            puppet.do(CLOSE, count=CONNECTIONS)
            until(lambda: missed(session) == 2 * CONNECTIONS, "the end of both ends of each connection")
        session.end()
        assert session.account().missed == 2 * CONNECTIONS


@pytest.mark.parametrize(("first", "state"), [("clients", 4), ("children", 8)], ids=["FIN_WAIT1", "CLOSE_WAIT"])
def test_the_end_of_a_local_port_was_not_seen(lab: Lab, first: str, state: int) -> None:
    """From FIN_WAIT1 and CLOSE_WAIT on `ports` handles the end alone."""
    puppet = Puppet(lab.client)
    with ports.attach(Filter(netns=lab.client.inode)) as session:
        puppet.do(CONNECT, count=CONNECTIONS)
        puppet.do(f"for each in {first}: each.shutdown(socket.SHUT_WR)")
        until(lambda: puppet.ask(ARE_SHUT_DOWN), "the FINs and their acknowledgements")
        entry = session.spec.layout("connection", internal=True).select(["state"])
        states = [found.state for _, found in session.loaded.entries("connections", 8, entry)]
        assert states.count(state) == CONNECTIONS
        assert missed(session) == 0
        with unseen(session):
            puppet.do(CLOSE, count=CONNECTIONS)
            until(lambda: missed(session) == CONNECTIONS, "the end of the ends that have a port of their own")
        session.end()
        assert session.account().missed == CONNECTIONS


def test_the_end_of_a_local_port_was_seen(lab: Lab) -> None:
    puppet = Puppet(lab.client)
    with ports.attach(Filter(netns=lab.client.inode)) as session:
        puppet.do(CONNECT, count=CONNECTIONS)
        puppet.do(SHUT_DOWN)
        puppet.do(CLOSE, count=CONNECTIONS)
        puppet.do("listener.close()")
        until(lambda: left(session, lab.client) == 0, "the ends of all sockets")
        session.end()
        assert session.account().missed == 0


def test_what_comes_next_does_not_say_how_long(lab: Lab) -> None:
    """The time in the old state is unknown in the first change after the gap, and known again in the next one."""
    puppet = Puppet(lab.client)
    with Session("transition", "transition", Filter(netns=lab.client.inode)) as session:
        shut_down_unseen(session, puppet)
        rows_of(session)
        puppet.do(CLOSE, count=CONNECTIONS)
        rows: list[Any] = []
        until(
            lambda: rows.extend(rows_of(session)) or sum(row.new_state == "CLOSE" for row in rows) == 2 * CONNECTIONS,
            "both ends to be closed",
        )
        known = {f"{row.old_state}>{row.new_state}": row.in_state_us is not None for row in rows}
        assert known == {"CLOSE_WAIT>LAST_ACK": False, "FIN_WAIT2>CLOSE": False, "LAST_ACK>CLOSE": True}
        session.end()
        assert session.account().missed == 2 * CONNECTIONS


@pytest.mark.parametrize("again", [False, True], ids=["destroyed", "connected again"])
def test_an_attempt_whose_outcome_was_not_seen(lab: Lab, again: bool) -> None:
    puppet = Puppet(lab.client)
    begin = "for each in waiting: each.connect_ex((address, 7))"
    end = DISCONNECT if again else "for each in waiting: each.close()"
    with Session("attempt", "attempt", Filter(netns=lab.client.inode)) as session, held(lab.server):
        puppet.do("waiting = [socket.socket() for n in range(count)]", count=CONNECTIONS)
        puppet.do("for each in waiting: each.setblocking(False)\n" + begin, address=str(lab.server.ipv4))
        with unseen(session):
            puppet.do(end)
        if again:
            puppet.do(begin, address=str(lab.server.ipv4))
        until(lambda: missed(session) == CONNECTIONS, "the attempts to be missed")
        assert not rows_of(session)
        session.end()
        assert session.account().missed == CONNECTIONS


def test_what_is_not_asked_for_is_not_missed(lab: Lab) -> None:
    """Another session sees that there were gaps."""
    puppet = Puppet(lab.client)
    with (
        Session("transition", "transition", Filter(netns=lab.client.inode)) as witness,
        Session("transition", "transition", Filter(netns=lab.server.inode)) as session,
    ):
        puppet.do(CONNECT, count=CONNECTIONS)
        with unseen(witness), unseen(session):
            puppet.do(CLOSE, count=CONNECTIONS)
            until(lambda: missed(witness) == 2 * CONNECTIONS, "the end of both ends of each connection")
        session.end()
        assert session.account().missed == 0


def test_a_birth_that_was_not_seen(lab: Lab) -> None:
    """Of the attempt before it nothing is taken over: neither its owner nor its beginning."""
    puppet = Puppet(lab.client)
    begin = "client.connect_ex((address, 7))"
    with Session("attempt", "attempt", Filter(netns=lab.client.inode)) as session:
        puppet.do("client = socket.socket(); " + begin, address=str(lab.server.ipv4))
        (row,) = rows_of(session)
        assert (row.outcome, row.pid) == ("REFUSED", puppet.pid) and row.latency_us is not None
        with held(lab.server), unseen(session):
            puppet.do("client.setblocking(False); " + begin, address=str(lab.server.ipv4))
        rows: list[Any] = []
        until(lambda: rows.extend(rows_of(session)) or rows, "the outcome of the second attempt")
        (row,) = rows
        assert (row.outcome, row.pid, row.latency_us) == ("REFUSED", None, None)
        session.end()
        assert session.account().missed == 1


def test_a_socket_that_is_used_otherwise_misses_nothing(lab: Lab) -> None:
    """Refused, then a listener: what attempts do not follow is no missed transition."""
    puppet = Puppet(lab.client)
    with Session("attempt", "attempt", Filter(netns=lab.client.inode)) as session:
        puppet.do("each = socket.socket(); assert each.connect_ex(('127.0.0.1', 7)) == 111; each.listen()")
        puppet.do("each.close()")
        until(lambda: not left(session, lab.client), "the socket to be forgotten")
        session.end()
        assert session.account().missed == 0


@pytest.mark.parametrize("event", ["transition", "life", "action"])
def test_what_closes_while_the_run_ends_is_not_missed(lab: Lab, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the programs of the transitions, which are detached first, and those that delete entries."""
    puppet = Puppet(lab.client)
    with Session(event, event, Filter(netns=lab.client.inode)) as session:
        puppet.do(CONNECT, count=CONNECTIONS)
        detach = session.loaded.detach

        def then_close(*hooks: str) -> None:
            if not hooks or "state" in hooks:
                detach("state", "state_again")
                puppet.do("for each in clients + children + [listener]: each.close()")
                until(lambda: left(session, lab.client) == 0, "the end of all sockets")
            detach(*hooks)

        monkeypatch.setattr(session.loaded, "detach", then_close)
        session.end()
        assert session.account().missed == 0
