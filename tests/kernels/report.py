"""The pytest plugin behind the matrix: its markers, and every test's outcome as a JSON line.

Load it with ``-p tests.kernels.report``; ``--outcomes FILE`` says where the lines go. They are written as the
tests end, so that a guest that crashes leaves what it had, and the name of the test that was running. ``--between
PATHS`` leaves out what a kernel between the oldest and the newest need not be asked (choice.py).
"""

import json
from pathlib import Path
from typing import Any, TextIO

import pytest

MARKERS = (
    "kernel: depends on the kernel: runs on the oldest and the newest of the matrix, if need be on those between",
    "every_kernel: runs on each kernel of the matrix",
    "root: needs root and what a kernel has, but not a particular kernel; so do all tests with a lab or a running tool",
    "concurrent: needs true concurrency: runs with two processors, too",
    "alone: changes what all of a machine shares: only in a guest, where nobody else is; besides `kernel`",
)


def in_guest() -> bool:
    """By what virtme-ng writes on the command line of the kernels that it boots."""
    return "virtme_" in Path("/proc/cmdline").read_text()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write every test's outcome to this file as JSON lines")
    parser.addoption("--between", help="only tests of every kernel, and those below these paths (:)")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if path := config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(path.open("w", buffering=1)), "tcpscope-outcomes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (paths := config.getoption("--between")) is None:
        return
    wanted = tuple(filter(None, paths.split(":")))
    chosen = [item for item in items if item.get_closest_marker("every_kernel") or item.nodeid.startswith(wanted)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


class Outcomes:
    """Merges the phases of each test (setup, call, teardown) into one line."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines
        self._merged: dict[str, dict[str, Any]] = {}

    def _write(self, **record: Any) -> None:
        self._lines.write(json.dumps(record) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._of_kernel = {item.nodeid for item in items if item.get_closest_marker("kernel")}
        self._write(event="collected", count=len(items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            # A whole module; whether its tests carry the marker is not known.
            self._write(
                event="test",
                nodeid=report.nodeid,
                outcome=report.outcome,
                reason=_reason(report),
                duration=0.0,
                setup=0.0,
                kernel=None,
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(event="start", nodeid=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        new = {"outcome": "passed", "reason": "", "duration": 0.0, "setup": 0.0}
        merged = self._merged.setdefault(report.nodeid, new)
        merged["duration" if report.when == "call" else "setup"] += report.duration
        if merged["outcome"] == "passed" and (outcome := _outcome(report)) != "passed":
            merged["outcome"] = outcome
            merged["reason"] = _reason(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if merged := self._merged.pop(nodeid, None):
            merged |= {name: round(merged[name], 3) for name in ("duration", "setup")}
            self._write(event="test", nodeid=nodeid, kernel=nodeid in self._of_kernel, **merged)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write(event="end", status=int(exitstatus))


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.outcome == "skipped" else "passed"
    return report.outcome


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """One line: what the skip says, or where and how the test failed."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [line.strip() for line in (crash.message if crash else str(report.longrepr or "")).splitlines()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]
    line = errors[-1] if errors else next(filter(None, lines), "")
    return f"{report.when}: {line}" if report.when in ("setup", "teardown") else line
