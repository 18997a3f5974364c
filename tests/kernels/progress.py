"""How far the rows of a run are, a line now and then, and how long the run will take."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kernels.debian import cache_directory
from tests.kernels.rows import outcomes_of

EVERY_S = 20
TIMES = "times.json"
"""In the cache: how long the last whole run took on this machine."""
REFERENCE_RUN_S, REFERENCE_LOOP_S = 4900.0, 0.031
"""A whole run, and the loop below, on the machine that the first figures come from."""


def expected_s(cache: Path | None = None) -> tuple[float, str]:
    """Seconds that a run will take here, and how that is known."""
    try:
        last = json.loads(((cache or cache_directory()) / TIMES).read_text())["run_s"]
        return float(last), "as the last one did here"
    except (OSError, ValueError, KeyError, TypeError):
        return REFERENCE_RUN_S * _loop_s() / REFERENCE_LOOP_S, "by a look at this machine's speed"


def remember(run_s: float, cache: Path | None = None) -> None:
    """What the next run on this machine may expect."""
    ((cache or cache_directory()) / TIMES).write_text(json.dumps({"run_s": round(run_s)}))


def _loop_s() -> float:
    best = 60.0
    for _ in range(5):  # the quickest: others may be at work
        began, total = time.perf_counter(), 0
        for number in range(1_000_000):
            total += number & 7
        best = min(best, time.perf_counter() - began)
    return best


def counted(outcomes: Path) -> tuple[int, int]:
    """Tests that are done and those that were chosen, as far as a file of outcomes goes; 0 of 0 before they begin."""
    done = chosen = 0
    try:
        lines = outcomes.read_text(errors="replace").splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        done += line.startswith('{"event": "test"')
        if line.startswith('{"event": "collected"') and line.endswith("}"):  # and not half of it yet
            chosen = json.loads(line)["count"]
    return done, chosen


class Progress:
    """Says every now and then how far the rows are that run: `5.10 45/160`."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._running: list[str] = []
        self._end = threading.Event()

    def begin(self, name: str) -> None:
        self._running.append(name)

    def end(self, name: str, what: str) -> None:
        self._running.remove(name)
        self.say(f"{name}: {what}")

    def say(self, what: str) -> None:
        seconds = int(time.monotonic() - self._began)
        print(f"{seconds // 60:2}:{seconds % 60:02}  {what}", flush=True)

    def line(self) -> str:
        """The rows that run."""
        said = []
        for name in list(self._running):
            done, chosen = counted(outcomes_of(name))
            said.append(f"{name} {f'{done}/{chosen}' if chosen else 'plays its scenarios'}")
        return "   ".join(said)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside of the block."""
        thread = threading.Thread(target=self._show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _show(self) -> None:
        while not self._end.wait(EVERY_S):
            if line := self.line():
                self.say(line)
