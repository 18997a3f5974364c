import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels import KERNELS, debian, guest
from tests.kernels.guest import Guest, _script, _Tail


def test_the_script_keeps_arguments_and_values_whole(tmp_path: Path) -> None:
    command = ["printf", "%s|", "$A", "two words", "it's"]
    text = _script(command, {"A": "x 'y' $HOME"}) + ""
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "$A|two words|it's|"
    done = subprocess.run(["sh", "-c", _script(["env"], {"A": "x 'y' $HOME"})], capture_output=True, text=True)
    assert "A=x 'y' $HOME" in done.stdout.splitlines()


def test_lines_are_shown_once_and_whole(tmp_path: Path) -> None:
    shown: list[str] = []
    path = tmp_path / "output"
    with _Tail(path, shown.append) as tail, path.open("a", buffering=1) as output:
        output.write("first\nsec")
        output.flush()
        tail.read()
        assert shown == ["first"]
        output.write("ond\nno newline at the end")
        output.flush()
    assert shown == ["first", "second", "no newline at the end"]


@pytest.fixture
def image() -> debian.Image:
    cached = next((image for kernel in reversed(KERNELS) if (image := debian.cached(kernel))), None)
    if not cached or not shutil.which("qemu-system-x86_64"):
        pytest.skip("no kernel has been fetched here, or QEMU is missing")
    return cached


@pytest.fixture(autouse=True)
def without_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole run other guests have all places for minutes, and these here are short."""
    monkeypatch.setattr(guest, "_take_place", lambda: os.open(os.devnull, os.O_RDONLY))


def run(image: debian.Image, command: str, timeout_s: float = 120, boots: int = 2) -> tuple[guest.Outcome, list[str]]:
    shown: list[str] = []
    for _ in range(boots):  # that a machine does not start is no result
        with Guest(image) as machine:
            outcome = machine.run(["sh", "-c", command], {"WORD": "carried over"}, timeout_s, shown.append)
            print(*machine.console(), sep="\n")
        if outcome.boot_s is not None:
            break
    return outcome, shown


def test_a_guest_brings_back_output_and_status(image: debian.Image) -> None:
    checks = "uname -r; echo $WORD; touch /tmp/x; grep -c tracefs /proc/mounts; pwd; exit 3"
    outcome, shown = run(image, checks)
    assert (outcome.status, outcome.problem) == (3, "")
    assert shown == [image.release, "carried over", "1", str(guest.TREE)]


def test_a_kernel_that_crashes_is_a_problem(image: debian.Image) -> None:
    outcome, _ = run(image, "echo c > /proc/sysrq-trigger; sleep 60")
    assert outcome.status is None
    assert "Kernel panic - not syncing: sysrq triggered crash" in outcome.problem


def test_a_guest_that_takes_too_long_is_ended(image: debian.Image) -> None:
    outcome, shown = run(image, "echo here", timeout_s=1, boots=1)
    assert (outcome.status, outcome.problem) == (None, "not done after 1 s before the command began")
    assert (outcome.boot_s, shown) == (None, [])
    assert outcome.total_s < guest.BOOT_TIMEOUT_S
