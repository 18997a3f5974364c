"""`trace` with few places for packets: each one that gives way while it has hops left is counted, and no other one."""

from __future__ import annotations

import socket
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tcpscope.filters import Filter, PortRange
from tcpscope.lab.hosts import Lab
from tcpscope.session import Session

pytestmark = pytest.mark.root

PORT, CONNECTIONS, MESSAGES = 6993, 20, 2
SIZE = 100
ATTEMPTS = 5  # a kernel may run no program in some tasks: that is missed, too
SO_RCVBUFFORCE = 33
Ends = tuple[socket.socket, socket.socket]


@contextmanager
def watching(lab: Lab, places: int) -> Iterator[tuple[Session, dict[int, list[str]]]]:
    """The probe with so many places. Behind the block: the hops of each packet.

    The counts by which programs pass over other packets agree with the table then.
    """
    packets: dict[int, list[str]] = defaultdict(list)
    entries = {"packets": places, "tickets": places}
    chosen = Filter(port=(PortRange(PORT, PORT),), netns=(lab.client.inode, lab.server.inode))
    with Session("trace", "trace", chosen, entries=entries) as session:
        assert session.layout is not None
        yield session, packets
        for batch in session.batches():
            for row in session.layout.decoder().rows(batch):
                packets[row.packet].append(row.hop)
        followed = session.spec.layout("followed", internal=True).select([])
        entries = sum(1 for _ in session.loaded.entries("packets", 8, followed))
        assert sum(session.loaded.memory("hashes").cast("I")) == entries


@contextmanager
def listening(lab: Lab) -> Iterator[socket.socket]:
    with lab.server.socket(socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((lab.server.ipv4, PORT))
        listener.listen(CONNECTIONS)
        yield listener


def connected(lab: Lab, listener: socket.socket, held: ExitStack) -> Ends:
    near = held.enter_context(lab.client.socket(socket.AF_INET))
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    near.connect(listener.getsockname())
    far = held.enter_context(listener.accept()[0])
    near.sendall(b"x")
    far.sendall(far.recv(1))
    near.recv(1)
    return near, far


def shape(lab: Lab, *words: str) -> None:
    command = ["tc", "qdisc", *words]
    done = lab.client.run(subprocess.run, command, capture_output=True, text=True, check=False)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr


def pushed_out(packets: dict[int, list[str]]) -> int:
    """Packets that went on without their number. They waited in the queue discipline, or to be received."""
    sent = (hops for hops in packets.values() if "QUEUE" in hops)
    return sum(not {"RECEIVE", "DROPPED"} & {*hops} for hops in sent)


def discarded(packets: dict[int, list[str]]) -> int:
    """Packets that are shown to end in the queue discipline."""
    return sum("DROPPED" in hops and "START_XMIT" not in hops for hops in packets.values())


def kept(lab: Lab, places: int) -> tuple[dict[int, list[str]], int]:
    """Many packets wait in a queue discipline, which discards them. Their hops, and how many are missed."""
    with listening(lab) as listener, ExitStack() as held, watching(lab, places) as (session, packets):
        ends = [connected(lab, listener, held) for _ in range(CONNECTIONS)]
        # Nine packets pass at once, and another one each 20 seconds.
        shape(lab, "replace", "dev", "veth0", "root", "tbf", "rate", "64bit", "burst", "1600", "limit", "100000")
        for near, _ in ends:
            for _ in range(MESSAGES):
                near.sendall(bytes(SIZE))
        shape(lab, "del", "dev", "veth0", "root")
        session.end()
        missed = session.account().missed
    return packets, missed


def test_all_that_is_pushed_out_is_counted(lab: Lab) -> None:
    for _ in range(ATTEMPTS):
        packets, missed = kept(lab, 8)
        if missed == pushed_out(packets):
            break
    assert discarded(packets) <= 8
    assert missed == pushed_out(packets) > 0


def test_with_enough_places_nothing_is_missed(lab: Lab) -> None:
    for _ in range(ATTEMPTS):
        packets, missed = kept(lab, 1024)
        if not missed and not pushed_out(packets):
            break
    assert discarded(packets) > 8
    assert (missed, pushed_out(packets)) == (0, 0)


def test_what_has_no_hop_left_is_not_missed(lab: Lab) -> None:
    """No tracepoint shows the end of the packets of a handshake. Others get, and keep, the addresses of their skbs."""
    for _ in range(ATTEMPTS):
        with listening(lab) as listener, lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as unread:
            unread.bind(("127.0.0.1", 0))
            unread.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
            with watching(lab, 64) as (session, packets):
                for _ in range(100):
                    with ExitStack() as held:
                        connected(lab, listener, held)
                    for _ in range(50):
                        unread.sendto(b"", unread.getsockname())
                session.end()
                missed = session.account().missed
        if not missed:
            break

    assert len(packets) > 10 * 64
    assert missed == 0
