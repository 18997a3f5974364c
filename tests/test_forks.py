"""A tool that was forked is what one that was started is."""

from __future__ import annotations

import re
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import RunningTool, until
from tests.forks import Fork

STATUS = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def seen_from_outside(pid: int) -> dict[str, Any]:
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    return {
        "comm": (process / "comm").read_text(),
        "limits": (process / "limits").read_text(),
        "status": {name: status[name] for name in STATUS},
        "files": Counter(kind(file) for file in (process / "fd").iterdir()),
        "standard files": [kind(process / "fd" / name) for name in "012"],
        "directory": (process / "cwd").readlink(),
    }


def kind(file: Path) -> str:
    return re.sub(r"\d+", "N", str(file.readlink()))


def pipes(pid: int) -> int:
    found = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found += kind(file) == "pipe:[N]"
    return found


def test_it_has_and_may_the_same(run_tool: type[RunningTool]) -> None:
    with run_tool("states") as forked, run_tool("states", env={"STARTED": "1"}) as started:
        assert isinstance(forked.process, Fork) and not isinstance(started.process, Fork)
        # That it is ready is known a moment before it has closed the pipe that says so.
        until(lambda: pipes(forked.pid) == pipes(started.pid), "as many pipes")
        assert seen_from_outside(forked.pid) == seen_from_outside(started.pid)


def test_it_ends_the_same_way(run_tool: type[RunningTool]) -> None:
    for env in (None, {"STARTED": "1"}):
        with run_tool("states", "--nonsense", ready=False, env=env) as wrong:
            done = wrong.wait()
        assert (done.status, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert "--nonsense" in done.stderr
        with run_tool("states", env=env) as ended:
            assert ended.stop(signal.SIGTERM).status == 0
        with run_tool("states", env=env) as killed:
            assert killed.stop(signal.SIGKILL).status == -signal.SIGKILL
