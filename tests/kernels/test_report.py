import json
import subprocess
import sys
from pathlib import Path

from tests.kernels.summary import Result, read_outcomes

TREE = Path(__file__).resolve().parents[2]

TESTS = """
import pytest

pytestmark = []

@pytest.mark.kernel
def test_passes(): pass

def test_fails(): assert 1 == 2, "wrong sum"

@pytest.mark.kernel
def test_skips(): pytest.skip("no such field")

@pytest.mark.xfail(strict=True)
def test_expected(): assert False

@pytest.mark.xfail(strict=True)
def test_unexpected(): pass

@pytest.fixture
def broken():
    yield
    raise RuntimeError("left a namespace behind")

def test_teardown(broken): pass
"""


def outcomes(folder: Path, text: str, *arguments: str) -> tuple[dict[str, Result], int | None]:
    (folder / "test_it.py").write_text(text)
    lines = folder / "outcomes.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.kernels.report",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
    ]
    folders = ["--strict-markers", "--rootdir", str(folder), "--outcomes", str(lines), str(folder)]
    subprocess.run([*command, *folders, *arguments], cwd=TREE, capture_output=True, timeout=60)
    tests, running, status = read_outcomes(lines.read_text().splitlines())
    assert running == ""
    return {test.nodeid.partition("::")[2] or test.nodeid: test for test in tests}, status


def test_each_outcome_has_its_reason_and_marker(tmp_path: Path) -> None:
    tests, status = outcomes(tmp_path, TESTS)
    assert status == 1
    assert {name: test.outcome for name, test in tests.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_expected": "xfailed",
        "test_unexpected": "failed",
        "test_teardown": "failed",
    }
    assert "wrong sum" in tests["test_fails"].reason
    assert tests["test_skips"].reason == "no such field"
    assert tests["test_teardown"].reason == "teardown: RuntimeError: left a namespace behind"
    assert {name for name, test in tests.items() if test.kernel} == {"test_passes", "test_skips"}


def test_the_marker_selects(tmp_path: Path) -> None:
    tests, status = outcomes(tmp_path, TESTS, "-m", "kernel")
    assert (set(tests), status) == ({"test_passes", "test_skips"}, 0)


def test_a_module_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    tests, status = outcomes(tmp_path, "import no_such_module")
    (test,) = tests.values()
    assert (test.outcome, test.kernel, status) == ("failed", None, 2)
    assert "no_such_module" in test.reason


def test_a_module_skipped_as_a_whole_keeps_its_reason(tmp_path: Path) -> None:
    tests, _ = outcomes(tmp_path, "import pytest; pytest.skip('no scapy', allow_module_level=True)")
    (test,) = tests.values()
    assert (test.outcome, test.reason) == ("skipped", "no scapy")


def test_a_crash_leaves_the_name_of_the_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import os\ndef test_a(): pass\ndef test_b(): os.abort()\n")
    lines = tmp_path / "outcomes.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.kernels.report",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
    ]
    arguments = ["--rootdir", str(tmp_path), "--outcomes", str(lines), str(tmp_path)]
    subprocess.run([*command, *arguments], cwd=TREE, capture_output=True, timeout=60)
    tests, running, status = read_outcomes(lines.read_text().splitlines())
    assert [test.nodeid for test in tests] == ["test_it.py::test_a"]
    assert (running, status) == ("test_it.py::test_b", None)
    assert json.loads(lines.read_text().splitlines()[-1])["event"] == "start"
