"""Tools whose system calls fail. Each run is a fork of one process that has imported everything.

outcomes = run(library, ["states", "-d", "0.05"], [Fault(calls=range(12, 13), error=errno.ENOMEM)])
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

FOR_EVER = 1 << 40
_SECONDS = 120  # for a run; then it hangs


class Fault(NamedTuple):
    """The calls `first` to before `until` fail with `error`; a process may have at most `files` files open."""

    first: int = 0
    until: int = 0
    error: int = 0
    files: int = 0


class Outcome(NamedTuple):
    """How a tool has ended. `hooks`: probe -> hook -> whether it is attached. `calls`: how many could have failed."""

    status: int
    stderr: str
    hooks: dict[str, dict[str, bool]]
    calls: int


def compiled(folder: Path) -> Path:
    """The library that makes calls fail."""
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def run(library: Path, words: Sequence[str], faults: Sequence[Fault]) -> list[Outcome]:
    """The outcome of `tcpscope WORDS` for each of these faults."""
    message = json.dumps([list(words), list(faults)])
    command = [sys.executable, "-m", "tests.faults"]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, input=message, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [Outcome(*each) for each in json.loads(done.stdout)]


def main() -> None:
    from tcpscope import tool

    words, faults = json.load(sys.stdin)
    tool.find(words[0])
    json.dump([_fork(words, Fault(*fault)) for fault in faults], sys.stdout)


def _fork(words: list[str], fault: Fault) -> Outcome:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
        if not (pid := os.fork()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said.fileno(), 2)
            signal.alarm(_SECONDS)
            os.pwrite(told.fileno(), json.dumps(_with(fault, words)).encode(), 0)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        said.seek(0), told.seek(0)
        stderr = said.read().decode()
        if status:
            return Outcome(-os.WTERMSIG(status) or os.WEXITSTATUS(status), stderr, {}, 0)
        code, hooks, calls = json.load(told)
        return Outcome(code, stderr, hooks, calls)


def _with(fault: Fault, words: list[str]) -> tuple[int, dict[str, dict[str, bool]], int]:
    """Run the command line in this process, with the fault."""
    from tcpscope import cli
    from tcpscope.kernel.loaded import Loaded

    hooks: dict[str, dict[str, bool]] = {}
    load = Loaded.__init__

    def noted(self: Loaded, *given: Any, **named: Any) -> None:
        load(self, *given, **named)
        planned = dict.fromkeys(self.spec.hooks, False)
        hooks[self.spec.name] = planned | {hook.name: hook.program is not None for hook in self.hooks.values()}

    Loaded.__init__ = noted  # type: ignore[method-assign]
    faults = ctypes.CDLL(os.environ["LD_PRELOAD"])
    faults.faults_arm.argtypes = ctypes.c_long, ctypes.c_long, ctypes.c_int
    faults.faults_calls.restype = ctypes.c_long
    sys.argv = ["tcpscope", *words]
    if fault.files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (fault.files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    faults.faults_arm(fault.first, fault.until, fault.error)
    status = 0
    with suppress(KeyboardInterrupt):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    calls = faults.faults_calls()
    faults.faults_arm(0, 0, 0)
    sys.stderr.flush()
    return status, hooks, calls


if __name__ == "__main__":
    main()
