"""Who is named, and what a command would change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tcpscope.diagnose import Remedy, wording
from tcpscope.diagnose.queue_history import History
from tcpscope.diagnose.rules import accept_queue
from tcpscope.kernel import netns
from tcpscope.kernel.netns import Namespace, Visible
from tcpscope.listeners import Holder, Listener
from tests.test_sampling import LISTENER

MASTER, ONE, TWO = (Holder(pid, "gunicorn", 0, 5) for pid in (10, 11, 12))
PREFORK = replace(LISTENER, holders=(MASTER, ONE, TWO), parents=frozenset({1, 10}))
ELSEWHERE = replace(LISTENER, netns=1, holders=(ONE,))


def remedies(listener: Listener) -> list[Remedy]:
    return list(accept_queue._remedies(History(listener, listener, full_seen=1, looks=1), 1))


def test_workers_are_named_and_not_the_process_that_started_them() -> None:
    assert wording.whose(PREFORK) == "gunicorn (PID 11 and 2 more)"
    stuck = remedies(PREFORK)[0].command
    assert stuck is not None
    assert "-p 11,12 " in stuck
    assert "/proc/11/stack" in stuck


def test_who_accepts_is_named_whatever_its_children() -> None:
    assert wording.whose(replace(PREFORK, accepter=10)) == "gunicorn (PID 10 and 2 more)"


def test_a_process_that_holds_two_descriptors_is_one() -> None:
    assert wording.whose(replace(LISTENER, holders=(ONE, Holder(11, "gunicorn", 0, 6)))) == "gunicorn (PID 11)"


def test_a_socket_of_systemd_is_changed_in_its_unit() -> None:
    systemd = Holder(1, "systemd", 0, 40)
    activated = replace(LISTENER, holders=(systemd, ONE), parents=frozenset({1}))
    assert wording.whose(activated) == "gunicorn (PID 11 and 1 more)"
    stuck, backlog = remedies(activated)
    assert "/proc/1/" not in (stuck.command or "")
    assert (backlog.name, backlog.present) == ("Backlog=", 5)
    assert ".socket unit" in backlog.what
    assert [remedy.name for remedy in remedies(replace(activated, holders=(systemd,)))] == ["Backlog="]


def test_a_command_enters_the_namespace_by_a_process_that_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "visible", lambda: Visible({1: Namespace(1, "/run/netns/blue", "blue")}, 0))
    assert wording.in_namespace(replace(ELSEWHERE, inside=frozenset({11})), "true") == "nsenter -t 11 -n true"
    assert wording.in_namespace(ELSEWHERE, "true") == "nsenter --net=/run/netns/blue true"


def test_without_a_way_into_the_namespace_there_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "visible", lambda: Visible({}, 0))
    assert wording.in_namespace(ELSEWHERE, "true") is None
    own = netns.inode_of("/proc/self/ns/net")
    assert wording.in_namespace(replace(ELSEWHERE, netns=own), "true") == "true"
