"""Processes that do what a test tells them, so that sockets have owners that the test knows.

peer = Puppet(lab.server, comm="alice")
peer.do("listener = socket.create_server((address, port))", address="192.0.2.2", port=80)
peer.ask("listener.getsockname()")
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tcpscope.lab.hosts import Host
from tests.conftest import DEADLINE

# Reads lines of JSON: [what, code, names]; answers each with one line. Nothing but the standard library, so -I -S.
PROGRAM = """
import json, os, socket, struct, sys, time
open("/proc/self/comm", "w").write(sys.argv[1])
names = globals()
for line in sys.stdin:
    what, code, given = json.loads(line)
    names.update(given)
    try:
        answer = eval(code, names) if what == "ask" else exec(code, names)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    else:
        print(json.dumps({"answer": answer}), flush=True)
"""


class Puppet:
    """A process called `comm` in a host. It has `json`, `os`, `socket`, `struct` and `time`."""

    def __init__(
        self, host: Host, comm: str = "puppet", *, pass_fds: Sequence[int] = (), prefix: Sequence[str] = ()
    ) -> None:
        self.comm = comm
        self._process = host.spawn(
            [*prefix, sys.executable, "-I", "-S", "-c", PROGRAM, comm],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        self.pid = self._process.pid

    def tell(self, code: str, **names: Any) -> None:
        """Let it execute `code`, and do not wait: `answer()` does."""
        self._send("do", code, names)

    def do(self, code: str, **names: Any) -> None:
        """Let it execute `code`; `names` become its variables."""
        self._send("do", code, names)
        self.answer()

    def ask(self, code: str, **names: Any) -> Any:
        """The value that the expression `code` has there."""
        self._send("ask", code, names)
        return self.answer()

    def _send(self, what: str, code: str, names: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, code, names]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        poll = select.poll()  # not select(): a test may hold more than 1024 file descriptors
        poll.register(self._process.stdout)
        if not poll.poll(DEADLINE * 1000):
            raise TimeoutError(f"{self.comm} did not answer within {DEADLINE:g} s")
        reply = json.loads(self._process.stdout.readline() or '{"error": "it has ended"}')
        if "error" in reply:
            raise AssertionError(f"{self.comm}: {reply['error']}")
        return reply["answer"]

    def kill(self) -> None:
        """End it without warning. It is gone, and reaped, when this returns."""
        self._process.kill()
        with contextlib.suppress(ChildProcessError):
            self._process.wait()
