"""The server dies with unread data: every queued connection is reset."""

from pathlib import Path

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.server_dies import ServerDies
from tests.lab.families import KERNEL_FAMILIES


@pytest.mark.root
@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_resets(family: str) -> None:
    with Lab() as lab:
        outcome = ServerDies(family=family, synack_retries=5).run(lab)
    assert not Path(f"/proc/{outcome.listener.pid}").exists()
    assert (outcome.listener.recv_q, outcome.listener.send_q) == (6, 5)  # as it was when it died
    assert outcome.counters["TcpEstabResets"] == 6
    assert outcome.counters["TcpOutRsts"] >= 6 + 4  # and those that had never fitted in
    assert outcome.server_sockets == outcome.client_sockets == ()


@pytest.mark.kernel
def test_the_two_halves_of_the_fault() -> None:
    with Lab() as lab:
        scenario = ServerDies(clients=6, synack_retries=5)
        scenario.setup(lab)
        super(ServerDies, scenario).act(lab)  # the six connections exist
        before = scenario.outcome(lab)
        assert before.counters["TcpEstabResets"] == 0
        scenario.die(lab)
        outcome = scenario.settle(lab)
    assert outcome.counters["TcpExtListenOverflows"] == 0
    assert outcome.counters["TcpOutRsts"] == 6
