"""Recorded tests, on files of tests of their own: what is played, what is asserted, and what fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lacks import functions_cannot_be_hooked
from tests.record.plugin import RECORDINGS
from tests.record.recording import MISSED_AT_MOST

FILE = """
import pytest
from tests.record import PORTS, Script, Test, Watch, recorded

CONNECT = Watch("connect", "--port", PORTS)

@pytest.mark.parametrize("port", [7000, 7001])
@recorded(CONNECT)
def test_refused(script: Script, port: int) -> Test:
    made = script.client.process("client").socket()
    call = made.connect(script.server.ipv4, port, may_fail=True)
    made.close()
    seen = yield
    row = seen.row(CONNECT, rport=port)
    assert (row["outcome"], row["errno"]) == ("REFUSED", call.errno)

@recorded(CONNECT)
def test_expects_too_much(script: Script) -> Test:
    script.client.flush()
    seen = yield
    seen.row(CONNECT)

@recorded(CONNECT)
def test_cannot_be_played(script: Script) -> Test:
    script.client.process("client").socket().connect(script.server.ipv4, 7000)
    yield

@recorded(CONNECT, Watch("queue", "--stack", every_kernel=False))
def test_has_a_tool_that_does_not_run(script: Script) -> Test:
    script.client.flush()
    seen = yield
    assert seen.rows(CONNECT) == []
    seen.rows(Watch("queue", "--stack"))

def test_is_not_recorded(): pass
"""


def pytest_in(folder: Path, tree: Path, *arguments: str, text: str = FILE) -> tuple[int, str]:
    (folder / "test_file.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "tests.record.plugin", "-p", "tests.kernels.report"]
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", folder, "--record-to", folder / "recording"]
    done = subprocess.run([*command, *options, *arguments, folder], cwd=tree, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> Path:
    """With the file, recorded once."""
    made = tmp_path_factory.mktemp("recorded")
    pytest_in(made, tree, "-k", "refused or too_much")
    return made


@pytest.mark.root
def test_it_is_played_and_asserted(folder: Path, tree: Path) -> None:
    status, text = pytest_in(folder, tree, "--recording", str(folder / "recording"), "-k", "refused or too_much")
    assert status == 1
    assert "2 passed" in text and "1 failed" in text
    assert "0 rows of connect with {}, not one" in text


@pytest.mark.root
def test_one_of_them_alone_is_asserted_over_the_same_recording(folder: Path, tree: Path) -> None:
    status, text = pytest_in(folder, tree, "--recording", str(folder / "recording"), "-k", "7001")
    assert (status, "1 passed" in text) == (0, True), text


@pytest.mark.root
def test_a_script_that_has_changed_needs_a_new_recording(folder: Path, tree: Path) -> None:
    changed = FILE.replace("    made.close()\n", "    made.close()\n    script.client.flush()\n")
    status, text = pytest_in(folder, tree, "--recording", str(folder / "recording"), "-k", "7000", text=changed)
    assert status == 1
    assert "the recording is not of this script" in text


def test_a_kernel_between_leaves_out_what_has_a_tool_that_is_not_for_it(tmp_path: Path, tree: Path) -> None:
    _, text = pytest_in(tmp_path, tree, "--between", "", "--collect-only", "-q")
    found = {line.partition("::")[2].partition("[")[0] for line in text.splitlines() if "::" in line}
    assert found == {"test_refused", "test_expects_too_much", "test_cannot_be_played"}


@pytest.mark.root
def test_what_the_actor_gives_up_fails_alone(tmp_path: Path, tree: Path) -> None:
    status, text = pytest_in(tmp_path, tree, "-k", "cannot or 7000")
    assert status == 1
    assert "it could not be played" in text and "Connection refused" in text
    assert "1 passed" in text and "1 failed" in text


@pytest.mark.root
def test_a_tool_that_does_not_run_fails_who_asks_it(tmp_path: Path, tree: Path) -> None:
    status, text = pytest_in(tmp_path, tree, "-k", "has_a_tool or 7000")
    assert status == 1
    assert "1 passed" in text and "1 failed" in text
    assert "tcpscope queue --stack: it ended with status 2" in text and "it goes with --events" in text


@pytest.mark.root
def test_a_tool_that_lost_something_fails_each_test_that_asks_it(folder: Path, tmp_path: Path, tree: Path) -> None:
    shutil.copytree(folder / "recording", tmp_path, dirs_exist_ok=True)
    (tool,) = tmp_path.glob("1/*.out")
    *rows, account = tool.read_text().splitlines(keepends=True)
    stats = json.loads(account)["stats"]
    stats |= {"seen": stats["seen"] + 3, "lost": 3}
    tool.write_text("".join([*rows, json.dumps({"stats": stats}) + "\n"]))
    status, text = pytest_in(folder, tree, "--recording", str(tmp_path), "-k", "7000")
    assert (status, "lost 3" in text) == (1, True), text


def with_unseen(folder: Path, missed: int, *events: dict[str, object]) -> None:
    """As if the tool had missed something and these events had been unseen."""
    (tool,) = folder.glob("*.out")
    *rows, account = tool.read_text().splitlines(keepends=True)
    stats = json.loads(account)["stats"] | {"missed": missed}
    tool.write_text("".join([*rows, json.dumps({"stats": stats}) + "\n"]))
    (folder / "unseen.json").write_text(json.dumps(events))


@pytest.mark.root
def test_a_tool_may_miss_what_was_unseen_and_no_more(folder: Path, tmp_path: Path, tree: Path) -> None:
    shutil.copytree(folder / "recording", tmp_path, dirs_exist_ok=True)
    late = {"us": 1e18, "task": "task (1)", "event": "inet_sock_set_state", "ports": [40000, 7000]}
    other = late | {"event": "tcp_probe"}
    others = MISSED_AT_MOST if functions_cannot_be_hooked() else 0  # of other programs' packets
    for missed, expected in ((others + 1, 0), (others + 2, 1)):
        with_unseen(tmp_path / "1", missed, late, other)
        status, text = pytest_in(folder, tree, "--recording", str(tmp_path), "-k", "7000")
        assert (status, f"missed {missed}" in text) == (expected, bool(expected)), text


@pytest.mark.root
def test_a_scenario_that_may_have_lost_something_fails(folder: Path, tmp_path: Path, tree: Path) -> None:
    shutil.copytree(folder / "recording", tmp_path, dirs_exist_ok=True)
    us = next(float(line.split()[3]) for line in (tmp_path / "1/log").read_text().splitlines() if line[0] == "r") / 1000
    with_unseen(tmp_path / "1", 0, {"us": us, "task": "task (1)", "event": "tcp_probe", "ports": [40000, 7000]})
    status, text = pytest_in(folder, tree, "--recording", str(tmp_path), "-k", "refused")
    assert status == 1
    assert "this kernel ran no program for a part of it" in text
    assert "1 passed" in text and "1 failed" in text


# The first recording is said to have lost something at port 7001, and no other to have lost anything.
CONFTEST = """
import json
from tests.record import plugin

record = plugin.record
recorded = []

def once(items, folder):
    made = record(items, folder)
    unseen = []
    if not recorded:
        log = (folder / "1/log").read_text().splitlines()
        us = max(int(line.split()[4]) for line in log if line.startswith("r 1 ")) / 1000
        unseen = [{"us": us, "task": "task (1)", "event": "tcp_probe", "ports": [7001]}]
    (folder / "1/unseen.json").write_text(json.dumps(unseen))
    recorded.append(folder)
    return made

plugin.record = once
"""


@pytest.mark.root
def test_it_alone_is_played_again(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    status, text = pytest_in(tmp_path, tree, "-k", "refused")
    assert status == 0, text
    assert "2 passed" in text
    assert "PLAYED AGAIN 1 of 2 scenarios, since this kernel ran no program in task (1)" in text
    again = (tmp_path / "recording/again-1/1/script").read_text()
    assert [line for line in again.splitlines() if line.startswith("S ")] == ["S test_file.py::test_refused[7001]"]
    assert not (tmp_path / "recording/again-2").exists()


DISCARDS = FILE.replace("@recorded(CONNECT)", "@recorded(CONNECT, discards=True)", 1)


@pytest.mark.root
@pytest.mark.parametrize(("text", "again"), [(FILE, 0), (DISCARDS, 1)])
def test_an_unseen_discard_has_no_ports(tmp_path: Path, tree: Path, text: str, again: int) -> None:
    """It concerns all that is played then, and so only those that have to see discards are played again."""
    (tmp_path / "conftest.py").write_text(CONFTEST.replace('"tcp_probe", "ports": [7001]', '"kfree_skb", "ports": []'))
    status, said = pytest_in(tmp_path, tree, "-k", "refused", text=text)
    assert (status, said.count("PLAYED AGAIN"), said.count("2 passed")) == (0, again, 1), said


SUPPOSES = """
from tests.record import PORTS, Script, Test, Watch, recorded

CONNECT = Watch("connect", "--port", PORTS)

@recorded(CONNECT)
def test_is_always_so(script: Script) -> Test:
    script.suppose(script.client.counter("TcpRetransSegs"), 0, "something was sent again")
    yield

@recorded(CONNECT)
def test_is_never_so(script: Script) -> Test:
    script.suppose(script.client.counter("TcpRetransSegs"), 1, "nothing was sent again")
    yield
"""


@pytest.mark.root
def test_what_was_not_as_supposed_is_played_again(tmp_path: Path, tree: Path) -> None:
    status, text = pytest_in(tmp_path, tree, text=SUPPOSES)
    assert status == 1
    assert "1 passed" in text and "1 failed" in text
    assert "\nnothing was sent again\n" in text
    assert text.count("PLAYED AGAIN 1 of 2 scenarios, since nothing was sent again") == RECORDINGS


def test_only_the_script_is_written(tmp_path: Path, tree: Path) -> None:
    target = tmp_path / "composed"
    target.mkdir()
    pytest_in(tmp_path, tree, "--compose", str(target))
    assert (target / "1/script").read_text().count("S ") == 5
    watches = [[False, [], "connect", "--port", "6000-9999"], [False, [], "queue", "--stack"]]
    assert json.loads((target / "1/watches.json").read_text()) == watches
    assert (target / "actor").stat().st_mode & 0o100
    assert not (target / "1/log").exists()
