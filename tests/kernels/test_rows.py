from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.kernels import debian, guest, rows, summary
from tests.kernels.guest import Outcome
from tests.kernels.rows import Chosen
from tests.kernels.summary import Row

IMAGE = debian.Image("6.1", "6.1.4", "1", "/", "/vmlinuz")
PASSED = [
    {"event": "collected", "count": 1},
    {"event": "start", "nodeid": "tests/a.py::test_a"},
    {
        "event": "test",
        "nodeid": "tests/a.py::test_a",
        "outcome": "passed",
        "reason": "",
        "duration": 0.5,
        "setup": 1.0,
        "kernel": True,
    },
    {"event": "end", "status": 0},
]
LIVE = Chosen(None, 0, ["tests/a.py"])


class Machine:
    """A guest that writes these outcomes; the first boots go wrong."""

    made: list[Machine]
    outcomes: list[dict[str, object]] = PASSED
    status = 0
    failing = 0

    def __init__(self, folder: Path, processors: int) -> None:
        self.processors, self.shared, self.site = processors, folder / "shared", folder / "site"
        self.commands: list[str] = []
        self.environment: Mapping[str, str] = {}
        self.shared.mkdir()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        timeout_s: float,
        show: Callable[[str], None],
        *,
        kvm: bool,
    ) -> Outcome:
        self.commands.append(command[-1])
        self.environment = environment
        show(f"a line of boot {len(self.commands)}")
        if len(self.commands) <= self.failing:
            return Outcome(None, "the machine ended without an exit status", None, 1.0)
        lines = [json.dumps(record) for record in self.outcomes]
        (self.shared / "outcomes.jsonl").write_text("\n".join(lines))
        if (self.shared / "recording").exists():
            (self.shared / "recording/status").write_text("1\n")
            show("no recording: the actor ended")
        return Outcome(self.status, "", 5.0, 20.0)

    def console(self) -> list[str]:
        return ["Kernel panic"]


@pytest.fixture(autouse=True)
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Machine]]:
    class Here(Machine):
        made: list[Machine] = []

    def make(image: debian.Image, *, processors: int = 1) -> Machine:
        folder = tmp_path / f"guest-{len(Here.made)}"
        folder.mkdir()
        Here.made.append(Here(folder, processors))
        return Here.made[-1]

    monkeypatch.setattr(rows, "Guest", make)
    monkeypatch.setattr(rows.install, "staged", lambda site: {"PYTHONPATH": str(site)})
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(rows, "RECORDINGS", tmp_path / "recordings")
    monkeypatch.setattr(guest, "stop", threading.Event())
    yield Here


def run(chosen: Chosen = LIVE, arguments: Sequence[str] = (), *, processors: int = 1) -> Row:
    return rows.run_guest("6.1", IMAGE, chosen, arguments, timeout_s=9, under_kvm=False, processors=processors)


def test_a_row_has_the_tests_and_the_times_of_its_guest(machines: type[Machine]) -> None:
    row = run()
    assert [(test.nodeid, test.duration_s, test.setup_s) for test in row.tests] == [("tests/a.py::test_a", 0.5, 1.0)]
    assert (row.name, row.release, row.boot_s, row.total_s, row.good) == ("6.1", "6.1.4", 5.0, 20.0, True)
    (machine,) = machines.made
    (command,) = machine.commands
    assert machine.processors == 1
    assert "-m 'kernel and not recorded'" in command and command.endswith(" tests/a.py")
    assert machine.environment["PYTHONPATH"] == str(machine.site)
    assert rows.log_of("6.1").read_text() == "booting 6.1.4\na line of boot 1\n"


def test_a_kernel_between_is_told_which_tests_it_needs(machines: type[Machine]) -> None:
    run(LIVE._replace(between="tests/b.py:tests/c/"))
    assert " --between tests/b.py:tests/c/ " in machines.made[0].commands[0]


def test_two_processors_run_what_needs_them(machines: type[Machine]) -> None:
    run(processors=2)
    (machine,) = machines.made
    assert machine.processors == 2
    assert "-m 'kernel and not recorded and concurrent'" in machine.commands[0]


@pytest.mark.parametrize(("failing", "boots", "good"), [(1, 2, True), (2, 2, False)])
def test_a_machine_that_does_not_start_is_started_once_more(
    machines: type[Machine], failing: int, boots: int, good: bool
) -> None:
    machines.failing = failing
    row = run()
    assert len(machines.made[0].commands) == boots
    assert row.good == good
    assert good or row.problem == "the machine ended without an exit status"
    assert "Kernel panic" in rows.log_of("6.1").read_text()


@pytest.mark.parametrize(
    ("arguments", "between", "good"), [([], "", False), (["-k", "x"], "", True), (["-k", "x"], None, False)]
)
def test_only_a_kernel_between_may_need_none_of_the_tests_that_were_named(
    machines: type[Machine], arguments: list[str], between: str | None, good: bool
) -> None:
    row = run(Chosen(None, 0, [], between), arguments)
    assert (row.problem, row.good) == ("" if good else summary.NOTHING, good)
    assert machines.made == []


def test_nothing_chosen_boots_nothing(machines: type[Machine]) -> None:
    assert run(Chosen(None, 0, [])).problem == summary.NOTHING
    assert machines.made == []


def test_a_recorder_that_fails_is_a_problem_beside_the_live_tests(tmp_path: Path, machines: type[Machine]) -> None:
    script = tmp_path / "script"
    script.mkdir()
    (script / "1").mkdir()
    (script / "1/script").write_text("S one\n")
    row = run(Chosen(script, 1, ["tests/a.py"]))
    assert row.problem == "no recording: the actor ended"
    assert [test.outcome for test in row.tests] == ["passed"]
    command = machines.made[0].commands[0]
    assert command.index("-m tests.record.recorder") < command.index("-m pytest")
    assert (rows.RECORDINGS / "6.1/1/script").read_text() == "S one\n"  # to be looked at


def test_what_a_guest_imports_is_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: type[Machine]
) -> None:
    """With pytest's rewritten asserts, and also where the environment tells Python to write no bytecode."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text("def test_it(): assert 1 == 1\n")
    (tmp_path / "tests/helper.py").touch()
    chosen = tmp_path / "chosen"

    def collect(command: Sequence[str], *, env: Mapping[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        plain = [*rows.PYTEST[:3], "-q", "--collect-only", "-p", "no:cacheprovider", "-c", "/dev/null", "tests"]
        done = subprocess.run(plain, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        (chosen / rows.LIVE_FILES).write_text('["tests/test_it.py"]')
        return done

    monkeypatch.setattr(rows, "TREE", tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with monkeypatch.context() as patched:
        patched.setattr(rows, "subprocess", type("", (), {"run": staticmethod(collect)}))
        assert rows.compose([], folder=chosen) == Chosen(None, 0, ["tests/test_it.py"])
    assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1"
    compiled = {path.name.rpartition(".")[0] for path in (tmp_path / "tests/__pycache__").iterdir()}
    assert any(name.startswith("test_it.") and "-pytest-" in name for name in compiled)
    assert any(name.startswith("helper.") for name in compiled)
