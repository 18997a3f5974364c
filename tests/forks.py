"""Tools as forks of a process that has imported them: under emulation Python and its imports are 2 s of each start.

What is forked is what `python -m tcpscope` is after its imports. Arguments, environment, files and end are its own.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import IO

from tcpscope.lab import processes


class Fork:
    """What a test uses of `subprocess.Popen`, for a process that is another one's child."""

    def __init__(self, pid: int, pidfd: int, status: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._pidfd, self._status = pidfd, status

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if (status := self._wait(timeout)) is None:
            raise subprocess.TimeoutExpired("tcpscope", timeout or 0)
        return status

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            if poll.poll(None if timeout is None else timeout * 1000):
                self.returncode = int(os.read(self._status, 16) or -signal.SIGKILL)  # the parent was killed, so it too
                os.close(self._status)
                os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended just now
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: Sequence[str], environment: Mapping[str, str], ready_variable: str, ready: int) -> Fork:
    """`tcpscope ARGUMENTS`, which reports on the descriptor `ready`; killed with this process."""
    parent = _parent()
    nothing, out, err = os.open(os.devnull, os.O_RDONLY), os.pipe(), os.pipe()
    message = json.dumps([list(arguments), dict(environment), ready_variable]).encode()
    socket.send_fds(parent, [message], [nothing, out[1], err[1], ready])
    for given in (nothing, out[1], err[1]):
        os.close(given)
    answer, (pidfd, status), *_ = socket.recv_fds(parent, 16, 2)
    return Fork(int(answer), pidfd, status, os.fdopen(out[0], "rb"), os.fdopen(err[0], "rb"))


@cache
def _parent() -> socket.socket:
    """Its end is the end of this process, or of the thread that was the first to ask."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    processes.start([sys.executable, "-m", "tests.forks", str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(ours.close)
    return ours


def main(requests: socket.socket) -> None:
    """Fork for each request; tell how each child has ended. Returns in the children only, and at the very end."""
    from tcpscope import cli, tool

    for name in tool.names():
        tool.find(name)
    gc.freeze()
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the terminal: who started us will end us
    children: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != requests.fileno():
                poll.unregister(descriptor)
                pid, status = children.pop(descriptor)
                os.write(status, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                os.close(status), os.close(descriptor)
                continue
            message, descriptors, *_ = socket.recv_fds(requests, 1 << 18, 4)
            if not message:
                return
            parent = os.getpid()
            if not (pid := os.fork()):
                processes.follow(parent)
                signal.signal(signal.SIGINT, interrupted)
                requests.detach()
                _become(*json.loads(message), descriptors)
                cli.main()
            for each in descriptors:
                os.close(each)
            pidfd, (read_end, write_end) = os.pidfd_open(pid), os.pipe()
            socket.send_fds(requests, [str(pid).encode()], [pidfd, read_end])
            os.close(read_end)
            children[pidfd] = pid, write_end
            poll.register(pidfd, select.POLLIN)


def _become(arguments: list[str], environment: dict[str, str], ready_variable: str, descriptors: list[int]) -> None:
    """A process of its own, with nothing of its parent open."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(len(descriptors), (1 << 31) - 1)
    os.environ.clear()
    os.environ.update(environment, **{ready_variable: str(len(descriptors) - 1)})
    sys.argv = ["tcpscope", *arguments]


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
