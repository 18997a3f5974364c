"""Run a tool beside a scenario, and show its output between the steps of the scenario."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from tcpscope.errors import TcpscopeError
from tcpscope.lab import processes
from tcpscope.lab.hosts import Lab
from tcpscope.output import screen

READY_FD = "TCPSCOPE_READY_FD"  # a tool writes to this descriptor when its hooks are attached
DEADLINE = 120.0

Emit = Callable[[str, str], None]  # who, one line


def arguments(given: Sequence[str], lab: Lab) -> list[str]:
    """The tool's arguments: `{client}` and `{server}` become namespaces, `--netns {server}` is added if missing."""
    found = list(given)
    if not any(argument == "--netns" or argument.startswith("--netns=") for argument in found):
        found += ["--netns", "{server}"]
    for host in lab.hosts:
        found = [argument.replace(f"{{{host.role}}}", str(host.inode)) for argument in found]
    return found


class Tool:
    """`tcpscope ARGUMENTS` in a process of its own, outside of the lab's namespaces. `emit` gets its output.

    `width` is the room for its lines on the terminal where `emit` shows them; None: it does not.
    """

    # -P: nothing is imported from the current directory, which need not be trusted
    command = (sys.executable, "-P", "-m", "tcpscope")

    def __init__(self, arguments: Sequence[str], emit: Emit, width: int | None = None) -> None:
        self.name = arguments[0]
        self._ready, ready = os.pipe()
        try:
            self._process = processes.start(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,  # one stream keeps the order of the lines
                text=True,
                errors="replace",
                pass_fds=[ready],
                env={**os.environ, READY_FD: str(ready), "PYTHONUNBUFFERED": "1", screen.WIDTH: str(width or "")},
            )
        finally:
            os.close(ready)
        self._reader = threading.Thread(target=self._read, args=(emit,), daemon=True)
        self._reader.start()

    def _read(self, emit: Emit) -> None:
        for line in self._process.stdout or ():
            emit(self.name, line.rstrip("\n"))

    def wait_until_ready(self, deadline: float = DEADLINE) -> None:
        """Return when the tool's hooks are attached. It is an error if the tool ends before."""
        if not select.select([self._ready], [], [], deadline)[0]:
            raise TcpscopeError(f"'tcpscope {self.name}' was not ready after {deadline:g} s")
        if not os.read(self._ready, 16):
            self.end(interrupt=False)
            raise TcpscopeError(f"'tcpscope {self.name}' ended before it watched anything")

    def end(self, interrupt: bool = True, deadline: float = DEADLINE) -> None:
        """Stop it with SIGINT and wait until all of its output was given to `emit`. A bad exit status is an error."""
        try:
            if interrupt and self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
            end = time.monotonic() + deadline
            try:
                status = self._process.wait(deadline)
            except subprocess.TimeoutExpired:
                raise TcpscopeError(f"'tcpscope {self.name}' did not end within {deadline:g} s of SIGINT") from None
            self._reader.join(max(0.0, end - time.monotonic()))
        finally:
            self.kill()
        if status:
            error = TcpscopeError(f"'tcpscope {self.name}' ended with status {status}")
            error.exit_status = status if status > 0 else 1
            raise error

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self._process.kill()
        self._process.wait()
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
