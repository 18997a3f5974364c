"""`trace` where a packet goes to another processor, where a queue discipline gives out many packets, or none, and where
packets are under way while it begins."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tcpscope.filters import Filter, PortRange
from tcpscope.kernel.loaded import Loaded
from tcpscope.kernel.machine import possible_cpus
from tcpscope.session import Session
from tests.tools.test_trace_way import PORT, SERVER, Way, way

__all__ = ["way"]

SENDS, CONNECTIONS = 2000, 24
ATTEMPTS = 5
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")


def connected(way: Way, held: ExitStack, number: int) -> list[tuple[socket.socket, socket.socket]]:
    listener = held.enter_context(way.server.run(socket.socket))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((SERVER, PORT))
    listener.listen(number)
    ends = []
    for _ in range(number):
        near = held.enter_context(way.client.run(socket.socket))
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        near.connect((SERVER, PORT))
        ends.append((near, held.enter_context(listener.accept()[0])))
    return ends


@pytest.mark.root
def test_a_packet_for_another_processor(way: Way, run_tool: Any) -> None:
    """It may be received before the processor that sends it is back from its driver. No delay is negative then."""
    way.routed()
    cpus = sorted(os.sched_getaffinity(0))
    way.run(way.middle, f"echo {1 << cpus[1]:x} > /sys/class/net/to_c/queues/rx-0/rps_cpus")
    with ExitStack() as held, run_tool("trace", "--port", f"{PORT}", "--buffer", "64M") as tool:
        os.sched_setaffinity(0, {cpus[0]})
        held.callback(os.sched_setaffinity, 0, cpus)
        ((near, far),) = connected(way, held, 1)
        for _ in range(SENDS):
            near.sendall(b"x")
            assert far.recv(1) == b"x"
    packets = defaultdict(list)
    for row in tool.done.rows:
        if row["data_bytes"] == 1 and row["direction"]:
            packets[row["packet"]].append(row)
    moved = 0
    for rows in packets.values():
        places = {(way.names[row["netns"]], row["hop"], row["device"]): row for row in rows}
        there = places.get(("middle", "RECEIVE", "to_c"))
        if there and ("client", "XMIT", "c") in places:
            moved += (there["cpu"], places["client", "XMIT", "c"]["cpu"]) == (cpus[1], cpus[0])
            assert there["before"] in ("START_XMIT", "XMIT")
    assert moved > SENDS / 2
    assert all(row["since_us"] is None or row["since_us"] < 60_000_000 for row in tool.done.rows)


def runs(session: Session) -> int:
    """Of the program for what a queue discipline gives out."""
    program = session.loaded.hooks["dequeue"].program
    assert program is not None
    return session.loaded.program_info()[program.name][1]


def given_out(way: Way, device: str) -> tuple[dict[str, list[int]], int, int, int]:
    """Packets that wait in a queue discipline, and go. Of each hop their numbers; how many are missed; how often the
    program has run while they waited, and then: for other devices of the machine, too.
    """
    before = STATS.read_text()
    shape = f"tc qdisc {{}} dev {device} root tbf rate {{}} burst {{}} latency 1000s"
    hops: dict[str, list[int]] = defaultdict(list)
    with ExitStack() as held:
        STATS.write_text("1")
        held.callback(STATS.write_text, before)
        ends = connected(way, held, CONNECTIONS)
        with Session("trace", "trace", Filter(port=(PortRange(PORT, PORT),))) as session:
            assert session.layout is not None
            way.run(way.client, shape.format("replace", "1kbit", 1600))
            for near, _ in ends:
                near.sendall(bytes(100))
            waited = runs(session)
            way.run(way.client, shape.format("change", "1gbit", 100_000))
            ends[0][0].sendall(bytes(101))  # it lets the queue discipline run
            for _, far in ends:
                assert len(far.recv(100, socket.MSG_WAITALL)) == 100
            ran = runs(session) - waited
            session.end()
            for batch in session.batches():
                for row in session.layout.decoder().rows(batch):
                    if row.direction == "SENT" and row.data_bytes == 100:
                        hops[row.hop].append(row.packet)
            missed = session.account().missed
    way.run(way.client, f"tc qdisc del dev {device} root")
    return hops, missed, waited, ran


@pytest.mark.root
def test_many_packets_at_once(way: Way) -> None:
    """Of a device with several queues, the kernel takes up to eight packets out of one queue discipline at once."""
    way.routed()
    for _ in range(ATTEMPTS):  # others have packets, too, and may end the measurement
        hops, missed, waited, ran = given_out(way, "c")
        if not missed and waited and ran < CONNECTIONS - 10:
            break
    given = hops["DEQUEUE"]
    assert sorted(given) == sorted(hops["QUEUE"]) == sorted(set(given))
    assert len(given) >= CONNECTIONS
    assert missed == 0
    assert waited > 0
    assert ran < CONNECTIONS - 10


def at_drivers(session: Session) -> list[int]:
    """How many packets are at a driver, of each processor: `depth`, the first field."""
    size, cpus = session.spec.layout("sending", internal=True).size, possible_cpus()
    found = session.loaded.value("sendings", bytes(4), size * cpus)
    assert found is not None
    return [int.from_bytes(found[cpu * size :][:4], "little") for cpu in range(cpus)]


@pytest.mark.root
def test_packets_while_the_programs_are_attached(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """What went to a driver before the program was there that sees it come back takes no place from others."""
    way.routed()
    attach = Loaded.attach
    with ExitStack() as held:
        ((near, far),) = connected(way, held, 1)

        def attach_and_send(loaded: Loaded, *program: str | None) -> None:
            attach(loaded, *program)  # type: ignore[arg-type]
            for _ in range(4):
                near.sendall(b"x")
                assert far.recv(1) == b"x"

        monkeypatch.setattr(Loaded, "attach", attach_and_send)
        chosen = Filter(port=(PortRange(PORT, PORT),), netns=tuple(space.inode for space in way.all))
        with Session("trace", "trace", chosen) as session:
            assert at_drivers(session) == [0] * possible_cpus()
