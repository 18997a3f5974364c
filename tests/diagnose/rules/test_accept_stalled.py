"""The rule about listeners that nobody accepts from: who hangs, who waits, how many gave up, and what helps."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tcpscope.diagnose import Finding, all_rules, causes, halted, process
from tcpscope.diagnose.listener_history import STALL_SECONDS, History
from tcpscope.diagnose.processes import Process
from tcpscope.diagnose.rules import accept_stalled
from tcpscope.listeners import Holder
from tests.diagnose.rules.connections import NOBODY
from tests.record import Script, Seen, Test, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import BACKLOG, DIAGNOSE, PORT, Run, findings, is_exact

STALL_US = 6_000_000
FULL = "TcpExtTCPToZeroWindowAdv"
LATE = 4
CLIENTS = 16


@recorded(DIAGNOSE)
def test_nobody_accepts_and_clients_are_refused(script: Script) -> Test:
    """One finding: the overflow is a symptom."""
    with script.older():
        run = Run(script)
        cookie = run.listener.cookie()
    run.overflow_at_ack(LATE)
    run.start(2)
    script.server.flush()
    run.client.pause(STALL_US)
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    facts, overflows = finding["facts"], run.change("ListenOverflows")
    assert (finding["rule"], finding["severity"]) == ("accept_stalled", "critical")
    assert facts["refused"] == overflows
    assert facts["count"] == facts["waiting"] == BACKLOG + 1
    assert (facts["pids"], facts["comm"], facts["cookie"]) == ([run.owner.pid], "server", cookie.ret)
    assert (facts["laddr"], facts["lport"]) == run.target
    assert (facts["accept_queue"], facts["accept_limit"], facts["limit_from"]) == (6, 5, "listen()")
    assert facts["accepts"] == 0
    assert facts["stalled_s"] >= STALL_SECONDS
    assert str(run.owner.pid) in finding["title"]
    assert f"TcpExtListenOverflows +{overflows}" in "".join(finding["observed"])
    if is_exact(seen):
        assert facts["at_syn"] + facts["at_ack"] == overflows
        assert facts["at_syn"] >= 2
        assert facts["at_ack"] >= LATE
        assert run.peer.ipv4 in "".join(finding["observed"])
    (remedy,) = finding["remedies"]
    assert f"-p {run.owner.pid} " in remedy["command"]
    assert remedy["proposed"] is None


@recorded(DIAGNOSE)
def test_a_stopped_worker_beside_one_that_accepts(script: Script) -> Test:
    """They share an address by SO_REUSEPORT: the kernel gives each its part."""
    with script.older():
        stopped, works = script.server.process("stopped"), script.server.process("works")
        stopped.listener(PORT, reuse_port=True, backlog=2 * CLIENTS)
        listener = works.listener(PORT, reuse_port=True, backlog=2 * CLIENTS)
        listener.blocking(False)
        stopped.kill(signal.SIGSTOP)
    client = script.client.process("client")
    clients = [client.socket() for _ in range(CLIENTS)]
    for made in clients:
        made.connect(script.server.ipv4, PORT)
    script.server.until_sockets(CLIENTS, field="recv_q", state="LISTEN", lport=PORT)
    accepted = [listener.accept(may_fail=True).accepted for _ in clients]
    for made in clients:
        made.close()
    client.pause(STALL_US)
    script.stay()
    seen = yield
    served = sum(call.errno == "none" for call in accepted)
    found = [f for f in seen.run(DIAGNOSE).summary["findings"] if f["facts"]["netns"] == script.server.inode]
    (finding,) = (f for f in found if f["rule"] == "accept_stalled")
    assert found == [finding]
    facts = finding["facts"]
    assert finding["severity"] == "critical"
    assert (facts["waiting"], facts["siblings_accepted"]) == (CLIENTS - served, served)
    assert facts["gave_up"] == CLIENTS - served
    assert (facts["sockets"], facts["stuck_sockets"], facts["stuck_pids"]) == (2, 1, [stopped.pid])
    assert facts["states"] == ["T"]
    assert finding["who"].startswith(f"stopped (PID {stopped.pid}")
    assert finding["remedies"][0]["command"] == f"kill -CONT {stopped.pid}"


@recorded(DIAGNOSE)
def test_a_stall_that_ends_is_told_with_its_time(script: Script) -> Test:
    with script.older():
        run = Run(script)
    run.fill(3)
    pause = run.owner.pause(STALL_US)
    run.accept(3)
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    facts = finding["facts"]
    assert (finding["rule"], facts["waiting"], facts["accepts"], facts["refused"]) == ("accept_stalled", 3, 3, 0)
    assert "were not accepted for" in finding["title"]
    assert facts["stalled_s"] >= STALL_SECONDS
    assert finding["remedies"] == []
    assert pause.took_us >= STALL_US


def stall(script: Script) -> None:
    """Nobody accepts three clients."""
    client = script.client.process("client")
    for _ in range(3):
        client.socket().connect(script.server.ipv4, PORT)
    client.pause(STALL_US)
    script.stay()


def stalled(seen: Seen, script: Script) -> dict[str, Any]:
    found = seen.run(DIAGNOSE).summary["findings"]
    (finding,) = (f for f in found if f["rule"] == "accept_stalled" and f["facts"]["netns"] == script.server.inode)
    return cast("dict[str, Any]", finding)


@recorded(DIAGNOSE)
def test_the_only_thread_waits_for_a_client_that_does_not_read(script: Script) -> Test:
    server = script.server.process("reports")
    listener = server.listener(PORT)
    reader = script.client.process("reader").socket()
    reader.connect(script.server.ipv4, PORT)
    served = listener.accept()
    before = script.client.counter(FULL)
    served.send_all(16 << 20, may_fail=True, wait=False)
    script.client.until_counter(FULL, before + 1)
    stall(script)
    seen = yield
    finding = stalled(seen, script)
    facts = finding["facts"]
    assert (facts["waits_in"], facts["waits_for"]) == ("send()", script.client.ipv4)
    assert facts["stuck_pids"] == [server.pid]
    remedy, other = finding["remedies"]
    assert f"reports waits in send() for {script.client.ipv4}" in remedy["what"]
    assert "Find out what else reports waits for" in other["what"]


@recorded(DIAGNOSE)
def test_the_only_thread_waits_for_connect(script: Script) -> Test:
    script.client.blackhole("198.51.100.0/24")
    server = script.server.process("front")
    server.listener(PORT)
    server.socket().start("198.51.100.7", 5432)
    stall(script)
    seen = yield
    facts = stalled(seen, script)["facts"]
    assert (facts["waits_in"], facts["waits_for"]) == ("connect()", "198.51.100.7:5432")


@pytest.mark.parametrize(
    ("row", "state", "threads", "children", "found"),
    [
        ({}, "S", 1, [], True),
        ({}, "S", 1, None, True),  # they cannot be read
        ({}, "S", 1, [Process(8, "child")], False),  # the connection may be the child's
        ({}, "S", 2, [], False),
        ({}, "R", 1, [], False),
        ({"memory": 666}, "S", 1, [], False),  # there is room
        ({"timer": "RETRANSMIT"}, "S", 1, [], False),
        ({"pid": 8}, "S", 1, [], False),
        ({"has_file": False}, "S", 1, [], False),
    ],
)
def test_what_holds_up_an_only_thread(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], state: str, threads: int, children: Any, found: bool
) -> None:
    monkeypatch.setattr(accept_stalled.processes, "threads", lambda pid: Counter({("S", None): threads}))
    monkeypatch.setattr(accept_stalled.processes, "children", lambda pid: children)
    full: dict[str, Any] = {
        "pid": 7, "has_file": True, "state": "ESTABLISHED", "timer": "ZERO_WINDOW", "unsent": 1, "memory": 667,
        "sndbuf": 1000, "role": "PASSIVE", "raddr": "192.0.2.1", "rport": 50000,
    }  # fmt: skip
    track = SimpleNamespace(last=SimpleNamespace(**full | row))
    seen: Any = SimpleNamespace(sockets=SimpleNamespace(now=[track]))
    assert (accept_stalled._wait(seen, Process(7, "reports", state)) is not None) == found


def watched(looks: Iterator[tuple[float, int, int, int]]) -> History:
    """Looks: their time, the accept queue's length, what was accepted, and which connection is at its head."""
    history = History(LISTENER, LISTENER)
    for now_s, length, accepts, head in looks:
        own = replace(LISTENER, accept_queue=length, accepts=accepts, head=(head, 0) if length else None)
        history.look(own, now_s)
    return history


@pytest.mark.parametrize(("looks", "stalled"), [(10, False), (11, True)])
def test_from_two_seconds_on_it_is_a_stall(looks: int, stalled: bool) -> None:
    history = watched((0.2 * look, 1, 0, 1) for look in range(looks))
    assert (history.stalled is not None) == stalled


def test_a_connection_that_waits_now_and_then_is_no_stall() -> None:
    assert watched((0.2 * look, look % 10 != 9, 0, 1) for look in range(100)).stalled is None


@pytest.mark.parametrize("head", [0, 1])
def test_accepts_and_a_new_head_show_that_it_goes_on(head: int) -> None:
    """Where accept() is not seen, as through io_uring on some kernels, the head alone shows it."""
    one_a_second = ((0.2 * look, 3, (1 - head) * (look // 5), head * (look // 5)) for look in range(100))
    assert watched(one_a_second).stalled is None


def test_an_application_that_takes_three_seconds_for_each_is_slow_and_not_stuck() -> None:
    history = watched((0.2 * look, 5, look // 15, look // 15) for look in range(200))
    assert history.stalled is None
    assert history.too_slow


def test_a_stall_that_ended_makes_no_slow_server() -> None:
    """Three connections wait six seconds, and then all are accepted."""
    waits = ((0.2 * look, 3, 0, 1) for look in range(30))
    history = watched(look for part in (waits, [(6.0, 2, 1, 2), (6.2, 0, 3, 0)]) for look in part)
    assert history.stalled is history.ended_stall is not None
    assert not history.too_slow


def test_a_busy_server_that_hangs_is_stuck_and_not_slow() -> None:
    busy = ((0.2 * look, look % 3, 40 * look, look) for look in range(1, 100))
    hangs = ((20 + 0.2 * look, 6, 4000, 1000) for look in range(20))
    history = watched(look for part in (busy, hangs) for look in part)
    assert history.stalled is history.stall is not None
    assert not history.too_slow


def test_only_what_a_stopped_server_does_not_read_is_its_symptom() -> None:
    """Not what else its process is found to do: its connect() to a dead database may be the cause."""
    rules = all_rules()
    history = watched((0.2 * look, 3, 0, 1) for look in range(30))
    history.last = replace(history.last, holders=(Holder(NOBODY, "api", 0, 5),))
    queues = SimpleNamespace(histories={1: history}, exact=True, counters=lambda listener: {})
    seen: Any = SimpleNamespace(queues=queues, sockets=SimpleNamespace(now=[]), ended=False)
    (stalled,) = accept_stalled.rule.check(seen)

    def of(rule: str, *about: tuple[Any, ...]) -> Finding:
        return Finding(rule, "critical", rule, [], "", [], {}, about=frozenset(about))

    connects, leak = of("connects_fail", process(NOBODY)), of("close_wait_leak", process(NOBODY))
    hangs, stopped = of("zero_window", process(NOBODY)), of("zero_window", process(NOBODY), halted(NOBODY))
    assert causes([stalled, connects], rules) == [stalled, connects]
    assert causes([stalled, leak], rules) == [stalled, leak]
    assert causes([stalled, hangs, stopped], rules) == [stalled, hangs]


@pytest.mark.parametrize(("opened", "limit", "is_full"), [(24, 24, True), (23, 24, False), (None, 24, False)])
def test_a_process_without_files_left(
    opened: int | None, limit: int, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept_stalled.processes, "files", lambda pid: opened)
    worker = Process(7, "proxy", state="S", open_files=limit)
    assert accept_stalled.without_files(worker) == is_full
    said = list(accept_stalled._states([worker]))
    assert any("all 24 files open" in line for line in said) == is_full


def test_the_limit_of_a_process_without_files_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd sets it: one number for both."""
    monkeypatch.setattr(accept_stalled.processes, "files", lambda pid: 65536)
    worker = Process(7, "nginx", state="S", unit="nginx.service", open_files=65536, open_files_hard=65536)
    (remedy,) = accept_stalled._remedies(History(LISTENER, LISTENER), [worker], [], 1)
    assert remedy.command == "prlimit --pid 7 --nofile=131072:131072"
    assert remedy.what.endswith("For the next start set LimitNOFILE=131072 in nginx.service.")
