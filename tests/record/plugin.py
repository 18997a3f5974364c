"""The pytest plugin of recorded tests: scripts are made when tests are collected, and tests wait for the recording.

pytest tests/tools/test_states.py              records here what the chosen tests do, and asserts
pytest --compose FOLDER                        writes their script only: a guest plays it
pytest --recording FOLDER -m recorded          asserts over a recording that was made elsewhere, or before
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tcpscope.lab import processes

pytest.register_assert_rewrite("tests.record.recording")  # before it is imported

from tests.lacks import functions_cannot_be_hooked  # noqa: E402
from tests.record import parts, unseen  # noqa: E402
from tests.record.recording import Recording, Seen, read  # noqa: E402
from tests.record.script import Script  # noqa: E402
from tests.record.watch import Watch  # noqa: E402

TREE = Path(__file__).resolve().parents[2]
LIVE = "live.json"
"""Beside a script that was only written: the files with tests of the kernel that are not recorded."""
HERE = TREE / ".cache/recordings/host"
ACTOR = TREE / ".cache/actor"

Test = Generator[None, Seen, None]
"""What a recorded test returns: `seen = yield`."""


class Recorded:
    """What the marker of a test holds: how its script is made, and which tools watch it."""

    def __init__(self, function: Callable[..., Test], watches: tuple[Watch, ...], discards: bool = False) -> None:
        self.function, self.watches = function, watches
        self.discards = discards or any(watch.argv[0] == "drop" for watch in watches)

    def begin(self, parameters: dict[str, Any]) -> tuple[Script, Test]:
        """Its script, and the test, which waits at its `yield`."""
        script = Script()
        test = self.function(script, **parameters)
        next(test)
        return script, test


def recorded(*watches: Watch, discards: bool = False) -> Callable[[Callable[..., Test]], Callable[..., None]]:
    """A test that is played and recorded while these tools run: see tests/record. On every kernel, if they all are.

    `discards`: `diagnose` has to see what a timer discards, which no witness of unseen events knows by its ports.
    """

    def decorate(function: Callable[..., Test]) -> Callable[..., None]:
        how = Recorded(function, watches, discards)

        def test(request: pytest.FixtureRequest, recordings: list[Recording], **parameters: Any) -> None:
            script, played = how.begin(parameters)
            name = name_of(request.node)
            recording = next((made for made in recordings if name in made.scenarios), None)
            if recording is None or (found := recording.scenarios[name]).text != script.text:
                pytest.fail("the recording is not of this script: record it again", pytrace=False)
            if name in recording.incomplete:
                pytest.fail(
                    f"this kernel ran no program for a part of it, {RECORDINGS} times: {recording.folder}",
                    pytrace=False,
                )
            if found.failure:
                pytest.fail(f"it could not be played: {found.failure}", pytrace=False)
            script.resolve(found)
            if script.unmet:
                pytest.fail("; ".join(script.unmet), pytrace=False)
            try:
                played.send(Seen(recording, script))
            except StopIteration:
                return
            pytest.fail("it yields twice", pytrace=False)

        own = list(inspect.signature(function).parameters.values())[1:]
        given = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("request", "recordings")]
        test.__signature__ = inspect.Signature([*given, *own])  # type: ignore[attr-defined]
        test.__name__, test.__doc__, test.__module__ = function.__name__, function.__doc__, function.__module__
        test.__qualname__ = function.__qualname__
        marked: Callable[..., None] = pytest.mark.kernel(pytest.mark.recorded(how)(test))
        return pytest.mark.every_kernel(marked) if all(watch.every_kernel for watch in watches) else marked

    return decorate


def name_of(item: pytest.Item) -> str:
    """Of its scenario."""
    return item.nodeid.replace("\n", " ")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compose", type=Path, help="only write the script of the recorded tests into this folder")
    parser.addoption("--recording", type=Path, help="the recording that recorded tests are asserted over")
    parser.addoption("--record-to", type=Path, default=HERE, help="where a recording is made, if there is none")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "recorded(how): played on a kernel and asserted over its recording")


RECORDINGS = 6
"""At most of one scenario: where the kernel runs no program at times, or was not as supposed (Script.suppose)."""
_chosen = pytest.StashKey[list[pytest.Item]]()
_again = pytest.StashKey[list[str]]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_chosen] = [item for item in items if item.get_closest_marker("recorded")]
    if folder := config.getoption("--compose"):
        compose(config.stash[_chosen], folder)
        live = {
            item.nodeid.partition("::")[0]
            for item in items
            if item.get_closest_marker("kernel") and not item.get_closest_marker("recorded")
        }
        (folder / LIVE).write_text(json.dumps(sorted(live)))
        config.hook.pytest_deselected(items=items)
        items.clear()


def compose(items: list[pytest.Item], folder: Path) -> None:
    """Write what is played and which tools watch it, each part into a folder of its own."""
    for number, part in enumerate(parts.split([(item, how_of(item).watches) for item in items]), 1):
        (folder / str(number)).mkdir()
        watches: dict[Watch, None] = {}
        with (folder / str(number) / parts.SCRIPT).open("w") as file:
            for item in part:
                script, test = how_of(item).begin(parameters_of(item))
                test.close()
                watches |= dict.fromkeys(how_of(item).watches)
                file.write(f"S {name_of(item)}\n{script.text}")
        asked = [[watch.moment, watch.lacks, *watch.argv] for watch in watches]
        (folder / str(number) / "watches.json").write_text(json.dumps(asked))
    shutil.copy(built(), folder / "actor")


def how_of(item: pytest.Item) -> Recorded:
    marker = item.get_closest_marker("recorded")
    assert marker is not None
    how: Recorded = marker.args[0]
    return how


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def built() -> Path:
    """The actor, compiled anew if its source has changed. Static: a guest reads one file."""
    sources = sorted((Path(__file__).parent / "actor").iterdir())
    if not ACTOR.exists() or ACTOR.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        ACTOR.parent.mkdir(exist_ok=True)
        new = ACTOR.with_suffix(f".{os.getpid()}")
        flags = ["-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-static", "-pthread"]
        subprocess.run(["gcc", *flags, "-o", new, *(s for s in sources if s.suffix == ".c")], check=True)
        new.rename(ACTOR)
    return ACTOR


@pytest.fixture(scope="session")
def recordings(request: pytest.FixtureRequest) -> list[Recording]:
    """What recorded tests are asserted over: the newest first.

    A kernel without functions to hook may run no program in some of its tasks. What a softirq does that interrupts one
    of them, no tool sees. Whether that happened independent witnesses say (unseen.py), not the tool, and before
    anything is asserted: a scenario to which it may have happened is played again, and the summary says so. So is one
    in which the machine did not do what the scenario supposes.
    """
    if folder := request.config.getoption("--recording"):
        return read(folder)
    items, made = request.config.stash[_chosen], list[Recording]()
    total = len(items)
    target = request.config.getoption("--record-to")
    shutil.rmtree(target, ignore_errors=True)
    for again in range(RECORDINGS):
        last = record(items, target / f"again-{again}" if again else target)
        made = [*last, *made]
        why = {item: said for item in items if (said := [each for part in last for each in _flaws(item, part)])}
        if not why:
            break
        items = list(why)
        reasons = "; ".join(sorted({said for each in why.values() for said in each}))
        request.config.stash.setdefault(_again, []).append(f"{len(items)} of {total} scenarios, since {reasons}")
    (target / parts.RECORDED).touch()
    return made


def _flaws(item: pytest.Item, part: Recording) -> list[str]:
    """Why its scenario is played again, if it is in this part and that is needed."""
    name, how = name_of(item), how_of(item)
    if name not in part.scenarios:
        return []
    if name in (part.incomplete | part.without_discards if how.discards else part.incomplete):
        tasks = ", ".join(sorted({each.task for each in part.unseen}))
        return [f"this kernel ran no program in {tasks}"]
    if part.scenarios[name].failure:
        return []
    script, test = how.begin(parameters_of(item))
    test.close()
    script.resolve(part.scenarios[name])
    return script.unmet


def record(items: list[pytest.Item], folder: Path) -> list[Recording]:
    """Record these tests here."""
    folder.mkdir(parents=True)
    compose(items, folder)
    if functions_cannot_be_hooked():
        unseen.compiled(folder / "unseen.bpf.o")
    command = [sys.executable, "-m", "tests.record.recorder", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with processes.start(command, cwd=TREE, text=True, **pipes) as recorder:  # dies with this process
        _, said = recorder.communicate()
    if recorder.returncode:
        pytest.fail(f"nothing was recorded: {said.strip()[-2000:]}", pytrace=False)
    return read(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for said in config.stash.get(_again, []):
        terminalreporter.write_line(f"PLAYED AGAIN {said}")
