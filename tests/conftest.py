"""Fixtures for all tests: `lab`, two hosts of its own for a test, and `run_tool`, the command line in a process.

    def test_something(lab, run_tool):
        with run_tool("states", "--netns", str(lab.server.inode)) as tool:  # returns when hooks are attached
            ...  # make the fault
            tool.wait_for(lambda rows: any(row["new_state"] == "CLOSE" for row in rows))
        assert tool.done.stats["lost"] == 0  # leaving the block ends it by SIGINT

Rows are those of `-o json`, which is given unless the test gives another `-o`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from tcpscope.lab import processes
from tcpscope.lab.hosts import Lab
from tests import forks
from tests.kernels.report import MARKERS, in_guest

DEADLINE = 120.0  # seconds; emulated kernels are twenty times slower than real ones
POLL = 0.005
READY_FD = "TCPSCOPE_READY_FD"

pytest_plugins = ["tests.record.plugin"]
pytest.register_assert_rewrite("tests.tools")  # what tests of one tool share


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # A shell lets what it starts in the background ignore SIGINT, and nohup SIGHUP. So would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not in_guest() and not config.getoption("--compose"):
        elsewhere = [item for item in items if item.get_closest_marker("alone")]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
    for item in items:
        if {"lab", "run_tool", "cast"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.root)


def until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """The value of `condition()` as soon as it is true; after `deadline` seconds the test fails, naming `what`."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {deadline:g} s in vain for {what}")
        time.sleep(POLL)
    return value


@dataclass(frozen=True)
class CompletedRun:
    """A tool that has ended: `rows` and `stats` from its JSON lines, `stdout` and `stderr` as text."""

    rows: list[dict[str, Any]]
    stderr: str
    status: int
    stats: dict[str, int] | None
    stdout: str


class RunningTool:
    """`python -m tcpscope ARGUMENTS` in a process that does not outlive the test.

    Python itself is only started where it matters: with a prefix, an environment or files of its own.
    """

    def __init__(
        self,
        *arguments: str,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        ready: bool = True,
        **options: Any,
    ) -> None:
        machine = () if {"-o", "--output"} & set(arguments) else ("-o", "json", "--stats")
        self.argv = [*prefix, sys.executable, "-m", "tcpscope", *arguments, *machine]
        self.done: CompletedRun | None = None
        self._ready = ready
        self._forked = not (prefix or env or options)
        self._env = {**os.environ, **(env or {})}
        self._options = options
        self._out: list[str] = []
        self._err: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._stats: dict[str, int] | None = None
        self._decoded = 0

    def __enter__(self) -> RunningTool:
        self._read_end, write_end = os.pipe()
        try:
            self.process = self._start(write_end)
        finally:
            os.close(write_end)
        self.pid = self.process.pid
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self._out), (self.process.stderr, self._err))
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()
        if self._ready:
            try:
                self.wait_until_ready()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def _start(self, write_end: int) -> subprocess.Popen[bytes] | forks.Fork:
        if self._forked:
            return forks.start(self.argv[3:], self._env, READY_FD, write_end)
        return processes.start(
            self.argv,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | self._options,
            pass_fds=[write_end],
            env={**self._env, READY_FD: str(write_end)},
        )

    def __exit__(self, *_: object) -> None:
        try:
            if self.done is None:
                self.stop()
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._read_end)

    def _read(self, stream: IO[bytes], lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line.decode(errors="replace"))

    def wait_until_ready(self, timeout: float = DEADLINE) -> None:
        """Return when the tool's hooks are attached; fail if it ends before."""
        poll = select.poll()  # not select(): a test may hold more than 1024 file descriptors
        poll.register(self._read_end)
        if not poll.poll(timeout * 1000):
            pytest.fail(f"{self.argv[-1]} was not ready after {timeout:g} s: {self.stderr}")
        if not os.read(self._read_end, 16):
            done = self.wait()
            pytest.fail(f"{' '.join(self.argv)} ended with status {done.status} before it was ready: {done.stderr}")

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return "".join(self._out)

    @property
    def stderr(self) -> str:
        """The same of standard error."""
        return "".join(self._err)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far (JSON)."""
        for line in self._out[self._decoded :]:  # each once: tests ask again and again
            self._decoded += 1
            if line.startswith("{") and line.endswith("\n"):
                record = json.loads(line)
                if record.keys() == {"stats"}:
                    self._stats = record["stats"]
                else:
                    self._rows.append(record)
        return self._rows.copy()

    def wait_for(
        self, predicate: Callable[[list[dict[str, Any]]], Any], timeout: float = DEADLINE
    ) -> list[dict[str, Any]]:
        """The rows as soon as `predicate(rows)` is true."""
        end = time.monotonic() + timeout
        while not predicate(rows := self.rows):
            if self.process.poll() is not None and predicate(rows := self.wait().rows):
                break
            if self.process.poll() is not None or time.monotonic() > end:
                shown = "\n".join(map(str, rows[-40:]))
                pytest.fail(f"not seen among {len(rows)} rows:\n{shown}\n{self.stderr}")
            time.sleep(POLL)
        return rows

    def stop(self, number: int = signal.SIGINT, timeout: float = DEADLINE) -> CompletedRun:
        """End it in order, and wait until all of its output is here."""
        if self.done is None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.send_signal(signal.SIGCONT)  # a test may have failed while it slept
        return self.wait(timeout)

    def wait(self, timeout: float = DEADLINE) -> CompletedRun:
        """Wait until it has ended by itself."""
        if self.done is None:
            end = time.monotonic() + timeout
            try:
                status = self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                pytest.fail(f"{' '.join(self.argv)} did not end within {timeout:g} s: {self.stderr}")
            for reader in self._readers:
                reader.join(max(0.0, end - time.monotonic()))
            self.done = CompletedRun(self.rows, self.stderr, status, self._stats, self.stdout)
        return self.done


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A client and a server in network namespaces of their own."""
    with Lab() as made:
        yield made


@pytest.fixture
def run_tool() -> type[RunningTool]:
    """`run_tool("states", "--netns", "...")`: a RunningTool to be used in a `with` block.

    Keywords: `prefix` (words before the command), `env` (added to the environment), `ready=False` (do not wait),
    and those of subprocess.Popen. Without JSON (another `-o`) there is `stdout`.
    """
    return RunningTool


@pytest.fixture(scope="session")
def tree() -> Path:
    """The project's folder."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def features() -> dict[str, Any]:
    """What `features --json` prints on this kernel. It loads all probes, which takes half a minute in a guest."""
    command = [sys.executable, "-m", "tcpscope", "features", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
