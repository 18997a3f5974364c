"""Ten clients, a queue of five, nobody accepts: the outcome against the counters and sockets of the hosts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Outcome
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow
from tests.lab.families import KERNEL_FAMILIES


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def check_queue(outcome: Outcome) -> None:
    assert outcome.counters["TcpPassiveOpens"] == 6
    assert (outcome.listener.recv_q, outcome.listener.send_q) == (6, 5)
    waiting = [found for found in outcome.server_sockets if found.state == "CLOSE_WAIT"]
    assert [found.recv_q for found in waiting] == [11] * 6  # ten bytes and the FIN
    assert outcome.counters["TcpExtListenOverflows"] == outcome.counters["TcpExtListenDrops"]


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_frozen(lab: Lab, family: str) -> None:
    outcome = AcceptOverflow(family=family, synack_retries=5).run(lab, freeze=True)
    assert len(outcome.connected) == 10
    assert [client.finish_errno for client in outcome.clients] == [0] * 10
    check_queue(outcome)
    # Of each of the four that do not fit at least the last ACK, the data and the FIN were refused.
    assert outcome.counters["TcpExtListenOverflows"] >= 12
    assert outcome.server_states["SYN_RECV"] == 4
    # Nothing moves any more.
    assert lab.server.counters()["TcpExtListenOverflows"] == outcome.counters["TcpExtListenOverflows"]


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_until_the_end(lab: Lab, family: str) -> None:
    scenario = AcceptOverflow(family=family, synack_retries=5)
    scenario.setup(lab)
    scenario.fault(lab)
    lab.server.sysctl("tcp_synack_retries", 0)  # read when the timer of a request fires
    outcome = scenario.settle(lab)
    check_queue(outcome)
    assert outcome.server_states == {"LISTEN": 1, "CLOSE_WAIT": 6}
    assert outcome.client_states == {"FIN_WAIT2": 6}
    assert outcome.counters["TcpOutRsts"] == 4  # the kernel forgot them, and they came again


@pytest.mark.kernel
def test_reset_instead_of_silence(lab: Lab) -> None:
    outcome = AcceptOverflow(abort_on_overflow=1, synack_retries=5).run(lab)
    assert outcome.counters["TcpPassiveOpens"] == 6
    assert outcome.counters["TcpExtListenOverflows"] == 4
    assert outcome.counters["TcpExtEmbryonicRsts"] == 4
    assert outcome.counters["TcpOutRsts"] >= 4  # data that had left before is answered, too
    reset = [client for client in outcome.clients if client.errno or client.finish_errno]
    assert len(reset) <= 4  # the reset may come after the client has closed
    assert outcome.client_states == {"FIN_WAIT2": 6}


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("clients", "backlog", "fit"),
    [(3, 5, 3), (6, 5, 6), (7, 5, 6), (4, 2, 3)],
    ids=lambda number: str(number),
)
def test_a_queue_holds_one_more_than_its_limit(lab: Lab, clients: int, backlog: int, fit: int) -> None:
    outcome = AcceptOverflow(clients=clients, backlog=backlog, synack_retries=5).run(lab, freeze=True)
    assert outcome.counters["TcpPassiveOpens"] == fit
    assert (outcome.listener.recv_q, outcome.listener.send_q) == (fit, backlog)
    assert (outcome.counters["TcpExtListenOverflows"] > 0) == (clients > fit)


@pytest.mark.kernel
def test_more_clients_than_both_queues_hold(lab: Lab) -> None:
    outcome = AcceptOverflow(clients=4, backlog=1, synack_retries=5).run(lab, freeze=True)
    assert outcome.counters["TcpPassiveOpens"] == 2
    assert len(outcome.connected) == 2
    assert len(outcome.failed) == 2


@pytest.mark.kernel
def test_listener_is_described(lab: Lab) -> None:
    scenario = AcceptOverflow(clients=1)
    scenario.setup(lab)
    listener = scenario.outcome(lab).listener
    assert (listener.address, listener.port, listener.backlog) == (lab.server.ipv4, 8080, 5)
    assert listener.netns == lab.server.inode
    assert Path(f"/proc/{listener.pid}/comm").read_text().strip() == listener.comm
    assert Path(f"/proc/{listener.pid}/ns/net").stat().st_ino == listener.netns
    assert listener.cookie > 0
    # Nothing is wrong yet; the IPv6 of a new interface may still report its groups.
    assert [name for name in scenario.outcome(lab).counters if name.startswith("Tcp")] == []
    assert [step.host for step in scenario.steps] == ["server", "server", "server"]
