"""Objects that begin together find what is older than they in one walk over all open files."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tcpscope import listeners, ports
from tcpscope.filters import Filter
from tcpscope.kernel import netns, walk
from tcpscope.kernel.loaded import Loaded
from tcpscope.kernel.walk import Walk
from tcpscope.session import Session

pytestmark = [pytest.mark.kernel, pytest.mark.root]


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The iterators over open files that were run."""
    run: list[str] = []

    def iterate(own: Loaded, hook: str, netns_fd: int = -1) -> Iterator[bytes]:
        if hook in ("seed", "held"):
            run.append(f"{own.spec.name} {hook}")
        return original(own, hook, netns_fd)

    original = Loaded.iterate
    monkeypatch.setattr(Loaded, "iterate", iterate)
    return run


def found_by_all() -> None:
    """Whether a listener and a connection that are older than three objects have their places in each of them."""
    own = Filter(netns=(netns.inode_of("/proc/self/ns/net"),))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        port, mine = server.getsockname()[1], client.getsockname()[1]
        sessions: list[Session] = []
        try:
            with Walk():
                all_ = {"moving_at_most": 1 << 20, "moving_us": 1 << 40}
                sessions.append(Session("health", "health", own, constants=all_))
                sessions.append(listeners.open_session(own))
                snapshots = listeners.Snapshots(sessions[-1])
                sessions.append(ports.attach(own))
                pools = ports.Pools(sessions[-1], own, [])
            sessions[0].loaded.memory("moving").cast("Q")[0] = 0
            sessions[0].loaded.run("look")
            assert sessions[0].layout is not None
            rows = [row for batch in sessions[0].batches() for row in sessions[0].layout.decoder(raw=True).rows(batch)]
            (looked,) = (row for row in rows if row.lport == mine and row.rport == port)
            assert looked.pid == os.getpid()
            (listener,) = (each for each in snapshots.look() if each.lport == port)
            assert [holder.pid for holder in listener.holders] == [os.getpid()]
            (pool,) = (each for each in pools.look() if each.rport == port)
            assert (pool.established, pool.owner and pool.owner.pid) == (1, os.getpid())
        finally:
            for session in sessions:
                session.close()


def test_a_walk_that_is_shared(walked: list[str]) -> None:
    found_by_all()
    assert walked == ["owner seed"]


def test_a_kernel_that_lets_no_program_call_the_next(walked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loaded, "walk_on", lambda own, other, hook: False)
    found_by_all()
    assert walked == ["owner seed", "listeners seed", "ports held"]


def test_alone_each_walks_by_itself(walked: list[str]) -> None:
    own = Filter(netns=(netns.inode_of("/proc/self/ns/net"),))
    assert not Walk.is_shared()
    with ports.attach(own) as session:
        ports.Pools(session, own, [])
    assert walked == ["ports held"]


def test_an_error_in_the_block_walks_no_more(walked: list[str]) -> None:
    after: list[str] = []
    with pytest.raises(KeyError), walk.Walk():
        Walk.after(lambda: after.append("walked"))
        raise KeyError
    assert (walked, after, Walk.is_shared()) == ([], [], False)
