"""What a kernel between the oldest and the newest runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import choice, rows
from tests.kernels.debian import Image

IMAGES = {name: Image(name, f"{name}.4", "1", "/", "/vmlinuz") for name in ("5.10", "6.1", "7.3")}

ONLY = frozenset({"syn: syn__kprobe"})

TESTS = """
import pytest
pytestmark = pytest.mark.kernel
@pytest.mark.every_kernel
def test_everywhere(): pass
def test_of_a_tool(): pass
"""


def test_the_oldest_and_the_newest_run_everything() -> None:
    assert [choice.everything(name, list(IMAGES)) for name in IMAGES] == [True, False, True]


def test_what_a_kernel_has_alone_brings_the_tests_of_its_probe() -> None:
    found = choice.paths({"listeners": ONLY})
    assert "tests/tools/queue/" in found
    assert not any("states" in path or path.startswith("tests/bpf") for path in found)
    assert {"tests/bpf/", "tests/tools/life/"} <= set(choice.paths({"life": ONLY}))
    assert choice.paths({}) == []


def test_what_tests_of_every_kernel_cover_brings_no_others(tree: Path) -> None:
    """And these are there, each of them for every kernel."""
    mptcp = "mptcp_sock.subflow: 8 bytes"
    assert choice.paths({"listeners": frozenset({mptcp, "kernel functions: none"})}) == []
    assert choice.paths({"listeners": ONLY | {mptcp}}) != []
    tests = {test for by_probe in choice.SHOWN.values() for test in by_probe.values()}
    command = [*rows.PYTEST, "--collect-only", "-q", "-p", "no:cacheprovider", "--between", "", *sorted(tests)]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout.splitlines()
    assert {line.partition("[")[0] for line in found if "::" in line} == tests


def test_the_page_says_why() -> None:
    page = choice.page(IMAGES, {"6.1": {"listeners": frozenset({"syn: syn__kprobe"})}})
    assert "| 5.10 | 5.10.4 | everything |" in page
    assert "all of `listeners`, which alone has `syn: syn__kprobe`" in page
    page = choice.page(IMAGES, {"6.1": {"rtt": frozenset({"mptcp_sock.subflow: 8 bytes"})}})
    test = "`tests/tools/rtt/test_keys.py::test_mptcp`"
    assert f"; alone it has for `rtt` `mptcp_sock.subflow: 8 bytes`, which {test} covers" in page


@pytest.mark.parametrize(("paths", "passed"), [("", 1), ("test_a.py", 2), ("test_b.py", 1)])
def test_a_kernel_between_leaves_the_others_out(tmp_path: Path, tree: Path, paths: str, passed: int) -> None:
    (tmp_path / "test_a.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.report", "-p", "no:cacheprovider"]
    options = ["-c", "/dev/null", "--rootdir", tmp_path, "--between", paths, tmp_path]
    done = subprocess.run([*command, *options], cwd=tree, capture_output=True, text=True)
    assert f"{passed} passed" in done.stdout, done.stdout
