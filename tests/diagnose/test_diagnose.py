"""The engine: rules are found, findings ordered, and what they say of limits is right."""

from collections import Counter
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding, all_rules, ordered, wording
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.diagnose.witness import Witness
from tcpscope.listeners import Listener
from tests.test_sampling import at


def finding(severity: str, count: int, title: str = "") -> Finding:
    return Finding("rule", severity, title, [], "", [], {"count": count})


def test_the_directory_is_the_list_of_rules():
    rules = {rule.name: rule for rule in all_rules()}
    assert {"accept_queue", "syn_queue"} <= set(rules)
    assert all(rule.needs for rule in rules.values())


def test_most_severe_first_then_the_most_refusals():
    given = [finding("warning", 900), finding("critical", 1), finding("info", 5), finding("critical", 7)]
    assert [(f.severity, f.facts["count"]) for f in ordered(given)] == [
        ("critical", 7),
        ("critical", 1),
        ("warning", 900),
        ("info", 5),
    ]


@pytest.mark.parametrize(
    ("limit", "somaxconn", "words"),
    [(5, 4096, "is the backlog given to listen()"), (128, 128, "was cut to it"), (500, 128, "older than")],
)
def test_where_the_limit_comes_from(limit, somaxconn, words):
    read = dict.fromkeys(field.name for field in fields(Listener))
    listener = Listener(**read | {"accept_limit": limit, "somaxconn": somaxconn})
    assert words in listener.about_limit


@pytest.mark.parametrize(("value", "power"), [(6, 128), (129, 256), (4096, 4096), (4097, 8192), (10**6, 65535)])
def test_proposed_limits_are_powers_of_two_within_reason(value, power):
    assert wording.next_power(value) == power


@pytest.mark.parametrize(("us", "text"), [(850_000, "850 ms"), (12_340_000, "12.3 s")])
def test_times_read_well(us, text):
    assert wording.seconds(us) == text


def sampled(*, full_seen: int, syncookies: int, **causes: int) -> dict[str, dict[str, object]]:
    """Rule -> the facts it finds where refusals were sampled, with so many of each cause."""
    listener = at(9, 9, 9, 0, syncookies=syncookies)
    refused = Counter({("UNKNOWN", cause): n for cause, n in causes.items()})
    history = History(listener, listener, full_seen=full_seen, looks=1, sampled=refused)
    return {found.rule: found.facts for found in findings(history)}


def findings(history: History) -> list[Finding]:
    """Of this one listener, whose refusals were sampled."""
    seen = QueueHistory.__new__(QueueHistory)
    seen.exact, seen._witness = False, Witness()
    seen.histories = {history.last.key: history}
    evidence: Any = SimpleNamespace(queues=seen, ended=True)
    return [found for rule in all_rules() if rule.needs == ("queues",) for found in rule.check(evidence)]


def test_sampled_refusals_count_for_the_queue_that_was_full():
    assert sampled(full_seen=1, syncookies=1, ACCEPT_QUEUE_FULL=3)["accept_queue"]["count"] == 3
    facts = sampled(full_seen=0, syncookies=0, SYN_QUEUE_FULL=4)
    assert list(facts) == ["syn_queue"]
    assert (facts["syn_queue"]["count"], facts["syn_queue"]["dropped"], facts["syn_queue"]["reserved"]) == (4, 4, 0)


def test_sampled_refusals_of_no_certain_cause_are_not_counted_for_one():
    facts = sampled(full_seen=1, syncookies=0, ACCEPT_QUEUE_FULL=3, UNKNOWN=2)
    assert list(facts) == ["accept_queue"]
    assert facts["accept_queue"]["count"] is None
    facts = sampled(full_seen=0, syncookies=0, SYN_QUEUE_FULL=3, UNKNOWN=2)
    assert list(facts) == ["syn_queue"]
    assert (facts["syn_queue"]["count"], facts["syn_queue"]["dropped"]) == (None, None)
    facts = sampled(full_seen=0, syncookies=1, UNKNOWN=2)
    assert list(facts) == ["other_refusals"]
    assert facts["other_refusals"]["count"] is None


def test_how_many_clients_were_refused_is_not_known_if_the_cause_is_not() -> None:
    assert sampled(full_seen=1, syncookies=1, UNKNOWN=2)["accept_queue"]["clients_in_burst"] is None


FULL, OTHER = "ACCEPT_QUEUE_FULL", "OTHER"
EITHER = "packets dropped (one for a refused SYN, two for a refused final ACK)"


@pytest.mark.parametrize(
    ("refused", "drops", "text"),
    [
        ({("SYN", FULL): 36}, 36, "36 refusals (sampled), all SYNs; 36 packets dropped"),
        ({("UNKNOWN", FULL): 36}, 36, "36 refusals (sampled); 36 packets dropped, one for each, as for SYNs"),
        ({("UNKNOWN", FULL): 36}, 72, "36 refusals (sampled); 72 packets dropped, two for each, as for final ACKs"),
        ({("UNKNOWN", FULL): 30, ("SYN", FULL): 6}, 50, f"36 refusals (sampled); 50 {EITHER}"),
        ({("UNKNOWN", FULL): 18, ("UNKNOWN", OTHER): 18}, 36, f"18 refusals (sampled); 36 {EITHER}"),
        (
            {("SYN", FULL): 9, ("UNKNOWN", "UNKNOWN"): 9},
            18,
            f"9 refusals (sampled), and 9 for this or another cause; 18 {EITHER}",
        ),
    ],
)
def test_the_number_of_packets_is_explained(refused: dict[tuple[str, ...], int], drops: int, text: str) -> None:
    history = History(at(0, 0, 0, 0), at(drops, 0, 0, 0), full_seen=1, looks=1, sampled=Counter(refused))
    (found,) = (found for found in findings(history) if found.rule == "accept_queue")
    assert found.observed[0] == text


def test_sampled_refusals_without_a_full_queue_are_found() -> None:
    facts = sampled(full_seen=0, syncookies=1, OTHER=10)
    assert list(facts) == ["other_refusals"]
    assert facts["other_refusals"]["count"] == 10


def test_sampled_cookies_are_a_finding_unless_all_syns_get_one() -> None:
    assert sampled(full_seen=0, syncookies=1, COOKIE_SENT=159)["syn_queue"]["cookies"] == 159
    assert sampled(full_seen=0, syncookies=2, COOKIE_SENT=159) == {}
