"""Starts and controls a program of `tcpscope.lab.peers` in a host."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcpscope.errors import TcpscopeError
from tcpscope.lab.hosts import Host

PEERS = Path(__file__).parent / "peers"
DEADLINE = 120.0  # seconds; emulated kernels are twenty times slower than real ones
POLL = 0.005


def until(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Return as soon as `condition()` is true. After `deadline` seconds raise an error that names `what`."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise TcpscopeError(f"the lab waited {deadline:g} s in vain for {what}")
        time.sleep(POLL)


class Program:
    """`server` or `client`. `hear` reads its reports one by one."""

    def __init__(self, host: Host, name: str, **config: object) -> None:
        self.name = name
        # -I -S: nothing but the standard library is imported, a third of the time to start
        argv = [sys.executable, "-I", "-S", str(PEERS / f"{name}.py"), json.dumps(config)]
        self.process = host.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pid = self.process.pid
        self._unread = b""

    def tell(self, **command: object) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, what: str, deadline: float = DEADLINE) -> dict[str, Any]:
        """The next report. It is an error if its kind is not `what`."""
        assert self.process.stdout is not None and self.process.stderr is not None
        end = time.monotonic() + deadline
        while b"\n" not in self._unread:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise TcpscopeError(f"the lab's {self.name} did not report '{what}' within {deadline:g} s")
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                complaint = self.process.stderr.read().decode(errors="replace").strip().splitlines()
                raise TcpscopeError(
                    f"the lab's {self.name} ended before it reported '{what}'",
                    complaint[-1] if complaint else "",
                )
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        report: dict[str, Any] = json.loads(line)
        if report.pop("report") != what:
            raise TcpscopeError(f"the lab's {self.name} reported {line.decode()}, not '{what}'")
        return report

    def kill(self) -> None:
        """Kill it, as a crash would. Its sockets are closed when this returns."""
        self.process.kill()
        self.process.wait()
