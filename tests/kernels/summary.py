"""Puts the rows of the matrix together and decides whether it passed; pure, from outcomes to text."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.kernels import HOST

NOTHING = "no tests were collected"
SHOWN = 200
"""Characters of the reason of a failure."""
RAN = ("passed", "failed", "xfailed")


@dataclass(frozen=True, slots=True)
class Result:
    nodeid: str
    outcome: str
    reason: str
    duration_s: float
    """Of the test itself."""
    kernel: bool | None
    """Whether it carries the marker ``kernel``; None for a module that failed or was skipped as a whole."""
    setup_s: float = 0.0
    """Of its fixtures, before and after; what several tests share counts for the first and the last of them."""


@dataclass(slots=True)
class Row:
    """What one kernel made of the tests."""

    name: str
    release: str = ""
    tests: list[Result] = field(default_factory=list)
    problem: str = ""
    """Why the row as such did not end well, apart from failed tests; empty when it did."""
    boot_s: float | None = None
    total_s: float = 0.0

    def count(self, outcome: str) -> int:
        return sum(test.outcome == outcome for test in self.tests)

    @property
    def good(self) -> bool:
        return not self.problem and not self.count("failed")


def read_outcomes(lines: Iterable[str]) -> tuple[list[Result], str, int | None]:
    """Return the tests, the one that was running when the file ends ("" for none), and pytest's status."""
    tests: list[Result] = []
    running = ""
    status = None
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a crash
        match record["event"]:
            case "start":
                running = record["nodeid"]
            case "test":
                fields = ("nodeid", "outcome", "reason", "duration", "kernel", "setup")
                tests.append(Result(*(record[name] for name in fields)))
                running = ""
            case "end":
                status = record["status"]
    return tests, running, status


def make_row(
    name: str,
    release: str,
    lines: Iterable[str],
    *,
    exit_status: int | None,
    problem: str = "",
    boot_s: float | None = None,
    total_s: float = 0.0,
) -> Row:
    tests, running, end_status = read_outcomes(lines)
    row = Row(name, release, tests, problem, boot_s, total_s)
    if not problem:
        if exit_status == 5 or (exit_status == 0 and not tests):
            row.problem = NOTHING
        elif end_status is None:
            row.problem = f"pytest ended before its report (exit status {exit_status})"
        elif exit_status not in (0, 1):
            row.problem = f"pytest ended with status {exit_status}"
        elif exit_status == 1 and not row.count("failed"):
            row.problem = "pytest failed, but no test did"
    if row.problem and running:
        row.problem += f", in {running}"
    return row


def joined(row: Row, other: Row) -> Row:
    """One row of two parts of it: live tests, and those asserted over the recording."""
    problems = "; ".join(filter(None, (row.problem, other.problem)))
    total_s = row.total_s + other.total_s
    return Row(row.name, row.release, [*row.tests, *other.tests], problems, row.boot_s, total_s)


def skipped_everywhere(rows: Sequence[Row]) -> dict[str, list[tuple[str, str]]]:
    """Return the tests that no row ran, each with the reason that each row gave.

    A skip must be earned by another kernel that runs the test: a test without one proves nothing. A module
    that was skipped as a whole stands for its tests.
    """
    ran = {test.nodeid for row in rows for test in row.tests if test.outcome in RAN}
    ran |= {nodeid.partition("::")[0] for nodeid in ran}
    skipped: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for test in row.tests:
            if test.outcome == "skipped" and test.nodeid not in ran:
                skipped.setdefault(test.nodeid, []).append((row.name, test.reason))
    return skipped


def missing_rows(rows: Sequence[Row], expected: Sequence[str]) -> list[str]:
    present = {row.name for row in rows}
    return [name for name in expected if name not in present]


def slowest(rows: Sequence[Row], number: int = 20) -> list[str]:
    """The tests that took longest, of all rows, their fixtures apart."""
    tests = [(test.duration_s + test.setup_s, row.name, test) for row in rows for test in row.tests]
    tests.sort(key=lambda entry: -entry[0])
    return [
        f"  {test.duration_s:6.1f} s {f'+ {test.setup_s:.1f} s set-up' if test.setup_s >= 0.1 else '':16} "
        f"{name:>6}  {test.nodeid}"
        for _, name, test in tests[:number]
    ]


def counts_line(row: Row) -> str:
    """The tests of a row in pytest's own words: ``12 passed, 1 skipped in 40.00s``."""
    words = [f"{row.count(o)} {o}" for o in ("failed", "passed", "skipped", "xfailed") if row.count(o)]
    return f"{', '.join(words) or 'no tests ran'} in {row.total_s:.2f}s"


def render(rows: Sequence[Row], expected: Sequence[str]) -> tuple[list[str], bool]:
    """Return the closing lines, and whether everything is well. At their end, which is seen first, are the total of all
    rows and before it what failed."""
    lines: list[str] = []
    good = True
    for row in rows:
        title = row.name if row.name == HOST else f"kernel {row.name}"
        booted = f", booted in {row.boot_s:.0f} s" if row.boot_s is not None else ""
        lines.append(f"=== {title} ({row.release}{booted}): {counts_line(row)} ===")
        if row.problem:
            lines.append(f"  PROBLEM {row.problem}")
        reasons = Counter(test.reason for test in row.tests if test.outcome == "skipped")
        lines += [f"  SKIPPED [{number}] {reason}" for reason, number in reasons.most_common()]
        good = good and row.good
    if missing := missing_rows(rows, expected):
        good = False
        lines.append(f"=== not run: {', '.join(missing)} ===")
    elif expected and (never := skipped_everywhere(rows)):
        good = False
        lines.append("=== skipped on every kernel, so never tried ===")
        for nodeid, reasons_by_row in sorted(never.items()):
            lines.append(f"  NEVER RUN {nodeid}")
            lines += [f"    {name}: {reason}" for name, reason in reasons_by_row]
    if not good and all(row.good for row in rows):
        lines.append("=== no test failed, but the matrix did: see above ===")
    if expected:
        lines += ["=== the slowest tests ===", *slowest(rows)]
        lines += ["=== time of each row ===", *(f"  {row.total_s:6.0f} s  {row.name}" for row in rows)]
    failed = [(row, test) for row in rows for test in row.tests if test.outcome == "failed"]
    lines += [f"  FAILED {row.name}: {test.nodeid} - {test.reason[:SHOWN]}" for row, test in failed]
    total = Counter(test.outcome for row in rows for test in row.tests)
    passed = total["passed"] + total["xfailed"]
    lines.append(f"{passed} passed, {total['failed']} failed, {total['skipped']} skipped")
    return lines, good


def save(row: Row, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(row)))


def load(path: Path) -> Row:
    record = json.loads(path.read_text())
    tests = [Result(**values) for values in record.pop("tests")]
    return Row(tests=tests, **record)
