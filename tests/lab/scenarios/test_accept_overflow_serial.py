"""One client after the other: the seventh fails after as many overflows as it has sent SYNs."""

import errno

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import FAMILIES
from tcpscope.lab.scenarios.accept_overflow_serial import AcceptOverflowSerial

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seventh_fails(family: str) -> None:
    with Lab() as lab:
        outcome = AcceptOverflowSerial(family=family).run(lab)
    assert [client.errno for client in outcome.clients] == [0] * 6 + [errno.ETIMEDOUT]
    assert outcome.clients[-1].connect_seconds > 1
    assert outcome.counters["TcpExtListenOverflows"] == 1 + outcome.client_counters["TcpExtTCPSynRetrans"]
    assert outcome.counters["TcpExtListenDrops"] == outcome.counters["TcpExtListenOverflows"]
    assert outcome.client_counters["TcpAttemptFails"] == 1
    assert (outcome.listener.recv_q, outcome.listener.send_q) == (6, 5)
    assert outcome.server_states == {"LISTEN": 1, "CLOSE_WAIT": 6}
