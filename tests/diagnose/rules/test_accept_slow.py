"""The rule about applications that accept too slowly: the rate, and no longer queue as a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tcpscope.diagnose.listener_history import History
from tests.record import Script, Test, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import BACKLOG, DIAGNOSE, Run, findings, is_exact, looks_are_rare

ACCEPTS = 16
PAUSE_US = 250_000


@recorded(DIAGNOSE)
def test_a_queue_that_stays_full_while_it_accepts(script: Script) -> Test:
    with script.older():
        run = Run(script)
    for made in run.overflow_at_syn(2):
        run.give_up(made)
    for _ in range(ACCEPTS):
        run.owner.pause(PAUSE_US)
        run.accept(1)
        run.connect()
    run.accept(BACKLOG + 1)
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    facts, overflows = finding["facts"], run.change("ListenOverflows")
    if looks_are_rare(seen) and finding["rule"] == "accept_queue":  # too few to tell a slow server from a burst
        assert facts["count"] == overflows
        return
    assert (finding["rule"], finding["severity"]) == ("accept_slow", "critical")
    assert facts["count"] == facts["refused"] == overflows
    assert facts["accepts"] == ACCEPTS + BACKLOG + 1
    assert 0 < facts["accepts_per_s"] < 1e6 / PAUSE_US + BACKLOG
    assert facts["pids"] == [run.owner.pid]
    assert str(run.owner.pid) in finding["who"]
    if is_exact(seen):
        assert facts["at_syn"] == overflows
    (remedy,) = finding["remedies"]
    assert remedy["proposed"] is None
    assert f"-p {run.owner.pid} " in remedy["command"]


def watched(lengths: Iterator[int], accepted: int) -> History:
    """A listener with limit 5, of which so many are accepted between two looks."""
    history = History(LISTENER, LISTENER)
    for look, length in enumerate(lengths):
        own = replace(LISTENER, accept_queue=length, accepts=accepted * look, head=(look, 0) if length else None)
        history.look(own, 0.2 * look)
    return history


@pytest.mark.parametrize(("nearly_full", "slow"), [((0,), False), ((0, 1), True)])
def test_it_is_slow_if_its_queue_is_nearly_full_in_half_of_the_looks(nearly_full: tuple[int, ...], slow: bool) -> None:
    """In one of three looks, or in two."""
    assert watched((6 if look % 3 in nearly_full else 0 for look in range(50)), 2).too_slow == slow


def test_a_burst_every_second_is_no_slow_server() -> None:
    assert not watched((6 if look % 5 == 0 else 0 for look in range(100)), 20).too_slow


@pytest.mark.parametrize(("length", "slow"), [(180, False), (220, True)])
def test_it_is_slow_if_connections_wait_a_second(length: int, slow: bool) -> None:
    """In a long queue: 200 are accepted in a second."""
    history = History(LISTENER, LISTENER)
    for look in range(100):
        own = replace(LISTENER, accept_queue=length, accept_limit=4096, accepts=40 * look, head=(look, 0))
        history.look(own, 0.2 * look)
    assert history.too_slow == slow
