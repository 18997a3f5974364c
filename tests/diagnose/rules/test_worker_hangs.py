"""A hung worker leaves connections in CLOSE_WAIT as a program that forgets to close does; but it does nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding, causes, processes
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.rules import close_wait_leak, worker_hangs
from tcpscope.diagnose.rules.worker_hangs import LEAST, rule
from tcpscope.diagnose.sockets import Track
from tcpscope.filters import Filter
from tcpscope.listeners import Holder
from tests.diagnose.rules.connections import NOBODY, connection, findings
from tests.diagnose.rules.endings import attempts, groups
from tests.record import Script, Test, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import DIAGNOSE

PORT = 9511


@recorded(DIAGNOSE)
def test_a_worker_that_hangs(script: Script) -> Test:
    """More clients give up than a leak needs."""
    server, client = script.server.process("api"), script.client.process("web")
    listener = server.listener(PORT)
    for _ in range(close_wait_leak.LEAST + 2):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        near.send("request")
        near.close()
        far.until_state("CLOSE_WAIT")
    server.pause(12_500_000)
    left = script.server.diag(state="CLOSE_WAIT", lport=PORT)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("worker_hangs", "critical")
    assert (facts["netns"], facts["pid"], facts["comm"]) == (script.server.inode, server.pid, "api")
    assert facts["count"] == facts["left"] == left.ret == close_wait_leak.LEAST + 2
    assert facts["unread_bytes"] == left.ret * len("request")
    assert facts["threads"][0]["state"] == "S"
    assert any(line.startswith("its threads: 1 in state S") for line in finding["observed"])
    assert finding["remedies"][0]["command"].startswith(f"ps -L -p {server.pid} ")


LEFT = {
    "state": "CLOSE_WAIT", "role": "PASSIVE", "has_fin": True, "unread": 101, "received_bytes": 100,
    "since_received_us": 6_000_000, "since_sent_us": 6_000_000, "since_ack_us": 6_000_000, "lport": 80,
}  # fmt: skip
WORKS = {"unread": 0, "received_bytes": 100, "since_received_us": 100_000, "since_sent_us": 9_000_000}


def track(**values: Any) -> Track:
    """In four looks, one each second."""
    made = None
    for second in range(4):
        row = connection(**LEFT | values)
        made = made or Track(row, row, 100.0, 100.0)
        made._look(row, 100.0 + second, rule.marks | close_wait_leak.rule.marks)
    assert made
    return made


def listener(accepted: int, pids: tuple[int, ...] = (NOBODY,)) -> History:
    """So many accepted since it began; these processes hold it."""
    holders = tuple(Holder(pid, "app", 0, fd=3) for pid in pids)
    history = History(LISTENER, LISTENER)
    for now_s, accepts in ((90.0, 7), (100.0, 7 + accepted)):
        history.look(replace(LISTENER, netns=1, lport=80, accepts=accepts, holders=holders), now_s)
    return history


def check(
    *tracks: Track,
    connects_s: float | None = None,
    listens: History | None = None,
    watched_s: float = 60.0,
    filter: Filter = Filter(),  # noqa: B008 (it is frozen)
) -> list[Finding]:
    found = groups((attempts(1, netns=1, pid=NOBODY)[0], 1), seconds=0.0) if connects_s is not None else groups()
    seen: Any = SimpleNamespace(
        sockets=SimpleNamespace(now=list(tracks)),
        attempts=found,
        now_s=100.0 + (connects_s or 0.0),
        watched_s=watched_s,
        request=SimpleNamespace(filter=filter),
    )
    if listens:
        seen.queues = SimpleNamespace(histories={1: listens})
    rule.name = "worker_hangs"
    return list(rule.check(seen))


@pytest.fixture(autouse=True)
def states(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    found: Counter[Any] = Counter({("S", "futex_wait_queue"): 4, ("S", "ep_poll"): 1})
    monkeypatch.setattr(worker_hangs.processes, "threads", lambda pid: found)
    monkeypatch.setattr(worker_hangs.processes, "read", lambda pid, comm: processes.Process(pid, comm, "S"))
    return found


@pytest.mark.parametrize(
    ("number", "values", "found"),
    [
        (LEAST, {}, True),
        (LEAST - 1, {}, False),
        (LEAST, {"unread": 1}, False),  # it has read all but the FIN
        (LEAST, {"since_received_us": 4_900_000}, False),
        (LEAST, {"state": "ESTABLISHED", "has_fin": False, "unread": 100}, False),  # the clients are still there
        (LEAST, {"has_file": False}, False),  # not accepted
    ],
)
def test_thresholds(number: int, values: dict[str, Any], found: bool) -> None:
    assert bool(check(*(track(**values) for _ in range(number)))) == found


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (WORKS, False),
        (WORKS | {"since_received_us": 9_000_000}, True),  # idle for as long
        (WORKS | {"sent_bytes": 10, "since_sent_us": 100_000, "since_received_us": 9_000_000}, False),
        (LEFT | {"state": "ESTABLISHED", "has_fin": False, "unread": 10, "since_received_us": 100_000}, True),
    ],
)
def test_a_process_that_works_on_other_connections_has_forgotten_these(columns: dict[str, Any], found: bool) -> None:
    other = track(**{"state": "ESTABLISHED", "has_fin": False} | columns)
    assert bool(check(*(track() for _ in range(LEAST)), other)) == found


def test_a_process_that_nobody_has_asked_meanwhile_may_be_idle() -> None:
    assert not check(*(track() for _ in range(LEAST)), watched_s=5.0)
    asks = track(state="ESTABLISHED", has_fin=False, unread=10, since_received_us=1_000_000)
    assert check(*(track() for _ in range(LEAST)), asks, watched_s=5.0)


def test_with_a_filter_of_ends_the_other_connections_are_not_known() -> None:
    assert not check(*(track() for _ in range(LEAST)), filter=Filter.from_options(raddr="192.0.2.1"))
    assert check(*(track() for _ in range(LEAST)), filter=Filter(pid=(NOBODY,)))


@pytest.mark.parametrize(("ago_s", "found"), [(1.0, False), (6.0, True)])
def test_a_process_that_connects_works(ago_s: float, found: bool) -> None:
    assert bool(check(*(track() for _ in range(LEAST)), connects_s=ago_s)) == found


@pytest.mark.parametrize(
    ("accepted", "pids", "opened_s", "found"),
    [
        (LEAST, (NOBODY,), 10.0, False),  # these are older
        (LEAST - 1, (NOBODY,), 10.0, True),
        (2 * LEAST - 1, (NOBODY,), 97.0, True),  # these are of them
        (2 * LEAST, (NOBODY,), 97.0, False),
        (2 * LEAST, (NOBODY, NOBODY - 1), 97.0, True),  # the other one may have accepted them
    ],
)
def test_a_process_that_closes_what_it_has_accepted_works(
    accepted: int, pids: tuple[int, ...], opened_s: float, found: bool
) -> None:
    left = [track(opened_ns=round(opened_s * 1e9)) for _ in range(LEAST)]
    assert bool(check(*left, listens=listener(accepted, pids))) == found


@pytest.mark.parametrize(("files", "found"), [(LEAST, True), (LEAST - 1, False), (None, True)])
def test_a_process_that_cannot_have_them(monkeypatch: pytest.MonkeyPatch, files: int | None, found: bool) -> None:
    monkeypatch.setattr(worker_hangs.processes, "files", lambda pid: files)
    assert bool(check(*(track() for _ in range(LEAST)))) == found


def test_a_process_that_waits_for_events_has_forgotten_them(states: Counter[Any]) -> None:
    del states["S", "futex_wait_queue"]
    assert not check(*(track() for _ in range(LEAST)))
    states.clear()  # not known
    assert check(*(track() for _ in range(LEAST)))


def test_it_says_what_the_threads_do_and_who_else_waits() -> None:
    waits = track(state="ESTABLISHED", has_fin=False, unread=10, since_received_us=1_000_000)
    (finding,) = check(*(track() for _ in range(LEAST)), waits)
    assert "its threads: 4 in state S in futex_wait_queue, 1 in state S in ep_poll" in finding.observed
    assert (finding.facts["left"], finding.facts["waiting"]) == (LEAST, 1)


def test_it_explains_what_it_leaves_in_close_wait() -> None:
    (finding,) = check(*(track() for _ in range(LEAST)))
    leak = Finding("close_wait_leak", "warning", "", [], "", [], {}, about=frozenset({("process", NOBODY)}))
    close_wait_leak.rule.name = "close_wait_leak"
    assert causes([leak, finding], [rule, close_wait_leak.rule]) == [finding]
