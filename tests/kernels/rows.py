"""A row of the matrix: the machine's own kernel, or one in a guest, which plays what is recorded and runs the rest."""

from __future__ import annotations

import compileall
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.kernels import HOST, guest, install, summary
from tests.kernels.debian import Image
from tests.kernels.guest import TREE, Guest
from tests.record import parts

RESULTS = TREE / ".cache/results"
RECORDINGS = TREE / ".cache/recordings"
SCRIPT = RECORDINGS / "script"
BOOTS = 2
PYTEST = (sys.executable, "-m", "pytest", "-p", "tests.kernels.report", "-p", "tests.record.plugin")
LIVE = "kernel and not recorded"
LIVE_FILES = "live.json"
OPTIONS = "options.json"
"""Beside a recording: the options with which its tests were chosen."""
CONCURRENT = "concurrent"


def outcomes_of(name: str) -> Path:
    """Where the outcomes of a row are written, while it runs, too."""
    return RESULTS / f"{name.replace(' ', '-')}.jsonl"


def log_of(name: str) -> Path:
    """What pytest printed of a row."""
    return RESULTS / f"{name.replace(' ', '-')}.log"


def run_host(arguments: Sequence[str], show: Callable[[str], None] | None = None) -> summary.Row:
    """Run all tests here, as root where that can be had. What they print goes to the log if it is not shown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    outcomes = outcomes_of(HOST)
    outcomes.unlink(missing_ok=True)
    command = [*PYTEST, "--outcomes", str(outcomes), *arguments]
    if os.geteuid() != 0 and shutil.which("sudo"):
        # Root leaves nothing behind in the tree.
        keep_clean = ("PYTHONDONTWRITEBYTECODE=1", "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis")
        command = ["sudo", "env", *keep_clean, *command, "-p", "no:cacheprovider"]
    started = time.monotonic()
    with log_of(HOST).open("w") as log:
        output = {} if show is None else {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=TREE, **output) as process:
            try:
                while process.poll() is None and not guest.stop.wait(0.2):
                    pass
            finally:
                process.send_signal(signal.SIGINT)  # nothing, if it has ended; else its tests clean up
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    total_s = time.monotonic() - started
    return summary.make_row(HOST, platform.release(), lines, exit_status=process.returncode, total_s=total_s)


class Chosen(NamedTuple):
    """What pytest's arguments choose of the tests of the kernel."""

    script: Path | None
    """The folder with the scripts of those that are recorded, None if there are none."""
    recorded: int
    live: list[str]
    """The files that have others."""
    between: str | None = None
    """For a kernel between the oldest and the newest: below which paths (:) it runs all tests, not only those of every
    kernel."""

    @property
    def options(self) -> list[str]:
        """Of pytest."""
        return [] if self.between is None else ["--between", self.between]


def compose(
    arguments: Sequence[str], *, marked: str = "", between: Sequence[str] | None = None, folder: Path = SCRIPT
) -> Chosen:
    """Choose, and write the scripts into a folder.

    `between`: only tests of every kernel, and those below these paths.
    """
    chosen = Chosen(None, 0, [], None if between is None else ":".join(between))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ["-q", "-p", "no:cacheprovider", "-m", marked, "--compose", str(folder), *chosen.options, *arguments]
    # Python's and pytest's bytecode stays beside the tests: a guest takes long to compile, and to rewrite asserts.
    caching = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    compileall.compile_dir(TREE / "tests", quiet=2)
    done = subprocess.run([*PYTEST, *options], cwd=TREE, env=caching, capture_output=True, text=True)
    if not (folder / LIVE_FILES).exists():
        raise install.BuildError(f"no script could be made:\n{done.stdout}{done.stderr}")
    scripts = [(part / parts.SCRIPT).read_text().splitlines() for part in parts.of(folder)]
    recorded = sum(line.startswith("S ") for script in scripts for line in script)
    live = json.loads((folder / LIVE_FILES).read_text())
    return chosen._replace(script=folder if recorded else None, recorded=recorded, live=live)


def between(name: str, arguments: Sequence[str], paths: Sequence[str]) -> Chosen:
    """Choose what a kernel between the oldest and the newest runs."""
    return compose(arguments, between=paths, folder=SCRIPT.with_name(f"script-{name}"))


def concurrent(arguments: Sequence[str]) -> Chosen:
    """Choose what needs true concurrency."""
    return compose(arguments, marked=CONCURRENT, folder=SCRIPT.with_name("script-concurrent"))


def run_guest(
    name: str,
    image: Image,
    chosen: Chosen,
    arguments: Sequence[str],
    *,
    timeout_s: float,
    under_kvm: bool,
    processors: int = 1,
    show: Callable[[str], None] | None = None,
) -> summary.Row:
    """Record what was chosen, run the live tests in the same boot, and assert over the recording afterwards, here.

    With several processors only what needs them runs. What is printed goes to the row's log and, if given, to `show`.
    """
    if not (chosen.script or chosen.live):
        # A kernel between may need none of the tests that were named.
        return summary.Row(name, image.release, problem="" if arguments and chosen.options else summary.NOTHING)
    marked = "" if processors == 1 else f" and {CONCURRENT}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    outcomes, recording = outcomes_of(name), RECORDINGS / name.replace(" ", "-")
    for old in (outcomes, outcomes.with_suffix(".asserted")):
        old.unlink(missing_ok=True)
    shutil.rmtree(recording, ignore_errors=True)
    with Guest(image, processors=processors) as machine, log_of(name).open("w", buffering=1) as log:

        def note(line: str) -> None:
            log.write(f"{line}\n")
            if show:
                show(line)

        # hypothesis' plugin imports the whole of it at the end of each run: ten seconds there.
        environment = install.staged(machine.site) | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        there = machine.shared / "recording"
        within = machine.shared / "outcomes.jsonl"
        outcomes.symlink_to(within)
        steps = []
        if chosen.script:
            shutil.copytree(chosen.script, there)
            steps.append(f"{sys.executable} -m tests.record.recorder {there}; echo $? >{there}/status")
        if chosen.live:
            pytest = [*PYTEST, "-p", "no:cacheprovider", "--outcomes", str(within), "-m", f"{LIVE}{marked}"]
            steps.append(f"exec {shlex.join([*pytest, *chosen.options, *(arguments or chosen.live)])}")
        for _ in range(BOOTS):
            note(f"booting {image.release}")
            outcome = machine.run(["sh", "-c", "; ".join(steps)], environment, timeout_s, note, kvm=under_kvm)
            if outcome.problem:
                for line in ("--- the end of the console ---", *machine.console(), f"--- {outcome.problem}"):
                    note(line)
            if outcome.boot_s is not None or guest.stop.is_set():
                break  # What goes wrong from here on is a result; that a machine does not start is none.
        outcomes.unlink()
        if within.exists():
            shutil.copyfile(within, outcomes)
        if there.exists():
            shutil.copytree(there, recording)
            (recording / OPTIONS).write_text(json.dumps(chosen.options))
    row = summary.Row(name, image.release, [], outcome.problem, outcome.boot_s, outcome.total_s)
    if chosen.live:
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        live = summary.make_row(name, image.release, lines, exit_status=outcome.status, problem=outcome.problem)
        row.tests, row.problem = live.tests, live.problem
    if chosen.script:
        options = ["-m", f"recorded{marked}", *chosen.options, *arguments]
        row = summary.joined(row, check(name, image.release, recording, options))
    return row


def check(name: str, release: str, recording: Path, options: Sequence[str]) -> summary.Row:
    """Assert over a recording, with these options of pytest."""
    started = time.monotonic()
    status = recording / "status"
    if not status.exists() or status.read_text().strip() != "0":
        said = next((line for line in log_of(name).read_text().splitlines() if line.startswith("no recording")), "")
        return summary.Row(name, release, problem=said or "nothing was recorded")
    outcomes = outcomes_of(name).with_suffix(".asserted")
    command = [*PYTEST, "-p", "no:cacheprovider", "--outcomes", str(outcomes), "--recording", str(recording)]
    with log_of(name).open("a") as log:
        done = subprocess.run([*command, *options], cwd=TREE, stdout=log, stderr=subprocess.STDOUT)
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    total_s = time.monotonic() - started
    return summary.make_row(name, release, lines, exit_status=done.returncode, total_s=total_s)
