"""Recording in a guest: the script is made here, played there, and the recording lies here again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kernels import install
from tests.kernels.debian import Image
from tests.kernels.guest import TREE, Guest, Outcome

RECORDINGS = TREE / ".cache/recordings"
TIMEOUT_S = 1200


def folder_of(row: str) -> Path:
    """Where the recording of a kernel lies."""
    return RECORDINGS / row


def compose(folder: Path, tests: Sequence[str] = ()) -> None:
    """Write the script of these tests, of all recorded ones without any, into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ("-q", "-m", "recorded", "-p", "no:cacheprovider", "--compose", str(folder))
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=TREE, capture_output=True, text=True)
    if not (folder / "watches.json").exists():
        raise RuntimeError(f"no script could be made: {done.stdout}{done.stderr}")


def record(image: Image, row: str, tests: Sequence[str], *, show: Callable[[str], None], under_kvm: bool) -> Outcome:
    """Play these tests on a kernel. The guest has the folder's files as its own while it plays."""
    folder = folder_of(row)
    compose(folder, tests)
    with Guest(image) as machine:
        environment = install.staged(machine.site)
        there = machine.shared / "recording"
        shutil.copytree(folder, there)
        command = [sys.executable, "-m", "tests.record.recorder", str(there)]
        outcome = machine.run(command, environment, TIMEOUT_S, show, kvm=under_kvm)
        if outcome.problem:
            for line in (*machine.console(), outcome.problem):
                show(line)
        shutil.rmtree(folder)
        shutil.copytree(there, folder)
    return outcome
