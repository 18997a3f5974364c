"""How far a run is, and how long it will take."""

from __future__ import annotations

import json
from pathlib import Path

from tests.kernels import progress


def test_tests_are_counted_while_they_run(tmp_path: Path) -> None:
    outcomes = tmp_path / "row.jsonl"
    assert progress.counted(outcomes) == (0, 0)
    outcomes.write_text('{"event": "collected", "cou')
    assert progress.counted(outcomes) == (0, 0)
    lines = [{"event": "collected", "count": 3}, {"event": "start", "nodeid": "a"}, {"event": "test", "nodeid": "a"}]
    outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "te')
    assert progress.counted(outcomes) == (1, 3)


def test_the_last_run_tells_how_long_the_next_one_takes(tmp_path: Path) -> None:
    seconds, why = progress.expected_s(tmp_path)
    assert seconds > 60 and "speed" in why
    progress.remember(471.3, tmp_path)
    assert progress.expected_s(tmp_path) == (471.0, "as the last one did here")
    (tmp_path / progress.TIMES).write_text("no json")
    assert "speed" in progress.expected_s(tmp_path)[1]
