"""bpf/recursion.bpf.h: an event is handled once, by whichever of the two copies of a program is free for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tcpscope.filters import Filter
from tcpscope.lab.hosts import Lab
from tcpscope.session import Session
from tcpscope.tools import rtt
from tests.conftest import until
from tests.puppets import Puppet
from tests.tables import left

# On every kernel: the notes of each processor are only on some between the oldest and the newest. Concurrent: a softirq
# on the other processor, too.
pytestmark = [pytest.mark.kernel, pytest.mark.every_kernel, pytest.mark.concurrent]

CONNECTIONS, EXCHANGES = 20, 3
STEPS = (
    "CLOSE>SYN_SENT",
    "SYN_SENT>ESTABLISHED",
    "LISTEN>SYN_RECV",
    "SYN_RECV>ESTABLISHED",
    "ESTABLISHED>FIN_WAIT1",
    "ESTABLISHED>CLOSE_WAIT",
    "FIN_WAIT1>FIN_WAIT2",
    "CLOSE_WAIT>LAST_ACK",
    "FIN_WAIT2>CLOSE",
    "LAST_ACK>CLOSE",
)
SECOND_ALONE = ("state", "destroy", "segment", "half_closed")
FIRST_ALONE = tuple(f"{hook}_again" for hook in SECOND_ALONE)


@pytest.mark.parametrize("skip", [(), SECOND_ALONE, FIRST_ALONE], ids=["both", "second alone", "first alone"])
def test_each_event_once(lab: Lab, skip: tuple[str, ...]) -> None:
    """Without the first copy everything is as if it had been left out each time."""
    left_out = () if skip == SECOND_ALONE else skip  # the second copy of `state` runs the first, which is only detached
    with Session("transition", "transition", Filter(netns=lab.client.inode), skip=left_out) as session:
        assert session.layout is not None
        if skip == SECOND_ALONE:
            session.loaded.detach("state", "destroy")
        decode = session.layout.decoder().rows
        rows: list[Any] = []
        Puppet(lab.client, "both-ends").do(
            "listener = socket.create_server(('127.0.0.1', 0))\n"
            "for n in range(count):\n"
            "    client = socket.create_connection(listener.getsockname()); child, _ = listener.accept()\n"
            "    client.close(); child.recv(1); child.close()",
            count=CONNECTIONS,
        )

        def all_closed() -> bool:
            rows.extend(row for batch in session.batches() for row in decode(batch))
            return sum(row.new_state == "CLOSE" for row in rows) + skipped() >= 2 * CONNECTIONS

        def skipped() -> int:
            """What one copy alone has interrupted itself in nobody has taken; the kernel counts it (5.12)."""
            return sum(missed for *_, missed in session.loaded.program_info().values()) if skip else 0

        until(all_closed, "both ends of all connections to be closed")
        session.end()
        rows.extend(row for batch in session.batches() for row in decode(batch))
        steps = Counter(f"{row.old_state}>{row.new_state}" for row in rows)
        lacking = {step: CONNECTIONS - steps[step] for step in STEPS}
        assert min(lacking.values()) >= 0, lacking
        assert sum(lacking.values()) <= skipped(), lacking
        counters = session.counters()
        if skip == SECOND_ALONE:
            assert counters["rescued"] >= counters["seen"] > 0
        if skip == FIRST_ALONE:
            assert counters["rescued"] == 0


@pytest.mark.parametrize("skip", [(), SECOND_ALONE, FIRST_ALONE], ids=["both", "second alone", "first alone"])
def test_each_round_trip_once(lab: Lab, skip: tuple[str, ...]) -> None:
    """Of each end the handshake, what it sent, and the FIN."""
    here, constants = Filter(netns=lab.client.inode), {"by_lport": True}
    with Session("rtt", None, here, constants=constants, skip=skip, owners=False) as session:
        puppet = Puppet(lab.client, "both-ends")
        puppet.do(
            "listener = socket.create_server(('127.0.0.1', 0)); port = listener.getsockname()[1]\n"
            "for n in range(count):\n"
            "    client = socket.create_connection(listener.getsockname()); child, _ = listener.accept()\n"
            "    for n in range(exchanges): client.send(b'x'); child.recv(1); child.send(b'x'); client.recv(1)\n"
            "    client.close(); child.recv(1); child.close()",
            count=CONNECTIONS,
            exchanges=EXCHANGES,
        )
        until(lambda: all(found.state != "LAST_ACK" for found in lab.client.sockets()), "the end of all connections")
        session.end()
        # What one copy alone has interrupted itself in nobody has taken; the kernel counts it (5.12).
        skipped = sum(missed for *_, missed in session.loaded.program_info().values()) if skip else 0
        counts = {key.lport: found.count for key, found in rtt._Reader(session, 4096).take().items()}
        at_server = counts.pop(puppet.ask("port"))
        samples = CONNECTIONS * (1 + EXCHANGES + 1)
        lacking = samples - at_server, samples - sum(counts.values())
        assert min(lacking) >= 0
        assert sum(lacking) <= skipped
        rescued = session.counters()["rescued"]
        assert (skip == SECOND_ALONE) <= (rescued > 0)
        assert (skip == FIRST_ALONE) <= (rescued == 0)


@pytest.mark.parametrize("skip", [(), SECOND_ALONE, FIRST_ALONE], ids=["both", "second alone", "first alone"])
def test_each_listener_once(lab: Lab, skip: tuple[str, ...]) -> None:
    """One that was counted twice would stay; nothing else tells of one that is not forgotten."""
    with Session("listeners", "overflow", Filter(netns=lab.client.inode), skip=skip) as session:
        puppet = Puppet(lab.client)
        puppet.do("listeners = [socket.create_server(('127.0.0.1', 0)) for n in range(count)]", count=CONNECTIONS)
        assert left(session, lab.client) == CONNECTIONS
        puppet.do("for listener in listeners: listener.close()")
        until(lambda: not left(session, lab.client), "the listeners to be forgotten")
        rescued = session.counters()["rescued"]
        assert (skip == SECOND_ALONE) <= (rescued >= 3 * CONNECTIONS)
        assert (skip == FIRST_ALONE) <= (rescued == 0)


def test_what_the_second_copy_missed_hides_nothing(lab: Lab) -> None:
    """The second copy is skipped at the first attempt of a socket, and the first copy at the third."""
    puppet = Puppet(lab.client)
    with Session("transition", "transition", Filter(netns=lab.client.inode)) as session:
        assert session.layout is not None
        decode = session.layout.decoder().rows
        puppet.do("client = socket.socket()")
        for copy in ("state_again", None, "state"):
            if copy:
                session.loaded.detach(copy)
            puppet.do("assert client.connect_ex(('127.0.0.1', 7)) == 111")
            if copy:
                session.loaded.attach(copy)
        session.end()
        rows = [row for batch in session.batches() for row in decode(batch)]
        assert [f"{row.old_state}>{row.new_state}" for row in rows] == ["CLOSE>SYN_SENT", "SYN_SENT>CLOSE"] * 3
        assert session.counters()["rescued"] >= 2  # other traffic of the machine, too
        assert session.account().missed == 0
