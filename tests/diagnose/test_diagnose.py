"""The engine: rules are found, findings ordered, and what they say of limits is right."""

from types import SimpleNamespace

import pytest

from tcpscope.diagnose import Finding, all_rules, ordered, wording
from tcpscope.diagnose.listening import Listening


def finding(severity: str, count: int, title: str = "") -> Finding:
    return Finding("rule", severity, title, [], "", [], {"count": count})


def test_the_directory_is_the_list_of_rules():
    rules = {rule.name: rule for rule in all_rules()}
    assert {"accept_queue", "syn_queue"} <= set(rules)
    assert all(rule.source is Listening for rule in rules.values())


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
    assert words in wording.about_limit(SimpleNamespace(accept_limit=limit, somaxconn=somaxconn))


@pytest.mark.parametrize(("value", "power"), [(6, 128), (129, 256), (4096, 4096), (4097, 8192), (10**6, 65535)])
def test_proposed_limits_are_powers_of_two_within_reason(value, power):
    assert wording.next_power(value) == power


@pytest.mark.parametrize(("us", "text"), [(850_000, "850 ms"), (12_340_000, "12.3 s")])
def test_times_read_well(us, text):
    assert wording.seconds(us) == text
