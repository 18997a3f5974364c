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
from tcpscope.diagnose.rules.worker_hangs import LEAST, WAIT_SECONDS, rule
from tcpscope.diagnose.sockets import Track
from tcpscope.filters import Filter
from tcpscope.listeners import Holder
from tests.diagnose.rules.connections import NOBODY, connection, findings
from tests.diagnose.rules.endings import attempts, groups
from tests.record import Script, Test, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import DIAGNOSE

PORT = 9511
WAITING = LEAST + 1
LONG_US = 16_000_000
SLOW_US = 3_500_000


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


@recorded(DIAGNOSE)
def test_a_worker_that_hangs_while_its_clients_wait(script: Script) -> Test:
    """Connections are still accepted, and none is read."""
    server, client = script.server.process("api"), script.client.process("web")
    listener = server.listener(PORT)
    for _ in range(WAITING):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        near.send("request")
        far.until_received(len("request"))
    server.pause(LONG_US)
    unread = script.server.diag("recv_q", state="ESTABLISHED", lport=PORT)
    script.stay()
    seen = yield
    (finding,) = findings(seen, script)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("worker_hangs", "warning")
    assert (facts["netns"], facts["pid"], facts["comm"]) == (script.server.inode, server.pid, "api")
    assert (facts["count"], facts["waiting"], facts["left"]) == (WAITING, WAITING, 0)
    assert facts["unread_bytes"] == WAITING * len("request") == unread.ret
    assert facts["wait_s"] >= WAIT_SECONDS
    assert f"{WAITING} clients" in finding["title"]
    assert finding["remedies"][0]["command"].startswith(f"ps -L -p {server.pid} ")


@recorded(DIAGNOSE)
def test_a_worker_that_is_slow_does_not_hang(script: Script) -> Test:
    """It serves one client after the other, and the rest waits for its turn."""
    server, client = script.server.process("api"), script.client.process("web")
    listener = server.listener(PORT)
    ends = []
    for _ in range(2 * WAITING):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        ends.append((near, listener.accept()))
        near.send("request")
    for near, far in ends[:WAITING]:
        pause = server.pause(SLOW_US)
        far.receive()
        far.send("answer")
        near.receive()
    for _, far in ends[WAITING:]:
        far.receive()
    for near, far in ends:
        near.close()
        far.close()
    script.stay()
    seen = yield
    assert WAITING * pause.took_us >= WAIT_SECONDS * 1e6
    assert findings(seen, script) == []


LEFT = {
    "state": "CLOSE_WAIT", "role": "PASSIVE", "has_fin": True, "unread": 101, "received_bytes": 100,
    "since_received_us": 6_000_000, "since_sent_us": 6_000_000, "since_ack_us": 6_000_000, "lport": 80,
}  # fmt: skip
WORKS = {"unread": 0, "received_bytes": 100, "since_received_us": 100_000, "since_sent_us": 9_000_000}


WAITS = {
    "state": "ESTABLISHED", "role": "PASSIVE", "has_fin": False, "unread": 500, "received_bytes": 500,
    "since_received_us": 25_000_000, "lport": 80,
}  # fmt: skip


def track(looks: int = 4, **values: Any) -> Track:
    """In so many looks, one each second."""
    made = None
    for second in range(looks):
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


def waits(looks: int = 12, **values: Any) -> Track:
    """A client that is still there. From the second look on it is known that nothing was read."""
    return track(looks, **WAITS | values)


def check(
    *tracks: Track,
    connects_s: float | None = None,
    listens: History | None = None,
    watched_s: float = 60.0,
    filter: Filter = Filter(),  # noqa: B008 (it is frozen)
    now_s: float = 100.0,
) -> list[Finding]:
    found = groups((attempts(1, netns=1, pid=NOBODY)[0], 1), seconds=0.0) if connects_s is not None else groups()
    seen: Any = SimpleNamespace(
        sockets=SimpleNamespace(now=list(tracks)),
        attempts=found,
        now_s=now_s + (connects_s or 0.0),
        watched_s=watched_s,
        request=SimpleNamespace(filter=filter),
    )
    if listens:
        seen.queues = SimpleNamespace(histories={1: listens})
    rule.name = "worker_hangs"
    return list(rule.check(seen))


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """What the rule knows of the test before."""
    rule._worked.clear()


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


@pytest.mark.parametrize(
    ("number", "looks", "values", "found"),
    [
        (LEAST, 12, {}, True),
        (LEAST - 1, 12, {}, False),
        (LEAST, 11, {}, False),  # not for ten seconds
        (LEAST, 12, {"role": "ACTIVE"}, False),
        (LEAST, 12, {"has_file": False}, False),  # not accepted
        (LEAST, 12, {"unread": 0}, False),
        (LEAST, 12, {"since_received_us": 61_000_000}, False),  # nobody has asked since the watch began
        (LEAST, 12, {"sent_bytes": 10, "since_sent_us": 9_900_000}, False),
        (LEAST, 12, {"sent_bytes": 10, "since_sent_us": 10_000_000}, True),
        (LEAST, 12, {"unacked": 10}, False),
        (LEAST, 12, {"unsent": 10}, False),
    ],
)
def test_clients_that_still_wait(number: int, looks: int, values: dict[str, Any], found: bool) -> None:
    findings = check(*(waits(looks, **values) for _ in range(number)))
    assert [finding.severity for finding in findings] == ["warning"] * found


@pytest.mark.parametrize(("values", "found"), [({"unacked": 1}, False), ({"unacked": 1, "has_file": False}, True)])
def test_a_proxy_waits_for_another_one(values: dict[str, Any], found: bool) -> None:
    """Connections that the process itself has closed keep no client waiting."""
    backend = track(state="ESTABLISHED", role="ACTIVE", has_fin=False, unread=0, lport=40000, **values)
    backend.last.since_received_us = 20_000_000
    assert bool(check(*(waits() for _ in range(LEAST)), backend)) == found


@pytest.mark.parametrize(("ago_s", "found"), [(9.0, False), (11.0, True)])
def test_what_is_served_between_two_looks_counts_for_ten_seconds(ago_s: float, found: bool) -> None:
    """A server that is only slow answers one client now and then, and the next look does not find that one."""
    served = track(state="ESTABLISHED", has_fin=False, **WORKS | {"since_received_us": 0})
    clients = [waits() for _ in range(LEAST)]
    assert not check(*clients, served)
    assert bool(check(*clients, now_s=100.0 + ago_s)) == found
    assert not rule._worked or not found


@pytest.mark.parametrize(("ago_s", "found"), [(9.0, False), (11.0, True)])
def test_a_process_that_connects_does_not_hang_though_clients_wait(ago_s: float, found: bool) -> None:
    assert bool(check(*(waits() for _ in range(LEAST)), connects_s=ago_s)) == found


def test_a_process_that_waits_for_events_does_not_want_to_read(states: Counter[Any]) -> None:
    del states["S", "futex_wait_queue"]
    assert not check(*(waits() for _ in range(LEAST)))


def test_children_may_have_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_hangs.processes, "files", lambda pid: LEAST - 1)
    assert not check(*(waits() for _ in range(LEAST)))


def test_it_says_who_waits_and_for_how_long() -> None:
    newer = waits(2, since_received_us=1_000_000)
    (finding,) = check(*(waits() for _ in range(LEAST)), newer)
    assert finding.title == f"app (PID {NOBODY}) hangs: it reads nothing from {LEAST + 1} clients"
    words = f"{LEAST + 1} clients wait for an answer, with 3,000 unread bytes; the oldest has waited for 25 s"
    assert finding.observed[0] == words
    assert (finding.facts["waiting"], finding.facts["left"], finding.facts["unread_bytes"]) == (LEAST + 1, 0, 3000)


def test_some_have_given_up_and_some_still_wait() -> None:
    """Neither would be enough."""
    (finding,) = check(*(waits() for _ in range(LEAST - 1)), track())
    assert finding.severity == "critical"
    assert finding.title.endswith(f"it reads nothing from {LEAST} clients")
    assert finding.observed[0].startswith("1 connection whose clients have gone, with 100 unread bytes;")
    assert finding.observed[1] == f"{LEAST - 1} clients more still wait: their data is not read either"
