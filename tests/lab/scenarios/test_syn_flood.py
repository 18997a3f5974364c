"""The SYN queue: what is dropped, what gets a cookie, for each value of tcp_syncookies."""

import shlex
import socket
import subprocess

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import PORT, Outcome
from tcpscope.lab.scenarios.syn_flood import SynFlood
from tests.conftest import RunningTool
from tests.lab.families import KERNEL_FAMILIES
from tests.lab.scenarios.found import diagnosed
from tests.played_again import seen

SYNS = 300  # more than the flood has addresses


def flood(family: str = "4", **parameters: int) -> Outcome:
    with Lab() as lab:
        outcome = SynFlood(family=family, **parameters).run(lab)
    assert outcome.counters["TcpInCsumErrors"] == 0
    assert outcome.counters["TcpPassiveOpens"] == 0
    assert outcome.counters["TcpInSegs"] == parameters["syns"]  # no RST, no ICMP comes back
    assert outcome.counters["TcpExtListenOverflows"] == 0
    return outcome


@pytest.mark.root
@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_without_cookies_syns_are_dropped(family: str) -> None:
    outcome = flood(family, syns=SYNS, backlog=3, syncookies=0)
    requests = outcome.server_states["SYN_RECV"]
    assert requests == 4  # a queue of three, full when it holds more than its limit; so few are not pruned
    assert outcome.counters["TcpExtTCPReqQFullDrop"] == SYNS - requests
    assert outcome.counters["TcpExtListenDrops"] == SYNS - requests
    assert outcome.counters["TcpExtTCPReqQFullDoCookies"] == 0


@pytest.mark.root
@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_cookies_when_full(family: str) -> None:
    outcome = flood(family, syns=SYNS, backlog=3, syncookies=1)
    requests = outcome.server_states["SYN_RECV"]
    assert requests == 4
    assert outcome.counters["TcpExtTCPReqQFullDoCookies"] == SYNS - requests
    assert outcome.counters["TcpExtSyncookiesSent"] == SYNS - requests
    assert outcome.counters["TcpExtTCPReqQFullDrop"] == outcome.counters["TcpExtListenDrops"] == 0


@pytest.mark.root
@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_cookies_always(family: str) -> None:
    outcome = flood(family, syns=20, syncookies=2)
    assert outcome.server_states["SYN_RECV"] == 0
    assert outcome.counters["TcpExtTCPReqQFullDoCookies"] == 20
    assert outcome.counters["TcpExtSyncookiesSent"] == 20


@pytest.mark.root
@seen
def test_diagnose_names_the_flood_and_not_the_full_queue(lab: Lab, run_tool: type[RunningTool]) -> None:
    outcome, found = diagnosed(SynFlood(repeats=2), lab, run_tool)
    (finding,) = found
    facts = finding["facts"]
    assert (finding["rule"], facts["kind"], facts["peers"]) == ("synack_unanswered", "flood", 6)
    assert facts["cookies"] == outcome.counters["TcpExtTCPReqQFullDoCookies"] == 64 - 6


@pytest.mark.root
@seen
def test_the_remedy_lets_clients_connect_in_a_flood(lab: Lab, run_tool: type[RunningTool]) -> None:
    scenario = SynFlood(syncookies=0, repeats=2)
    _, (finding,) = diagnosed(scenario, lab, run_tool)
    remedy = finding["remedies"][0]
    assert (remedy["name"], remedy["present"], remedy["proposed"]) == ("net.ipv4.tcp_syncookies", 0, 1)
    subprocess.run(shlex.split(remedy["command"]), check=True, capture_output=True)
    with lab.client.socket(socket.AF_INET) as client:
        client.settimeout(10)
        client.connect((lab.server.ipv4, PORT))
    assert lab.server.counters()["TcpExtSyncookiesRecv"] == 1


@pytest.mark.kernel
def test_last_quarter_is_kept_for_proven_peers() -> None:
    outcome = flood(syns=40, syncookies=0, backlog=64, max_syn_backlog=16)
    assert outcome.server_states["SYN_RECV"] == 13  # 16 - 13 is less than a quarter of 16
    assert outcome.counters["TcpExtListenDrops"] == 40 - 13
    assert outcome.counters["TcpExtTCPReqQFullDrop"] == 0  # the queue is not full
