"""Snapshots of listeners: what a look finds in the probe's table, and when it walks over all open files."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tcpscope import listeners
from tcpscope.errors import UnsupportedError
from tcpscope.filters import Filter
from tcpscope.kernel.features import Answer, Kernel
from tcpscope.kernel.spec import Program
from tcpscope.lab.hosts import Lab
from tcpscope.listeners import Listener, Snapshots, open_session
from tcpscope.session import Session
from tests.lacks import FUNCTIONS, pretend
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

NUMBER = 20
FIRST = 7000
LISTEN = "held = [socket.create_server(('127.0.0.1', first + n)) for n in range(number)]"
SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, since 5.14
UNHELD = """
one, other = socket.socketpair()
gone = socket.create_server(('127.0.0.1', port)); socket.send_fds(one, [b'x'], [gone.fileno()]); gone.close()
"""


def only(way: str) -> type[Kernel]:
    """This kernel, which visits the entries of a map only in the way `way`."""

    class Only(Kernel):
        def can(self, program: Program) -> Answer:
            if program.hook == "look" and not program.name.endswith(way):
                return Answer(False, "the other way is tried")
            return super().can(program)

    return Only


def watching(lab: Lab, **filter: Any) -> Session:
    return open_session(Filter(netns=lab.server.inode, **filter), events=True, ring_bytes=4096)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An item for each walk, of which there is none but the first and those that are asked for."""
    made: list[str] = []
    walk = Snapshots._walk
    monkeypatch.setattr(listeners, "WALK_SHARE", 1e9)
    monkeypatch.setattr(Snapshots, "_walk", lambda *given: (made.append("walk"), walk(*given)))
    return made


@pytest.mark.parametrize("way", ["__each", "__element"])
def test_both_ways_find_all(lab: Lab, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    older, younger = Puppet(lab.server, "older"), Puppet(lab.server, "younger")
    older.do(LISTEN, first=FIRST, number=NUMBER)
    kernel = only(way)
    monkeypatch.setattr(listeners, "Kernel", kernel)
    try:
        session = watching(lab)
    except UnsupportedError as error:
        # On a kernel where everything else can be hooked too, a refusal would be a fault of ours.
        if "look" not in str(error) or (way == "__element" and kernel().fentry):
            raise
        pytest.skip(f"{error}; {error.hint}")
    with session:
        snapshots = Snapshots(session)
        younger.do(LISTEN, first=FIRST + NUMBER, number=NUMBER)
        found = {own.lport: [held.comm for held in own.holders] for own in snapshots.look()}
        assert found == {FIRST + n: ["older" if n < NUMBER else "younger"] for n in range(2 * NUMBER)}
        younger.do("held = None")
        assert sorted(own.lport for own in snapshots.look()) == [FIRST + n for n in range(NUMBER)]


def test_holders_are_read_again_when_it_is_time(lab: Lab, walks: list[str]) -> None:
    """A new listener is shown at once. Its holder is the process that called listen()."""
    server, other = Puppet(lab.server, "server"), Puppet(lab.server, "other")
    server.do(LISTEN, first=FIRST, number=1)
    with watching(lab) as session:
        snapshots = Snapshots(session)
        (own,) = snapshots.look()
        fd = server.ask("held[0].fileno()")
        assert [(held.pid, held.comm, held.fd) for held in own.holders] == [(server.pid, "server", fd)]
        other.do(LISTEN, first=FIRST + 1, number=1)
        found = {own.lport: own for own in snapshots.look()}
        assert found[FIRST].holders == own.holders
        assert [(held.pid, held.fd) for held in found[FIRST + 1].holders] == [(other.pid, None)]
        assert walks == ["walk"]
        found = {own.lport: own for own in snapshots.look(fresh=True)}
        assert [held.fd for held in found[FIRST + 1].holders] == [other.ask("held[0].fileno()")]
        assert walks == ["walk"] * 2


def test_a_walk_is_made_when_the_one_before_was_cheap_enough(
    lab: Lab, walks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "WALK_SHARE", 0)
    with watching(lab) as session:
        snapshots = Snapshots(session)
        for number in range(1, 4):
            snapshots.look()
            assert len(walks) == number


def test_an_idle_one_is_the_same_object(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "WALK_SHARE", 1e9)
    server, client = Puppet(lab.server, "server"), Puppet(lab.server, "client")
    server.do(LISTEN, first=FIRST, number=2)
    with watching(lab) as session:
        snapshots = Snapshots(session)

        def look(fresh: bool = False) -> list[Listener]:
            return sorted(snapshots.look(fresh=fresh), key=lambda own: own.lport)

        idle, other = look()
        assert [own is before for own, before in zip(look(), (idle, other), strict=True)] == [True, True]
        client.do("made = socket.create_connection(('127.0.0.1', port))", port=FIRST)
        busy, same = look()
        assert (busy.accept_queue, same is other) == (1, True)
        again, _ = look()
        assert busy.oldest_wait_us is not None  # a time: each look has its own
        assert again.oldest_wait_us is not None
        assert again.oldest_wait_us > busy.oldest_wait_us
        assert look(fresh=True)[1] is other
        Puppet(lab.server, "another").do(LISTEN, first=FIRST + 2, number=1)
        assert look(fresh=True)[1] is not other  # the holders may be others


def test_one_that_nobody_holds_is_not_shown(lab: Lab) -> None:
    server = Puppet(lab.server, "server")
    server.do(LISTEN, first=FIRST, number=1)
    server.do(UNHELD, port=FIRST + 1)
    with watching(lab) as session:
        snapshots = Snapshots(session)
        assert [own.lport for own in snapshots.look()] == [FIRST]
        assert session.account().table_full == 0
        server.do("_, (number,), _, _ = socket.recv_fds(other, 1, 1)")
        assert sorted(own.lport for own in snapshots.look(fresh=True)) == [FIRST, FIRST + 1]


def test_those_without_a_place_are_counted_and_come_later(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "LISTENERS_AT_MOST", NUMBER)
    server = Puppet(lab.server, "server")
    with watching(lab) as session:
        snapshots = Snapshots(session)
        server.do(LISTEN, first=FIRST, number=NUMBER)
        assert len(snapshots.look()) == NUMBER
        assert session.account().table_full == 0
        server.do("more = socket.create_server(('127.0.0.1', port))", port=FIRST + NUMBER)
        assert sorted(own.lport for own in snapshots.look()) == [FIRST + n for n in range(NUMBER)]
        assert session.account().table_full == 1
        server.do("held.pop(0).close()")
        assert sorted(own.lport for own in snapshots.look(fresh=True)) == [FIRST + 1 + n for n in range(NUMBER)]


def test_samples_need_the_listeners_of_both_families(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "can", Kernel.can)  # as it was, afterwards
    pretend((*FUNCTIONS, "consume_skb"))
    server = Puppet(lab.server, "server")
    server.do(LISTEN, first=FIRST, number=1)
    server.do("six = socket.create_server(('::1', port), family=socket.AF_INET6)", port=FIRST + 1)
    with watching(lab, family=6) as session:
        snapshots = Snapshots(session)
        assert {own.lport: own.wanted for own in snapshots.look(all_=True)} == {FIRST: False, FIRST + 1: True}
        assert [own.lport for own in snapshots.look()] == [FIRST + 1]


def test_a_listener_tells_its_namespace_by_the_cookie(lab: Lab) -> None:
    server = Puppet(lab.server, "server")
    server.do(LISTEN, first=FIRST, number=1)
    with watching(lab) as session:
        (own,) = Snapshots(session).look()
        if not own.has_cookie:  # both came with 5.12
            assert own.net_cookie is None
            return
        try:
            cookie = int.from_bytes(
                lab.server.socket(socket.AF_INET).getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little"
            )
        except OSError:
            cookie = own.net_cookie or 0  # 5.12 and 5.13 have no such option
        assert own.namespace == (lab.server.inode, cookie)
        assert cookie > 0


def test_who_should_accept_and_who_has_left_the_namespace(lab: Lab) -> None:
    """A process that has children with the listener leaves it to them, unless it is seen to accept."""
    master = Puppet(lab.server, "master")
    master.do(LISTEN, first=FIRST, number=1)
    master.do(
        "import ctypes, subprocess\n"
        "fd = held[0].fileno()\n"
        "code = 'import sys; sys.stdin.read()'\n"
        "worker = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, pass_fds=[fd])"
    )
    worker = master.ask("worker.pid")
    with watching(lab) as session:
        snapshots = Snapshots(session)
        (own,) = snapshots.look(fresh=True)
        assert own.inside == {master.pid, worker}
        assert [held.pid for held in own.workers] == [worker]
        assert (own.owner and own.owner.pid) == worker
        master.do("assert ctypes.CDLL(None).unshare(0x40000000) == 0  # CLONE_NEWNET")
        client = lab.server.run(socket.create_connection, ("127.0.0.1", FIRST))
        master.do("held[0].accept()")
        client.close()
        (own,) = snapshots.look(fresh=True)
        assert own.inside == {worker}
        if own.accepts is not None:  # the kernel lets a program see accept()
            assert (own.owner and own.owner.pid) == master.pid
