"""The rule about applications that accept too slowly: the rate, and no longer queue as a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tcpscope.diagnose import Finding, wording
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.processes import Process
from tcpscope.diagnose.rules import accept_slow
from tcpscope.listeners import Holder
from tests.record import Script, Test, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import BACKLOG, DIAGNOSE, Run, findings, is_exact, looks_are_rare

ACCEPTS = 16
PAUSE_US = 250_000
FILES = 64


@recorded(DIAGNOSE)
def test_a_queue_that_stays_full_while_it_accepts(script: Script) -> Test:
    with script.older():
        run = Run(script)
    for made in run.overflow_at_syn(2):
        run.give_up(made)
    for _ in range(ACCEPTS):
        run.owner.pause(PAUSE_US)
        run.accept(1)
        run.connect()
    run.accept(BACKLOG + 1)
    run.end()
    script.stay()
    seen = yield
    (finding,) = findings(seen, run)
    facts, overflows = finding["facts"], run.change("ListenOverflows")
    if looks_are_rare(seen) and finding["rule"] == "accept_queue":  # too few to tell a slow server from a burst
        assert facts["count"] == overflows
        return
    assert (finding["rule"], finding["severity"]) == ("accept_slow", "critical")
    assert facts["count"] == facts["refused"] == overflows
    assert facts["accepts"] == ACCEPTS + BACKLOG + 1
    assert 0 < facts["accepts_per_s"] < 1e6 / PAUSE_US + BACKLOG
    assert facts["pids"] == [run.owner.pid]
    assert str(run.owner.pid) in finding["who"]
    if is_exact(seen):
        assert facts["at_syn"] == overflows
    (remedy,) = finding["remedies"]
    assert remedy["proposed"] is None
    assert f"-p {run.owner.pid} " in remedy["command"]


@recorded(DIAGNOSE)
def test_a_server_that_accepts_only_what_it_has_closed(script: Script) -> Test:
    """It may have no more open files, and its clients come faster than others go."""
    with script.older():
        run = Run(script)
        script.server.exec("prlimit", "--pid", run.owner.made, f"--nofile={FILES}:")
        served = [run.owner.socket(may_fail=True) for _ in range(FILES)]
        refused = run.owner.socket(may_fail=True)
    for made in run.overflow_at_syn(2):
        run.give_up(made)
    for number in range(ACCEPTS):
        run.owner.pause(PAUSE_US)
        served[number].close()
        run.accept(1)
        run.connect()
    for each in served[ACCEPTS : ACCEPTS + 3 * (BACKLOG + 1)]:
        each.close()
    run.accept(BACKLOG + 1)
    run.end()
    script.stay()
    seen = yield
    assert refused.made.errno == "EMFILE"
    (finding,) = findings(seen, run)
    if looks_are_rare(seen) and finding["rule"] != "accept_slow":
        return
    assert (finding["rule"], finding["severity"]) == ("accept_slow", "critical")
    remedy = finding["remedies"][0]
    if not finding["facts"]["without_files"]:  # before 6.2 that needs a privilege
        assert remedy["name"] is None
        return
    assert finding["facts"]["without_files"] == [run.owner.pid]
    assert finding["observed"][0].startswith(f"server (PID {run.owner.pid}) had all {FILES} files open")
    assert finding["remedies"] == [remedy]
    assert (remedy["name"], remedy["present"], remedy["proposed"]) == ("RLIMIT_NOFILE", FILES, 2 * FILES)


def watched(lengths: Iterator[int], accepted: int) -> History:
    """A listener with limit 5, of which so many are accepted between two looks."""
    history = History(LISTENER, LISTENER)
    for look, length in enumerate(lengths):
        own = replace(LISTENER, accept_queue=length, accepts=accepted * look, head=(look, 0) if length else None)
        history.look(own, 0.2 * look)
    return history


@pytest.mark.parametrize(("nearly_full", "slow"), [((0,), False), ((0, 1), True)])
def test_it_is_slow_if_its_queue_is_nearly_full_in_half_of_the_looks(nearly_full: tuple[int, ...], slow: bool) -> None:
    """In one of three looks, or in two."""
    assert watched((6 if look % 3 in nearly_full else 0 for look in range(50)), 2).too_slow == slow


def test_a_burst_every_second_is_no_slow_server() -> None:
    assert not watched((6 if look % 5 == 0 else 0 for look in range(100)), 20).too_slow


@pytest.mark.parametrize(("length", "slow"), [(180, False), (220, True)])
def test_it_is_slow_if_connections_wait_a_second(length: int, slow: bool) -> None:
    """In a long queue: 200 are accepted in a second."""
    history = History(LISTENER, LISTENER)
    for look in range(100):
        own = replace(LISTENER, accept_queue=length, accept_limit=4096, accepts=40 * look, head=(look, 0))
        history.look(own, 0.2 * look)
    assert history.too_slow == slow


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """What the rule knows of the test before."""
    accept_slow.rule._full.clear()


def found(history: History, opened: dict[int, int | None], monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What is found of a listener whose processes have so many of 1,024 files open."""
    history.last = replace(history.last, holders=tuple(Holder(pid, "nginx", 0, 5) for pid in opened))
    monkeypatch.setattr(accept_slow.processes, "files", opened.get)
    read = lambda pid, comm: Process(pid, comm, "S", open_files=1024, open_files_hard=1024)  # noqa: E731
    monkeypatch.setattr(accept_slow.processes, "read", read)
    queues = SimpleNamespace(histories={1: history}, exact=True, counters=lambda listener: {})
    return list(accept_slow.rule.check(SimpleNamespace(queues=queues)))  # type: ignore[arg-type]


def slow(opened: dict[int, int | None], monkeypatch: pytest.MonkeyPatch) -> Finding:
    """What is found if its queue is full, too."""
    (finding,) = found(watched(iter([6] * 50), 2), opened, monkeypatch)
    return finding


MORE_WORKERS = "See what nginx does between two calls of accept()."


@pytest.mark.parametrize(
    ("opened", "words"),
    [
        (1024, "nginx (PID 7) has all 1,024 files open that it may (RLIMIT_NOFILE)"),
        (1004, "nginx (PID 7) has 1,004 of the 1,024 files open that it may (RLIMIT_NOFILE)"),
        (1003, None),
        (None, None),
    ],
)
def test_a_server_without_file_descriptors(
    monkeypatch: pytest.MonkeyPatch, opened: int | None, words: str | None
) -> None:
    """More workers are no remedy, and a slot is free now and then."""
    finding = slow({7: opened}, monkeypatch)
    (remedy,) = finding.remedies
    assert (finding.observed[0] == words) == ("no file descriptors left" in finding.title) == (words is not None)
    assert (finding.why == accept_slow.WHY_FILES) == (words is not None)
    assert remedy.what.startswith("Let nginx have more open files" if words else MORE_WORKERS)
    assert remedy.command == ("prlimit --pid 7 --nofile=2048:2048" if words else wording.states_of([7]))


def test_a_worker_without_file_descriptors_beside_one_that_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = slow({7: 1024, 8: 10}, monkeypatch)
    first, other = finding.remedies
    assert finding.facts["without_files"] == [7]
    assert first.command == "prlimit --pid 7 --nofile=2048:2048"
    assert other.what.startswith(MORE_WORKERS)
    assert finding.why == accept_slow.WHY


def test_a_server_that_had_no_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding names the cause as long as it says that the server is slow."""
    history = watched(iter([6] * 50), 2)
    (before,), (after,) = (found(history, {7: opened}, monkeypatch) for opened in (1024, 10))
    assert after.observed[0] == "nginx (PID 7) had all 1,024 files open that it may (RLIMIT_NOFILE)"
    assert (after.why, after.remedies) == (before.why, before.remedies)
    history.gone = True
    (after,) = found(history, {7: 10}, monkeypatch)
    assert [(remedy.name, remedy.command) for remedy in after.remedies] == [("RLIMIT_NOFILE", None)]
    assert not found(watched(iter([0] * 50), 2), {7: 10}, monkeypatch)
    assert slow({7: 10}, monkeypatch).why == accept_slow.WHY
