"""The engine, over rules that find what they are told to: when it tells a finding, when it ends, what explains it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tcpscope.diagnose import Finding, Rule, causes, ordered, peer, watching
from tcpscope.diagnose.watching import QUIET_SECONDS, SETTLE_SECONDS, WINDOW_SECONDS, Watch

PEER, OTHER = peer(1, "192.0.2.1"), peer(1, "192.0.2.2")


def finding(rule: str, about: Any = PEER, **more: Any) -> Finding:
    facts = {"count": 1}
    return Finding(rule, "warning", rule, [], "", [], facts, about=frozenset({about}), **more)


class Scripted(Rule):
    """Finds what `now` holds."""

    def __init__(self, name: str, explains: tuple[str, ...] = ()) -> None:
        self.name, self.explains = name, explains  # type: ignore[misc]
        self.now: list[Finding] = []

    def check(self, seen: Any) -> Iterator[Finding]:
        yield from self.now


class Evidence:
    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        self.forgot: list[float] = []
        self.ended = False

    def poll(self) -> None: ...

    def end(self) -> None:
        self.ended = True

    def forget(self, before_s: float) -> None:
        self.forgot.append(before_s)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(watching.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def told(watch: Watch) -> list[tuple[str, str]]:
    return [(news.what, news.known.finding.rule) for news in watch.poll()]


def watch_of(*rules: Rule, windowed: bool = False) -> tuple[Watch, Any]:
    evidence: Any = Evidence(*rules)
    return Watch(evidence, windowed), evidence


def test_a_finding_is_told_once_when_it_has_settled(clock: Clock) -> None:
    loss = Scripted("loss")
    watch, _ = watch_of(loss)
    loss.now = [finding("loss")]
    assert told(watch) == []
    clock.now += SETTLE_SECONDS / 2
    assert told(watch) == []
    clock.now += SETTLE_SECONDS / 2
    assert told(watch) == [("began", "loss")]
    clock.now += 10
    assert told(watch) == []
    assert [each.rule for each in watch.findings()] == ["loss"]


def test_the_rules_are_asked_once_a_second(clock: Clock) -> None:
    loss = Scripted("loss")
    watch, _ = watch_of(loss)
    told(watch)
    loss.now = [finding("loss")]
    clock.now += 0.5
    told(watch)
    assert not watch.known
    clock.now += 0.5
    told(watch)
    assert watch.known


def test_what_is_not_so_after_all_is_not_told(clock: Clock) -> None:
    loss = Scripted("loss")
    watch, _ = watch_of(loss)
    loss.now = [finding("loss")]
    told(watch)
    loss.now = []
    clock.now += SETTLE_SECONDS
    assert told(watch) == []
    loss.now = [finding("loss")]
    clock.now += 1
    assert told(watch) == []  # it has to settle again


def test_at_the_end_the_rest_is_told(clock: Clock) -> None:
    loss = Scripted("loss")
    watch, evidence = watch_of(loss)
    loss.now = [finding("loss")]
    assert [news.what for news in watch.end()] == ["began"]
    assert evidence.ended


def test_a_symptom_is_not_told(clock: Clock) -> None:
    dead, loss = Scripted("no_ack", explains=("loss",)), Scripted("loss")
    watch, _ = watch_of(dead, loss)
    loss.now = [finding("loss"), finding("loss", OTHER)]
    told(watch)
    dead.now = [finding("no_ack")]
    clock.now += SETTLE_SECONDS
    assert told(watch) == [("began", "loss")]
    assert watch.findings()[0].about == {OTHER}
    clock.now += SETTLE_SECONDS
    assert told(watch) == [("began", "no_ack")]


def test_a_symptom_that_was_told_before_its_cause_is_not_among_the_findings_of_the_end(clock: Clock) -> None:
    dead, loss = Scripted("no_ack", explains=("loss",)), Scripted("loss")
    watch, _ = watch_of(dead, loss)
    loss.now = [finding("loss")]
    told(watch)
    clock.now += SETTLE_SECONDS
    assert told(watch) == [("began", "loss")]
    dead.now = [finding("no_ack")]
    heard = [(news.what, news.known.finding.rule) for news in watch.end()]
    assert heard == [("explained", "loss"), ("began", "no_ack")]
    assert [each.rule for each in watch.findings()] == ["no_ack"]


def test_with_watch_a_symptom_that_was_told_does_not_end_because_its_cause_is_found(clock: Clock) -> None:
    dead, connects = Scripted("no_ack", explains=("connects_fail",)), Scripted("connects_fail")
    watch, _ = watch_of(dead, connects, windowed=True)
    heard = []
    for second in range(60):
        connects.now = [finding("connects_fail", last_s=clock.now)] if second < 40 else []
        dead.now = [finding("no_ack", last_s=clock.now)] if 10 <= second < 40 else []
        heard += [(second, *news) for news in told(watch)]
        clock.now += 1
    assert heard == [
        (2, "began", "connects_fail"),
        (10, "explained", "connects_fail"),
        (12, "began", "no_ack"),
        (54, "ended", "connects_fail"),
        (54, "ended", "no_ack"),
    ]


def test_with_watch_a_finding_ends_when_nothing_more_happens(clock: Clock) -> None:
    loss = Scripted("loss")
    watch, evidence = watch_of(loss, windowed=True)
    loss.now = [finding("loss", last_s=clock.now)]
    told(watch)
    clock.now += SETTLE_SECONDS
    assert told(watch) == [("began", "loss")]
    clock.now += QUIET_SECONDS
    assert told(watch) == [("ended", "loss")]  # the rule still finds it: it looks at the last minute
    clock.now += 1
    assert told(watch) == []
    clock.now += 1
    loss.now = [finding("loss", last_s=clock.now)]
    told(watch)
    clock.now += SETTLE_SECONDS
    assert told(watch) == [("began", "loss")]
    assert evidence.forgot[0] == 1000.0 - WINDOW_SECONDS


def test_without_watch_a_finding_stays_to_the_end(clock: Clock) -> None:
    loss = Scripted("loss")
    watch, evidence = watch_of(loss)
    loss.now = [finding("loss", last_s=clock.now)]
    told(watch)
    clock.now += SETTLE_SECONDS
    told(watch)
    loss.now = []
    clock.now += QUIET_SECONDS + 1
    assert told(watch) == []
    assert [each.rule for each in watch.findings()] == ["loss"]
    assert evidence.forgot == []


def test_newer_numbers_are_those_of_the_same_finding(clock: Clock) -> None:
    loss = Scripted("loss")
    watch, _ = watch_of(loss)
    loss.now = [finding("loss")]
    told(watch)
    clock.now += SETTLE_SECONDS
    told(watch)
    loss.now = [Finding("loss", "warning", "worse", [], "", [], {"count": 9}, about=frozenset({PEER}))]
    clock.now += 1
    assert told(watch) == []
    assert [each.title for each in watch.findings()] == ["worse"]


def test_a_finding_is_told_again_when_it_gets_worse(clock: Clock) -> None:
    def as_severe(severity: str) -> Finding:
        return Finding("loss", severity, severity, [], "", [], {"count": 1}, about=frozenset({PEER}))

    loss = Scripted("loss")
    watch, _ = watch_of(loss)
    loss.now = [as_severe("info")]
    told(watch)
    clock.now += SETTLE_SECONDS
    assert told(watch) == [("began", "loss")]
    for severity, expected in (("critical", [("worse", "loss")]), ("warning", []), ("critical", [])):
        loss.now = [as_severe(severity)]
        clock.now += 1
        assert told(watch) == expected


def test_a_cause_explains_only_what_is_about_the_same() -> None:
    dead, loss = Scripted("no_ack", explains=("loss",)), Scripted("loss")
    found = [finding("no_ack"), finding("loss"), finding("loss", OTHER)]
    assert causes(found, (dead, loss)) == [found[0], found[2]]


def test_a_finding_may_explain_less_than_its_rule() -> None:
    dead, loss, drops = Scripted("no_ack", explains=("loss", "drops")), Scripted("loss"), Scripted("drops")
    found = [finding("no_ack", explains=("drops",)), finding("loss"), finding("drops")]
    assert causes(found, (dead, loss, drops)) == found[:2]


def test_severe_ones_first_then_the_largest() -> None:
    few, many = finding("a"), Finding("b", "warning", "b", [], "", [], {"count": 5})
    grave = Finding("c", "critical", "c", [], "", [], {"count": 1})
    assert ordered([few, many, grave]) == [grave, many, few]


def test_how_long_nothing_more_has_happened(clock: Clock) -> None:
    loss, dead = Scripted("loss"), Scripted("no_ack")
    watch, _ = watch_of(loss, dead)
    over, lasts = finding("loss", last_s=clock.now), finding("no_ack", OTHER)
    loss.now, dead.now = [over], [lasts]
    told(watch)
    clock.now += QUIET_SECONDS
    told(watch)
    assert [watch.quiet_s(each) for each in (over, lasts)] == [QUIET_SECONDS, None]
    dead.now = []
    clock.now += QUIET_SECONDS
    told(watch)
    assert [watch.quiet_s(each) for each in (over, lasts)] == [2 * QUIET_SECONDS, QUIET_SECONDS]
