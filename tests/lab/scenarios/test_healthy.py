"""Traffic without a fault: each case does what it says, by the kernel's counters."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Outcome
from tcpscope.lab.scenarios.healthy import CASES, Healthy

Done = dict[str, int]


def opened(outcome: Outcome) -> int:
    return outcome.client_counters["TcpActiveOpens"]


def web_server(done: Done, outcome: Outcome) -> None:
    assert done["answers"] == 10 * done["connected"] == 10 * outcome.counters["TcpPassiveOpens"]


def short_connections(done: Done, outcome: Outcome) -> None:
    assert done["answers"] == done["connected"] == outcome.counters["TcpPassiveOpens"] > 20
    assert outcome.server_states["TIME_WAIT"] > 0 == outcome.client_states["TIME_WAIT"]


def time_wait(done: Done, outcome: Outcome) -> None:
    assert outcome.client_states["TIME_WAIT"] == done["connected"] == done["answers"] > 20


def bulk(done: Done, outcome: Outcome) -> None:
    assert done["connected"] == outcome.counters["TcpPassiveOpens"] == 1
    assert done["bytes"] > 1 << 20


def lossy_path(done: Done, outcome: Outcome) -> None:
    lost = outcome.client_counters["TcpRetransSegs"]
    segments = outcome.client_counters["TcpOutSegs"]
    assert 1 <= segments // 1001 <= lost <= segments // 100  # a busy machine loses some more
    assert done["bytes"] > 1_500_000


def idle(done: Done, outcome: Outcome) -> None:
    assert done["answers"] == done["connected"] == outcome.counters["TcpPassiveOpens"] == 50
    assert outcome.client_states["TIME_WAIT"] == 50


def half_closed(done: Done, outcome: Outcome) -> None:
    assert done["connected"] == outcome.counters["TcpPassiveOpens"] == 20
    assert done["answers"] == 20 * 20  # all of them after the client's FIN


def health_check(done: Done, outcome: Outcome) -> None:
    assert done == {"refused": 1}
    assert outcome.client_counters["TcpAttemptFails"] == outcome.counters["TcpOutRsts"] == 1


def port_scan(done: Done, outcome: Outcome) -> None:
    assert done == {"refused": 999, "connected": 1}
    assert outcome.client_counters["TcpAttemptFails"] == outcome.counters["TcpOutRsts"] == 999


def restart(done: Done, outcome: Outcome) -> None:
    assert opened(outcome) == done["connected"] + done.get("refused", 0)
    assert outcome.client_counters["TcpAttemptFails"] == done.get("refused", 0)
    assert outcome.counters["TcpExtTW"] > 0  # a server that restarts closes first


SHOWN: dict[str, Callable[[Done, Outcome], None]] = {
    "web-server": web_server,
    "short-connections": short_connections,
    "bulk": bulk,
    "lossy-path": lossy_path,
    "idle": idle,
    "half-closed": half_closed,
    "health-check": health_check,
    "port-scan": port_scan,
    "time-wait": time_wait,
    "restart": restart,
}


@pytest.mark.root
@pytest.mark.parametrize("case", CASES)
def test_it_does_what_it_says(case: str) -> None:
    scenario = Healthy(case=case, seconds=0.5)
    with Lab() as lab:
        outcome = scenario.run(lab)
    SHOWN[case](scenario.done, outcome)
    assert opened(outcome) == scenario.done.get("connected", 0) + scenario.done.get("refused", 0)
