"""The plugin that runs a test again whose tool was left out, on a file of tests of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FILE = """
import pytest
from tests import left_out

setups = []

@pytest.fixture(scope="module")
def tool():
    setups.append("tool")
    yield len(setups)
    left_out.note({missed} if len(setups) == 1 else 0)
    assert len(setups) > 1, "the end of the first tool"

def test_before(tool):
    assert tool == 1

def test_fails_with_the_first_tool(tool):
    assert tool > 1

def test_after(tool):
    assert tool == {after}
"""


def run(folder: Path, tree: Path, missed: int) -> tuple[int, str]:
    (folder / "test_file.py").write_text(FILE.format(missed=missed, after=2))
    command = [sys.executable, "-m", "pytest", "-p", "tests.left_out", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "--rootdir", folder, folder], cwd=tree, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_what_its_tool_has_missed_is_known_at_the_end_of_the_tool(tmp_path: Path, tree: Path) -> None:
    status, text = run(tmp_path, tree, missed=1)
    assert status == 0, text
    assert "RAN AGAIN" in text and "test_fails_with_the_first_tool: 1 times" in text
    assert "the end of the first tool" in text
    assert "3 passed" in text


def test_who_was_not_left_out_does_not_run_again(tmp_path: Path, tree: Path) -> None:
    """The next test has a tool of its own all the same, and what the end of the first one said is shown."""
    status, text = run(tmp_path, tree, missed=0)
    assert status == 1, text
    assert "RAN AGAIN" not in text
    assert "the end of the first tool" in text
    assert "1 failed, 2 passed" in text
