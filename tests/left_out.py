"""The pytest plugin for what no tool can help: a test that fails, and whose tool says that it was left out, runs again.

The kernel leaves a program out that has interrupted itself. Those on which all depends have a second copy, and none may
be missed of them (bpf/once.bpf.h); others have none, and the tool counts what was left out (`missed`). A softirq that
comes in the middle of one is rare, but not on a processor that is emulated.

The machine's own kernel runs no BPF in some tasks at all, and what a softirq does that interrupts one of them is
unseen: a timer that ends a connection, mostly. That was found by ftrace, which sees what happens there, beside a BPF
program on the same tracepoint. The tool cannot see it either, but it notices the gap and says so (docs/design.md).

More than a few such tests in a run are no accident, and fail. The summary names them. What a file shares is ended
when one of its tests fails, and made anew for the next one.
"""

from __future__ import annotations

import traceback

import pytest
from _pytest.outcomes import TEST_OUTCOME
from _pytest.runner import runtestprotocol

from tests.lacks import functions_cannot_be_hooked

RUNS = 3
MOST, MOST_OF_THE_MACHINE = 3, 10  # tests in one run

_missed: list[int] = []
_ended: list[str] = []
_again: list[str] = []


def note(missed: int) -> None:
    """A tool of the test that runs now has said this of itself."""
    if missed:
        _missed.append(missed)


def most() -> int:
    return MOST_OF_THE_MACHINE if functions_cannot_be_hooked() else MOST


def end_what_is_shared(item: pytest.Item, report: pytest.TestReport) -> str:
    """A file's tool says only at its end what it has missed; and what a file shares is kept, even its error."""
    try:
        item.session._setupstate.teardown_exact(item.session)
    except (*TEST_OUTCOME, BaseExceptionGroup) as error:
        report.sections.append(("the end of what the file shares", "".join(traceback.format_exception(error))))
        return f"; at the end of what the file shares: {str(error).splitlines()[:1]}"
    return ""


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for run in range(1, RUNS + 1):
        _missed.clear()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        failed = next((report for report in reports if report.failed), None)
        ended = ""
        if failed and len(_ended) < most():  # a file that cannot be set up shall not try it for each test
            _ended.append(item.nodeid)
            ended = end_what_is_shared(item, failed)
        if not (failed and _missed and run < RUNS and len(_again) < most()):
            break
        _again.append(f"{item.nodeid}: {sum(_missed)} times no program was run{ended}")
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _again:
        terminalreporter.write_line(f"RAN AGAIN {line}")
