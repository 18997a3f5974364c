"""TIME_WAIT stays with the side that closes first."""

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.close_order import CloseOrder
from tests.lab.families import KERNEL_FAMILIES


@pytest.mark.root
@pytest.mark.parametrize("family", KERNEL_FAMILIES)
@pytest.mark.parametrize("closes", ["client", "server"])
def test_time_wait(closes: str, family: str) -> None:
    with Lab() as lab:
        outcome = CloseOrder(closes=closes, family=family, clients=3, pause_ms=10).run(lab)
    assert [client.errno for client in outcome.clients] == [0] * 3
    waiting = {"client": outcome.client_states["TIME_WAIT"], "server": outcome.server_states["TIME_WAIT"]}
    assert waiting == {"client": 0, "server": 0} | {closes: 3}
    assert outcome.counters["TcpPassiveOpens"] == outcome.client_counters["TcpActiveOpens"] == 3
    assert outcome.counters["TcpOutRsts"] == outcome.client_counters["TcpOutRsts"] == 0
