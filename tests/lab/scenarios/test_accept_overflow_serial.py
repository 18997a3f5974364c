"""One client after the other: the seventh fails after as many overflows as it has sent SYNs."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import FAMILIES, Outcome
from tcpscope.lab.scenarios.accept_overflow_serial import AcceptOverflowSerial

pytestmark = pytest.mark.kernel


Run = tuple[Outcome, int, list[tuple[int, int]]]


def run(family: str) -> Run:
    """The outcome, how often the seventh's SYN was repeated, and SYNs and SYN-ACKs that a capture saw of each."""
    repeated: list[int] = []  # after each step; the last two are the sixth and the seventh connect
    with Lab() as lab:
        scenario = AcceptOverflowSerial(family=family)
        scenario.on_step = lambda step: repeated.append(lab.client.counters()["TcpExtTCPSynRetrans"])
        return scenario.run(lab), repeated[-1] - repeated[-2], scenario.captured


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Run]:
    """All at once, each in a lab of its own: most of the time the seventh client waits."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(FAMILIES, pool.map(run, FAMILIES), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seventh_fails(outcomes: dict[str, Run], family: str) -> None:
    outcome, repeated, captured = outcomes[family]
    assert captured[-1] == (1 + repeated, 0)
    assert len(captured) == 7
    assert min(answers for _, answers in captured[:-1]) >= 1
    assert [client.errno for client in outcome.clients] == [0] * 6 + [errno.ETIMEDOUT]
    assert outcome.clients[-1].connect_seconds > 1
    assert outcome.counters["TcpExtListenOverflows"] == 1 + repeated
    assert outcome.counters["TcpExtListenDrops"] == outcome.counters["TcpExtListenOverflows"]
    assert outcome.client_counters["TcpAttemptFails"] == 1
    assert (outcome.listener.recv_q, outcome.listener.send_q) == (6, 5)
    assert outcome.server_states == {"LISTEN": 1, "CLOSE_WAIT": 6}
