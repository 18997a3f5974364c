from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.kernels import HOST, TWO, debian, guest, matrix, progress, rows
from tests.kernels.matrix import Job
from tests.kernels.rows import Chosen
from tests.kernels.summary import Result, Row

IMAGES = {name: debian.Image(name, f"{name}.4", "1", "/", "/vmlinuz") for name in ("5.10", "6.1", "7.3")}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for them, and no run that was told to end."""
    for module in (matrix, rows):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(guest, "stop", threading.Event())
    yield tmp_path


def test_the_longest_rows_begin_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a kernel between the tests that its probes need, with two processors those that need two."""
    asked: dict[str, dict[str, object]] = {}
    every, few = Chosen(None, 0, ["tests/a.py", "tests/b.py"]), Chosen(None, 0, ["tests/b.py"])
    asked_for: list[tuple[str, Sequence[str]]] = []

    def between(name: str, arguments: Sequence[str], paths: Sequence[str]) -> Chosen:
        asked_for.append((name, paths))
        return few

    def run_guest(name: str, image: debian.Image, chosen: Chosen, *_: object, **how: object) -> Row:
        asked[name] = {"release": image.release, "live": chosen.live, **how}
        return Row(name)

    monkeypatch.setattr(rows, "run_guest", run_guest)
    monkeypatch.setattr(rows, "concurrent", lambda arguments: few)
    monkeypatch.setattr(rows, "between", between)
    jobs = matrix._jobs(IMAGES, {"6.1": {"rtt": frozenset({"x"})}}, every, [], 9.0, False)
    assert [job.name for job in jobs] == [HOST, "5.10", "7.3", "6.1", TWO]
    for job in jobs:
        if job.name != HOST:
            job.make()
    usual = {"timeout_s": 9.0, "under_kvm": False}
    assert asked["5.10"] == {"release": "5.10.4", "live": every.live, **usual}
    assert asked["6.1"] == {"release": "6.1.4", "live": few.live, **usual}
    assert asked_for == [("6.1", ["tests/tools/test_rtt.py", "tests/tools/rtt/"])]
    assert asked[TWO] == {"release": "7.3.4", "live": few.live, **usual, "processors": 2}


def test_rows_run_side_by_side_and_are_told_in_order(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two guests at a time, and the host beside them."""
    together, guests = threading.Barrier(3, timeout=30), threading.Barrier(2, timeout=30)
    begun = threading.Event()

    def make(name: str) -> Row:
        if name == "6.1":
            begun.set()
        else:
            together.wait()
        if name in ("5.10", "7.3"):  # this machine's row has ended meanwhile, and a thread is free
            assert not begun.wait(0.5)
            guests.wait()
        return Row(name, tests=[Result("t", "passed", "", 0.1, True)])

    names = (HOST, "5.10", "7.3", "6.1")  # in the order of the run
    made = matrix._run([Job(name, partial(make, name)) for name in names], 2, progress.Progress())
    assert [row.name for row in made] == [HOST, "5.10", "7.3", "6.1"]
    assert {path.name for path in results.iterdir()} == {f"{name}.json" for name in names}
    assert "5.10: 1 passed in 0.00s" in capsys.readouterr().out


@pytest.mark.parametrize("recorded", [True, False])
def test_guests_wait_until_this_machine_has_recorded(recorded: bool) -> None:
    """Or until its row has ended: it may record nothing."""
    ready, begun = threading.Event(), threading.Event()

    def here() -> Row:
        assert not begun.wait(0.5)
        if recorded:
            ready.set()
            assert begun.wait(30)
        return Row(HOST)

    def there() -> Row:
        begun.set()
        return Row("6.1")

    made = matrix._run([Job(HOST, here), Job("6.1", there)], 2, progress.Progress(), ready.is_set)
    assert [row.name for row in made] == [HOST, "6.1"]
    assert begun.is_set()


def test_an_error_ends_the_other_rows() -> None:
    def wait() -> Row:
        assert guest.stop.wait(30)
        return Row("6.1")

    def fail() -> Row:
        raise debian.FetchError("no such kernel")

    with pytest.raises(debian.FetchError, match="no such kernel"):
        matrix._run([Job("6.1", wait), Job("5.10", fail)], 2, progress.Progress())


def test_what_failed_is_shown_and_nothing_else(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = ("collected 2", "=== FAILURES ===", "E assert 1 == 2", "=== short test summary info ===", "FAILED test_a")
    (results / "6.1.log").write_text("\n".join(log))
    matrix.show_failures(Row("6.1", tests=[Result("t", "passed", "", 0.1, True)]))
    assert capsys.readouterr().out == ""
    matrix.show_failures(Row("6.1", tests=[Result("test_a", "failed", "assert 1 == 2", 0.1, True)]))
    shown = capsys.readouterr().out
    assert "=== what failed on 6.1 ===" in shown and "E assert 1 == 2" in shown
    assert "collected" not in shown and "FAILED" not in shown
    (results / "6.1.log").write_text("Kernel panic\n")
    matrix.show_failures(Row("6.1", problem="the machine ended"))
    assert "Kernel panic" in capsys.readouterr().out
