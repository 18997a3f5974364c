"""What is remembered of a listener: it is another one when its cookie is, and so is a namespace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tcpscope.diagnose import queue_history, witness
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.witness import Witness, namespace_counters
from tcpscope.kernel import pidns
from tcpscope.listeners import Listener
from tcpscope.request import Request
from tcpscope.run import Batch
from tcpscope.sampling import Sampler
from tests.test_sampling import LISTENER, at

REFUSED = {("SYN", "ACCEPT_QUEUE_FULL"): 144}
YOUNG = replace(LISTENER, since_ns=1, refused={})


class Snapshots:
    """Gives out these snapshots, one at a time."""

    walked_s = 0.0

    def __init__(self, *each: list[Listener]) -> None:
        self._each = iter(each)

    def look(self, all_: bool = False, fresh: bool = False) -> list[Listener]:
        return next(self._each)


class Events:
    """Gives out so many refusals of YOUNG at each poll, and at the end."""

    def __init__(self, *each: int) -> None:
        self._each = iter(each)

    def poll(self) -> list[Batch]:
        return [Batch("event", [refusal(YOUNG, port) for port in range(next(self._each))])]

    end = poll


@pytest.fixture(autouse=True)
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, int]]]:
    """The counters that are in /proc, in the order in which they are read."""
    given: list[dict[str, int]] = []
    monkeypatch.setattr(witness, "namespace_counters", lambda group: given.pop(0) if given else {})
    yield given
    assert given == []


def seen(*each: list[Listener], exact: bool = True) -> QueueHistory:
    """The histories after these snapshots."""
    made = QueueHistory.__new__(QueueHistory)
    made.exact, made.histories, made._by_address, made._forgotten = exact, {}, {}, 0
    made._refused_before = 0
    made._witness, made._sampler, made._snapshots = Witness(), Sampler(), Snapshots(*each)  # type: ignore[assignment]
    for _ in each:
        made._look()
    return made


def refusal(listener: Listener, port: int = 1, cause: str = "ACCEPT_QUEUE_FULL") -> SimpleNamespace:
    """Its event."""
    names = ("netns", "lport", "laddr", "cookie", "accept_queue", "syn_queue")
    event = {name: getattr(listener, name) for name in names}
    return SimpleNamespace(**event, cause=cause, step="SYN", raddr="192.0.2.1", rport=port)


def numbers(seen: QueueHistory) -> list[int]:
    return [history.count("ACCEPT_QUEUE_FULL") for history in seen.histories.values()]


def test_counts_begin_anew_when_all_probes_are_there(read: list[dict[str, int]]) -> None:
    first, begins, later = (at(9, 9, 9, n, refused={("SYN", "ACCEPT_QUEUE_FULL"): n}) for n in (0, 4, 6))
    read += [{"ListenOverflows": n} for n in (100, 104, 106)]
    watched = seen([first])
    watched._snapshots = Snapshots([begins], [later])  # type: ignore[assignment]
    watched.run = Events(4)  # type: ignore[assignment]
    watched.begin()
    assert (watched.counts()["refusals"], watched.counters(begins)) == (0, {"ListenOverflows": 0})
    watched._look()
    assert (watched.counts()["refusals"], watched.counters(later)) == (2, {"ListenOverflows": 2})


def test_refusals_that_the_rules_look_at_no_more_are_still_counted() -> None:
    before, after = (at(9, 9, 9, drops, refused={("SYN", "ACCEPT_QUEUE_FULL"): drops}) for drops in (0, 4))
    watched = seen([before], [after])
    (history,) = watched.histories.values()
    history.first_s = history.last_s = 10.0
    assert watched.counts()["refusals"] == 4
    watched.forget(20.0)
    assert numbers(watched) == [0]
    assert watched.counts()["refusals"] == 4


@pytest.mark.parametrize(
    "later",
    [
        {"cookie": 2},
        {"cookie": None, "has_cookie": False, "since_ns": 2},
    ],
)
def test_a_later_listener_at_the_address_leaves_the_history_of_the_one_before(later: dict[str, Any]) -> None:
    one = replace(YOUNG, **later | {"cookie": later["cookie"] and 1, "since_ns": 1})
    found = seen([one], [replace(one, refused=REFUSED)], [replace(one, **later)], [replace(one, **later)])
    assert numbers(found) == [144, 0]
    assert found.counts() == {"listeners": 2, "refusals": 144}


def test_a_cookie_that_a_socket_gets_late_makes_no_other_listener() -> None:
    one = replace(YOUNG, cookie=None, has_cookie=False)
    assert numbers(seen([one], [replace(one, cookie=7, refused=REFUSED)])) == [144]


def test_of_listeners_that_are_gone_only_those_with_something_to_report_are_kept() -> None:
    found = seen(*([replace(YOUNG, cookie=n)] for n in range(50)))
    assert len(found.histories) <= 3
    assert found.counts() == {"listeners": 50, "refusals": 0}


def test_the_last_refusals_of_a_listener_are_in_its_events() -> None:
    history = History(YOUNG, replace(YOUNG, refused=REFUSED))
    history.events.update({("SYN", "ACCEPT_QUEUE_FULL"): 150, ("ACK", "ACCEPT_QUEUE_FULL"): 1})
    assert history.count("ACCEPT_QUEUE_FULL") == 151


def events_of(seen: QueueHistory) -> list[int]:
    return [history.events.total() for history in seen.histories.values()]


@pytest.mark.parametrize("cookie", [None, 7])
def test_without_cookies_an_event_is_of_the_listener_that_still_listens(cookie: int | None) -> None:
    """A server was restarted. Its second socket gets a cookie late."""
    one = replace(YOUNG, cookie=None, has_cookie=False, refused=REFUSED)
    two = replace(one, since_ns=2)
    found = seen([one], [two])
    found._drain([Batch("event", [refusal(replace(two, cookie=cookie))])])
    assert events_of(found) == [0, 1]


def test_without_cookies_an_event_of_listeners_that_are_gone_is_of_the_newest() -> None:
    one = replace(YOUNG, cookie=None, has_cookie=False, refused=REFUSED)
    found = seen([one], [replace(one, since_ns=2)], [])
    found._drain([Batch("event", [refusal(one)])])
    assert events_of(found) == [0, 1]


def test_an_event_is_of_the_listener_with_its_cookie() -> None:
    """It is gone, and another one listens there."""
    one = replace(YOUNG, has_cookie=False, cookie=7, refused=REFUSED)
    found = seen([one], [replace(one, cookie=None, since_ns=2)])
    found._drain([Batch("event", [refusal(one)])])
    assert events_of(found) == [1, 0]


@pytest.mark.parametrize(
    "looks",
    [
        [at(0, 0, 0, 0)] * 3,
        [at(0, 0, 0, 0), at(5, 0, 0, 0), at(5, 0, 0, 0)],
        [replace(LISTENER, syn_queue=3)] * 3,
        [replace(LISTENER, accept_queue=LISTENER.accept_limit + 1, head=(1, 1))] * 3,
        [replace(LISTENER, accept_queue=1, head=(1, 1)), *[LISTENER] * 30],
    ],
)
def test_the_same_object_again_is_one_look_more(looks: list[Listener]) -> None:
    """It costs less than an equal one, and comes to the same."""
    same, equal = (History(looks[0], looks[0], began=0.0) for _ in range(2))
    for number, listener in enumerate(looks):
        if number == 1:
            same.syn_burst.add(("127.0.0.1", 1))
            equal.syn_burst.add(("127.0.0.1", 1))
        same.look(listener, number / 5)
        equal.look(replace(listener), number / 5)
    assert same == equal


@pytest.mark.parametrize(("before", "after"), [(50, 30), (0, 30), (50, 0)])
def test_a_listener_that_begins_and_ends_between_looks(before: int, after: int) -> None:
    """It refuses `before` its first look, and `after` its last one."""
    found = seen([])
    born = replace(YOUNG, refused={("SYN", "ACCEPT_QUEUE_FULL"): before})
    found._snapshots = Snapshots([born], [], [])  # type: ignore[assignment]
    found.run = Events(before, after, 0, 0)  # type: ignore[assignment]
    found.poll()
    found.poll()
    found.end()
    assert numbers(found) == [before + after]


def test_the_last_refusals_come_with_the_end() -> None:
    found = seen([])
    found._snapshots = Snapshots([replace(YOUNG, refused=REFUSED)])  # type: ignore[assignment]
    found.run = Events(144, 6)  # type: ignore[assignment]
    found.end()
    assert numbers(found) == [150]


def test_clients_of_a_burst_are_counted_once_each() -> None:
    """Two clients are refused, each twice."""
    found = seen([YOUNG], [YOUNG])
    found._drain([Batch("event", [refusal(YOUNG, port) for port in (1, 2, 1, 2)])])
    (history,) = found.histories.values()
    assert history.accept_burst.most == 2
    assert history.syn_burst.most == 0
    assert numbers(found) == [4]


@pytest.mark.parametrize("cause", ["OTHER", "UNKNOWN"])
def test_what_no_queue_is_known_to_have_refused_is_a_burst_of_none(cause: str) -> None:
    found = seen([YOUNG])
    found._drain([Batch("event", [refusal(YOUNG, cause=cause)])])
    (history,) = found.histories.values()
    assert history.events.total() == 1
    assert (history.accept_burst.most, history.syn_burst.most) == (0, 0)


def test_what_no_queue_is_known_to_have_refused_is_no_burst_where_it_is_sampled() -> None:
    found = seen([at(0, 0, 0, 0)], [at(50, 50, 0, 0)], exact=False)
    (history,) = found.histories.values()
    assert history.count("OTHER") == 50
    assert (history.accept_burst.most, history.syn_burst.most) == (0, 0)


def test_counters_begin_at_zero_if_the_listener_is_the_first_of_its_namespace(read: list[dict[str, int]]) -> None:
    read += [{"ListenOverflows": 7, "ListenDrops": 7}, {"ListenOverflows": 9, "ListenDrops": 9}]
    one = replace(YOUNG, drops=7)
    found = seen([one], [replace(one, drops=9)])
    assert found.counters(one) == {"ListenOverflows": 9, "ListenDrops": 9}


def test_counters_that_are_older_than_the_listener_are_not_shown(read: list[dict[str, int]]) -> None:
    read += [{"ListenOverflows": 8, "ListenDrops": 8}]
    assert seen([replace(YOUNG, drops=7)]).counters(YOUNG) == {}


@pytest.mark.parametrize("cookies", [(1, 2), (None, None)])
def test_counters_of_a_namespace_are_never_compared_with_those_of_another(
    read: list[dict[str, int]], cookies: tuple[int | None, int | None]
) -> None:
    """The kernel gives the inode number of a namespace that is gone to the next one."""
    read += [{"ListenOverflows": 49}, {"ListenOverflows": 2}]
    old = replace(LISTENER, drops=49, net_cookie=cookies[0])
    new = replace(YOUNG, cookie=2, drops=2, net_cookie=cookies[1])
    found = seen([old], [new])
    assert found.counters(new) == {"ListenOverflows": 2}


def test_counters_are_read_when_something_was_refused(read: list[dict[str, int]]) -> None:
    read += [{"ListenOverflows": 0}, {"ListenOverflows": 5}]
    group = [replace(LISTENER, socket=n, cookie=n, refused={}) for n in range(3)]
    later = [*group[:2], replace(group[2], refused=REFUSED)]
    assert seen(group, group, later, later).counters(LISTENER) == {"ListenOverflows": 5}


def test_in_a_pid_namespace_no_counters_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder has the PID of the first PID namespace: here it is that of another process."""
    group = [replace(LISTENER, inside=frozenset({os.getpid()}))]
    monkeypatch.setattr(pidns, "inner", lambda: 0)
    assert "ListenDrops" in namespace_counters(group)
    monkeypatch.setattr(pidns, "inner", lambda: 1)
    assert namespace_counters(group) == {}


def test_if_the_first_look_fails_the_session_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    session = MagicMock()
    monkeypatch.setattr(queue_history.listeners, "open_session", lambda *args, **options: session)
    monkeypatch.setattr(queue_history.listeners, "why_sampled", lambda session: None)
    monkeypatch.setattr(queue_history, "Snapshots", lambda session: Snapshots())
    with pytest.raises(StopIteration):  # there is no snapshot
        QueueHistory(Request())
    session.close.assert_called_once()
