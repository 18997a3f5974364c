import json
from pathlib import Path

import pytest

from tests.kernels import summary
from tests.kernels.summary import Result, Row, make_row, render, skipped_everywhere


def result(nodeid: str, outcome: str = "passed", reason: str = "", kernel: bool | None = True) -> Result:
    return Result(nodeid, outcome, reason, 0.1, kernel)


def lines(*tests: Result, running: str = "", status: int | None = 0) -> list[str]:
    records: list[dict[str, object]] = []
    for t in tests:
        records.append({"event": "start", "nodeid": t.nodeid})
        outcome = {
            "outcome": t.outcome,
            "reason": t.reason,
            "duration": t.duration_s,
            "setup": t.setup_s,
            "kernel": t.kernel,
        }
        records.append({"event": "test", "nodeid": t.nodeid, **outcome})
    if running:
        records.append({"event": "start", "nodeid": running})
    if status is not None:
        records.append({"event": "end", "status": status})
    return [json.dumps(record) for record in records]


def test_a_complete_row_has_no_problem() -> None:
    row = make_row("6.1", "6.1.0", lines(result("a"), result("b", "skipped", "no netem")), exit_status=0)
    assert (row.count("passed"), row.count("skipped"), row.problem) == (1, 1, "")
    assert row.good


@pytest.mark.parametrize(
    ("outcomes", "exit_status", "given", "expected"),
    [
        (lines(result("a"), running="b", status=None), None, "not done after 9 s", "not done after 9 s, in b"),
        (lines(result("a"), running="b", status=None), 139, "", "before its report (exit status 139), in b"),
        (lines(status=5), 5, "", "no tests were collected"),
        (lines(), 0, "", "no tests were collected"),
        ([], 1, "", "before its report"),
        (lines(result("a"), status=2), 2, "", "status 2"),
        (lines(result("a"), status=1), 1, "", "no test did"),
    ],
)
def test_a_row_that_did_not_end_well_says_so(
    outcomes: list[str], exit_status: int | None, given: str, expected: str
) -> None:
    row = make_row("6.1", "6.1.0", outcomes, exit_status=exit_status, problem=given)
    assert expected in row.problem
    assert not row.good
    assert not render([row], [])[1]


def test_a_line_cut_off_by_a_crash_is_left_out() -> None:
    outcomes = [*lines(result("a"), status=None), '{"event": "te']
    assert summary.read_outcomes(outcomes) == ([result("a")], "", None)


def test_a_test_that_every_row_skips_is_found_with_the_reasons() -> None:
    rows = [
        Row("host", tests=[result("x", "skipped", "no kprobe"), result("y", "skipped", "no netem")]),
        Row("6.1", tests=[result("x", "skipped", "no BTF"), result("y")]),
    ]
    assert skipped_everywhere(rows) == {"x": [("host", "no kprobe"), ("6.1", "no BTF")]}


def test_a_failed_test_was_tried() -> None:
    assert not skipped_everywhere(
        [Row("6.1", tests=[result("x", "failed")]), Row("7.2", tests=[result("x", "skipped")])]
    )


def test_a_module_skipped_as_a_whole_stands_for_its_tests() -> None:
    skipped = Row("host", tests=[result("tests/test_x.py", "skipped", "no scapy", kernel=None)])
    ran = Row("6.1", tests=[result("tests/test_x.py::test_a")])
    assert not skipped_everywhere([skipped, ran])
    assert skipped_everywhere([skipped])


def test_a_unit_test_skipped_on_the_host_is_never_tried() -> None:
    rows = [
        Row("host", tests=[result("u", "skipped", "not today", kernel=False), result("k")]),
        Row("6.1", tests=[result("k")]),
    ]
    text, good = render(rows, ["host", "6.1"])
    assert not good
    assert "  NEVER RUN u" in text


def test_the_closing_lines_name_every_failure_and_end_in_the_total() -> None:
    rows = [
        Row(
            "host",
            "6.18",
            [result("a"), result("b", "skipped", "no kprobe"), result("c", "skipped", "no kprobe")],
            total_s=2,
        ),
        Row(
            "6.1",
            "6.1.0",
            [result("a", "failed", "assert 1 == 2"), result("b"), result("c", "xfailed")],
            boot_s=5.4,
        ),
    ]
    text, good = render(rows, ["host", "6.1"])
    assert not good
    assert text[0] == "=== host (6.18): 1 passed, 2 skipped in 2.00s ==="
    assert "  SKIPPED [2] no kprobe" in text
    assert any(line.startswith("=== kernel 6.1 (6.1.0, booted in 5 s): 1 failed, 1 passed") for line in text)
    assert text[-2:] == ["  FAILED 6.1: a - assert 1 == 2", "3 passed, 1 failed, 2 skipped"]


def test_a_row_that_is_missing_fails_the_matrix() -> None:
    text, good = render([Row("host", tests=[result("a")])], ["host", "6.1", "7.2"])
    assert not good
    assert "=== not run: 6.1, 7.2 ===" in text


def test_a_good_matrix_is_good() -> None:
    rows = [Row("host", tests=[result("a"), result("u", kernel=False)]), Row("6.1", tests=[result("a")])]
    assert render(rows, ["host", "6.1"]) == (
        [
            "=== host (): 2 passed in 0.00s ===",
            "=== kernel 6.1 (): 1 passed in 0.00s ===",
            "=== the slowest tests ===",
            "     0.1 s                    host  a",
            "     0.1 s                    host  u",
            "     0.1 s                     6.1  a",
            "=== time of each row ===",
            "       0 s  host",
            "       0 s  6.1",
            "3 passed, 0 failed, 0 skipped",
        ],
        True,
    )


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    row = Row("6.1", "6.1.0", [result("a", "skipped", "why")], "crashed", 5.0, 9.0)
    summary.save(row, tmp_path / "deep" / "6.1.json")
    assert summary.load(tmp_path / "deep" / "6.1.json") == row


def test_the_slowest_tests_have_their_fixtures_apart() -> None:
    quick, slow, set_up = result("a"), Result("b", "passed", "", 5.0, True), Result("c", "passed", "", 1.0, True, 9.0)
    assert summary.slowest([Row("host", tests=[quick, slow]), Row("6.1", tests=[set_up])], 2) == [
        "     1.0 s + 9.0 s set-up      6.1  c",
        "     5.0 s                    host  b",
    ]


def test_a_row_of_two_parts_has_the_problems_of_both() -> None:
    live = Row("6.1", "6.1.0", [result("a")], "", boot_s=5.0, total_s=30.0)
    recorded = Row("6.1", "6.1.0", [result("b", "failed")], "no recording", total_s=2.0)
    both = summary.joined(live, recorded)
    assert ([test.nodeid for test in both.tests], both.total_s, both.boot_s) == (["a", "b"], 32.0, 5.0)
    assert both.problem == "no recording" and not both.good
