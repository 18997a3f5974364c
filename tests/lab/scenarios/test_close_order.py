"""Experiment F: a connection's states and times, from the client. TIME_WAIT stays with the side that closes first."""

import itertools

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.close_order import CloseOrder
from tests.conftest import RunningTool
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


@pytest.mark.kernel
@pytest.mark.root
@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_the_states_of_the_client(lab: Lab, run_tool: type[RunningTool], how: str) -> None:
    scenario = CloseOrder(how=how, pause_ms=200)
    scenario.setup(lab)
    with run_tool("states", "--netns", str(lab.client.inode)) as states:
        scenario.fault(lab)
        (client,) = scenario.settle(lab).clients
    assert states.done
    rows = states.done.rows
    path = ["CLOSE", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE"]
    assert [(row["old_state"], row["new_state"]) for row in rows] == list(itertools.pairwise(path))
    assert {(row["lport"], row["pid"]) for row in rows} == {(client.local_port, scenario.client.pid)}
    spent = {row["old_state"]: (row["in_state_us"] or 0) / 1e6 for row in rows}
    assert 0 < spent["SYN_SENT"] <= client.connect_seconds
    closing = spent["FIN_WAIT1"] + spent["FIN_WAIT2"]
    if how == "shutdown":  # the application waits in recv() until the server has closed
        assert client.finish_seconds is not None
        assert 0.2 <= closing <= client.finish_seconds
        assert spent["FIN_WAIT2"] > 0.1  # the ACK of the FIN may be a delayed one
    else:  # a timewait socket goes on
        assert closing < 0.2
