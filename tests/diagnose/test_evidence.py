"""The evidence: what is counted begins when all of it is there."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from itertools import count
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tcpscope.diagnose import Rule, evidence, sockets
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.sockets import Mark
from tcpscope.errors import ResourceError
from tcpscope.filters import Filter
from tcpscope.kernel import netns
from tcpscope.kernel.loaded import Loaded
from tcpscope.lab.hosts import Lab
from tcpscope.request import Request
from tests.conftest import until

PORT, REFUSES = 8080, 8081

pytestmark = pytest.mark.root


class Asks(Rule):
    """The last piece of evidence is the one that is late."""

    needs: ClassVar[tuple[str, ...]] = ("attempts", "resets", "ports", "queues", "counters", "sockets")


def test_what_happens_before_all_of_it_is_there_is_not_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = lab.client.socket(socket.AF_INET), lab.server.socket(socket.AF_INET)
    server.bind((lab.server.ipv4, PORT))
    server.listen(0)
    client.connect((lab.server.ipv4, PORT))  # the queue is full
    lab.client.sysctl("ip_local_port_range", "40000 40001")
    bound = [lab.client.socket(socket.AF_INET) for _ in range(2)]
    for each in bound:
        each.bind((lab.client.ipv4, 0))
    lab.client.spawn(["sleep", "600"])  # whose files the counters are read from
    ports = count(30001)

    def everything_fails() -> None:
        with lab.client.socket(socket.AF_INET) as refused, lab.client.socket(socket.AF_INET) as portless:
            refused.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            refused.bind((lab.client.ipv4, 30000))
            assert refused.connect_ex((lab.server.ipv4, REFUSES)) == errno.ECONNREFUSED
            with pytest.raises(OSError, match="in use"):
                portless.bind((lab.client.ipv4, 0))
        with lab.client.socket(socket.AF_INET) as dropped:
            dropped.bind((lab.client.ipv4, next(ports)))
            dropped.setblocking(False)
            assert dropped.connect_ex((lab.server.ipv4, PORT)) == errno.EINPROGRESS  # there is no second SYN

    late = evidence._SOURCES["sockets"]

    def looks(request: Request, marks: Mapping[str, Mark]) -> Any:
        everything_fails()
        return late(request, marks)

    monkeypatch.setitem(evidence._SOURCES, "sockets", looks)
    namespaces = (lab.client.inode, lab.server.inode)
    seen = Evidence(Request(filter=Filter(netns=namespaces)), [Asks()])
    try:
        assert not seen.lacking
        everything_fails()
        everything_fails()

        (listener,) = seen.queues.histories.values()

        def refused() -> bool:
            seen.poll()
            return listener.refusals >= 2

        until(refused, "two refused SYNs")
        seen.end()
        assert seen.attempts.count(outcome="REFUSED") == 2
        assert seen.resets.count(direction="SENT") == 2
        assert sum(tally.count for calls in seen.ports.failed.values() for tally in calls.values()) == 2
        assert (listener.refusals, sum(listener.peers.values())) == (2, 2)
        assert seen.counters.grown(lab.client.inode, "TcpActiveOpens") == 4
    finally:
        seen.close()
        for each in (*bound, client, server):
            each.close()


class Looks(Rule):
    needs: ClassVar[tuple[str, ...]] = ("sockets",)


def test_a_look_that_fails_ends_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has too few open files for a moment, say. Then nothing is said of connections of some time ago."""
    clock = SimpleNamespace(now_s=1000.0, monotonic=lambda: clock.now_s, thread_time=time.thread_time)
    monkeypatch.setattr(sockets, "time", clock)
    seen = Evidence(Request(filter=Filter(netns=(netns.own(),))), [Looks()])

    def iterate(*args: object) -> None:
        raise ResourceError("iterator cannot run: Too many open files in system", "raise fs.file-max")

    try:
        seen.poll()
        assert seen.sockets.looks == 1
        kept: Any = {(1, 1): object()}
        seen.sockets.tracks = kept
        with monkeypatch.context() as full:
            full.setattr(Loaded, "iterate", iterate)
            seen.sockets._last_s = 1098.0
            for clock.now_s in (1100.0, 1100.2):
                seen.poll()
                assert seen.sockets.tracks is kept
            clock.now_s = 1104.0
            seen.poll()
            assert seen.sockets.tracks == {}
        clock.now_s = 1106.0
        seen.poll()
        assert seen.sockets.looks == 2
        assert (
            "2 looks at sockets failed, so numbers are the least: "
            "iterator cannot run: Too many open files in system; raise fs.file-max"
        ) in set(seen.blind_spots())
    finally:
        seen.close()
