"""Who is named, and what a command would change."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding, Remedy, paths, wording
from tcpscope.diagnose.listener_history import Burst, History
from tcpscope.diagnose.rules import accept_queue, accept_slow, syn_queue
from tcpscope.errors import ResourceError
from tcpscope.kernel import netns, pidns
from tcpscope.kernel.netns import Namespace, Visible
from tcpscope.listeners import Holder, Listener
from tests.test_sampling import LISTENER

MASTER, ONE, TWO = (Holder(pid, "gunicorn", 0, 5) for pid in (10, 11, 12))
PREFORK = replace(LISTENER, holders=(MASTER, ONE, TWO), parents=frozenset({1, 10}))
ELSEWHERE = replace(LISTENER, netns=1, holders=(ONE,))


@pytest.fixture(autouse=True)
def _looks_anew() -> None:
    wording._namespaces.cache_clear()


def of(listener: Listener, *, gone: bool = False) -> History:
    return History(listener, listener, full_seen=1, looks=1, gone=gone)


def remedies(listener: Listener, *, gone: bool = False) -> list[Remedy]:
    return list(accept_queue._remedies(of(listener, gone=gone)))


def test_workers_are_named_and_not_the_process_that_started_them() -> None:
    assert wording.whose(of(PREFORK)) == "gunicorn (PID 11 and 2 more)"
    stuck = remedies(PREFORK)[0].command
    assert stuck is not None
    assert "-p 11,12 " in stuck


def test_who_accepts_is_named_whatever_its_children() -> None:
    assert wording.whose(of(replace(PREFORK, accepter=10))) == "gunicorn (PID 10 and 2 more)"


def test_a_process_that_holds_two_descriptors_is_one() -> None:
    assert wording.whose(of(replace(LISTENER, holders=(ONE, Holder(11, "gunicorn", 0, 6))))) == "gunicorn (PID 11)"


def test_a_socket_of_systemd_is_changed_in_its_unit() -> None:
    systemd = Holder(1, "systemd", 0, 40)
    activated = replace(LISTENER, holders=(systemd, ONE), parents=frozenset({1}))
    assert wording.whose(of(activated)) == "gunicorn (PID 11 and 1 more)"
    stuck, backlog = remedies(activated)
    assert "/proc/1/" not in (stuck.command or "")
    assert (backlog.name, backlog.present) == ("Backlog=", 5)
    assert ".socket unit" in backlog.what
    assert [remedy.name for remedy in remedies(replace(activated, holders=(systemd,)))] == ["Backlog="]


def test_a_command_enters_the_namespace_by_a_process_that_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "visible", lambda: Visible({1: Namespace(1, "/run/netns/blue", "blue")}, 0))
    assert wording.in_namespace(of(replace(ELSEWHERE, inside=frozenset({11}))), "true") == "nsenter -t 11 -n true"
    assert wording.in_namespace(of(ELSEWHERE), "true") == "nsenter --net=/run/netns/blue true"


def test_without_privileges_the_name_tells_whether_the_number_is_that_of_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, name = os.getpid(), Path("/proc/self/comm").read_text().strip()
    inode = netns.inode_of("/proc/self/ns/net")
    assert wording.is_in(own, inode, "someone-else")
    assert not wording.is_in(own, inode + 1, name)

    def refuse(path: Any) -> int:
        if str(path) == "/proc/self/ns/net":
            return inode
        raise PermissionError(errno.EACCES, "not permitted", str(path))

    monkeypatch.setattr(netns, "inode_of", refuse)
    assert wording.is_in(own, inode, name)
    assert not wording.is_in(own, inode, "someone-else")
    assert not wording.is_in(own, inode, None)
    assert not wording.is_in(0x7FFFFFFF, inode, name)
    monkeypatch.setattr(netns, "visible", lambda: Visible({}, 0))
    assert paths.command(1, Counter({(own, "someone-else"): 1}), "true") is None
    assert paths.command(1, Counter({(own, name): 1}), "true") == f"nsenter -t {own} -n true"


def test_a_name_of_a_namespace_is_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "visible", lambda: Visible({1: Namespace(1, "/run/netns/a b;reboot", "a b;reboot")}, 0))
    assert wording.in_namespace(of(ELSEWHERE), "true") == "nsenter --net='/run/netns/a b;reboot' true"


def test_without_a_way_into_the_namespace_there_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Visible:
        raise ResourceError("cannot open /run/netns/a: Too many open files in system")

    for seen in (lambda: Visible({}, 0), lambda: Visible({1: Namespace(1, "/run/netns/\udcff")}, 0), full):
        wording._namespaces.cache_clear()
        monkeypatch.setattr(netns, "visible", seen)
        assert wording.in_namespace(of(ELSEWHERE), "true") is None
    own = netns.inode_of("/proc/self/ns/net")
    assert wording.in_namespace(of(replace(ELSEWHERE, netns=own)), "true") == "true"


def findings(module: Any, history: History) -> list[Finding]:
    """What one rule says of one listener."""
    queues = SimpleNamespace(histories={1: history}, troubled=[history], exact=True, counters=lambda listener: {})
    return list(module.rule.check(SimpleNamespace(queues=queues, ended=True)))


def proposed(history: History) -> list[str | int | None]:
    return [remedy.proposed for remedy in accept_queue._remedies(history) if remedy.proposed]


@pytest.mark.parametrize("seconds", [2, 6, 15])
def test_the_proposed_backlog_does_not_grow_with_the_time_watched(seconds: int) -> None:
    """Every second the same burst: 150 clients in one look, each refused twice. A queue of 5 lacks 150 places."""
    history = History(replace(LISTENER, accepts=0), replace(LISTENER, accepts=9 * seconds), looks=5 * seconds)
    for second in range(seconds):
        for port in 2 * list(range(150)):
            history.accept_burst.add(("192.0.2.1", 1000 * second + port))
        for _ in range(5):
            history.accept_burst.look()
    assert proposed(history) == [256]


@pytest.mark.parametrize("limit", [65534, 65535, 1 << 20])
def test_nothing_is_proposed_that_is_not_more(limit: int) -> None:
    """65535 is the most that is proposed."""
    history = of(replace(LISTENER, accept_limit=limit, somaxconn=limit, max_syn_backlog=limit))
    found = [*accept_queue._remedies(history), *syn_queue._remedies(history, 1, 1, 1)]
    numbers = [remedy.proposed for remedy in found if remedy.proposed is not None]
    assert numbers == ([65535] * 5 if limit < 65535 else [])


def test_where_clients_are_not_known_the_largest_sample_counts() -> None:
    history = History(replace(LISTENER, accepts=0), replace(LISTENER, accepts=9), looks=10)
    for _ in range(10):
        history.accept_burst.add_sampled(150)
        history.accept_burst.look()
    assert proposed(history) == [256]


def test_a_burst_that_goes_on_is_cut_after_a_second() -> None:
    burst = Burst()
    for port in range(100):
        burst.add(("192.0.2.1", port))
        burst.look()
    assert burst.most == 5


@pytest.mark.parametrize(("full", "slow"), [(4, False), (5, True), (10, True)])
def test_a_server_that_is_too_slow_gets_no_longer_queue(full: int, slow: bool) -> None:
    """It accepts ten a second, and its queue is full in so many of ten looks."""
    history = History(LISTENER, LISTENER, began=0.0)
    for look in range(1, 11):
        length = 6 if look == 1 or look > 11 - full else 0
        history.look(replace(LISTENER, accepts=2 * look, accept_queue=length, head=(look, 0)), 0.2 * look)
    assert history.too_slow == slow
    assert bool(findings(accept_queue, history)) != slow
    if slow:
        (found,) = findings(accept_slow, history)
        assert "10.0 connections a second" in found.observed[0]
        (remedy,) = found.remedies
        assert "500 ms to accept a full one of 5" in remedy.what
        assert remedy.proposed is None


def test_of_a_listener_that_is_gone_nothing_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its PIDs and the inode number of its namespace may be those of others now."""
    monkeypatch.setattr(netns, "visible", lambda: Visible({1: Namespace(1, "/run/netns/blue", "blue")}, 0))
    closed = replace(ELSEWHERE, inside=frozenset({11}), somaxconn=5)
    assert wording.whose(of(closed, gone=True)) == "gunicorn (PID 11), closed since"
    assert [(remedy.name, remedy.command) for remedy in remedies(closed, gone=True)] == [
        ("net.core.somaxconn", None),
        ("listen() backlog", None),
    ]


def test_in_a_pid_namespace_no_command_has_a_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have the PIDs of the first PID namespace: here they are those of others."""
    monkeypatch.setattr(pidns, "inner", lambda: 1)
    monkeypatch.setattr(netns, "visible", lambda: Visible({}, 0))
    assert [remedy.command for remedy in remedies(PREFORK)] == [None, None]
    assert wording.in_namespace(of(replace(ELSEWHERE, inside=frozenset({11}))), "true") is None
