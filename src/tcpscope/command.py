"""A command that a tool watches from its first system call on: `tcpscope TOOL -- COMMAND`.

The command has a cgroup of its own, and the filter names this cgroup. So its children belong to it, too, and the kernel
decides. Processes that go on after the command go back to the cgroup above.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tcpscope.errors import NotPermittedError, TcpscopeError, UnsupportedError, UsageError
from tcpscope.filters import cgroup_mount

_EMPTIED_SECONDS = 2
"""The kernel counts a process out of its cgroup a moment after its end. Others may fork while it is emptied."""
_OUTSIDE = "in `ip netns exec` it is missing, so put that behind --: tcpscope TOOL -- ip netns exec NAME COMMAND"
_CANNOT_RUN = 126  # as a shell says it


class Command:
    """A child process that waits, from `with` on, for `start()`. Afterwards its cgroup is removed.

    cgroup   the id of its cgroup
    pid      of the child
    started  `start()` was called
    keep     capabilities that are needed to remove the cgroup, and to pass signals on if it has become another user

    UsageError if there is no such program, TcpscopeError if there can be no cgroup.
    """

    keep = ("CAP_DAC_OVERRIDE", "CAP_KILL")

    def __init__(self, argv: Sequence[str]) -> None:
        if not shutil.which(argv[0]):
            raise UsageError(f"no command '{argv[0]}'", "give a program of PATH, or its path")
        self._argv = list(argv)
        try:
            self._above = _own_cgroup()
        except UnsupportedError as error:
            raise UnsupportedError(error.message, f"a command needs it; {_OUTSIDE}") from None
        self.started = self._ended = False

    def __enter__(self) -> Self:
        held, self._hold = os.pipe2(os.O_CLOEXEC)  # first, as it may fail
        try:
            self._path = self._made_cgroup()
            try:
                self._fork(held)
            except OSError:
                self._path.rmdir()
                raise
        except BaseException:
            os.close(self._hold)
            raise
        finally:
            os.close(held)
        return self

    def _made_cgroup(self) -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix=f"tcpscope.{os.getpid()}.", dir=self._above))
        except PermissionError:
            raise NotPermittedError(
                f"cannot make a cgroup in {self._above} for the command", "run as root", ("CAP_DAC_OVERRIDE",)
            ) from None
        except OSError as error:
            raise TcpscopeError(
                f"cannot make a cgroup in {self._above}: {error.strerror}",
                "a command needs one; --pid follows a process that runs already",
            ) from None

    def _fork(self, held: int) -> None:
        """Make the child, and let it wait in the cgroup until `held` can be read."""
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:  # our caller's wish; nobody could wait for the command
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.cgroup = self._path.stat().st_ino
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._hold)
            _become(self._argv, held)
        try:
            (self._path / "cgroup.procs").write_text(str(self.pid))
        except OSError:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise

    def start(self) -> None:
        """Let it run, if it has not been killed meanwhile."""
        self.started = True
        with contextlib.suppress(BrokenPipeError):
            os.write(self._hold, b"x")

    def ended(self) -> bool:
        """Whether it has ended. It stays a zombie until `status()`."""
        return bool(os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))

    def status(self) -> int:
        """Wait for its end. Its exit status as a shell gives it: 128 and the number of the signal that killed it."""
        self._ended = True
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code if code >= 0 else 128 - code

    def __exit__(self, *_: object) -> None:
        os.close(self._hold)
        if not self.started and not self._ended:
            self.status()  # it reads the end of the pipe, and ends
        deadline = time.monotonic() + _EMPTIED_SECONDS
        while not self._removed():
            if time.monotonic() > deadline:
                warnings.warn(f"the cgroup {self._path} stays: processes are in it", stacklevel=2)
                return
            time.sleep(0.001)

    def _removed(self) -> bool:
        try:
            self._path.rmdir()
        except OSError:
            for pid in (self._path / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):  # it has ended
                    (self._above / "cgroup.procs").write_text(pid)
            return False
        return True


def _become(argv: list[str], held: int) -> None:
    """In the child: wait, then be the command. Never returns."""
    try:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        if os.read(held, 1):
            os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"tcpscope: cannot run {argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(_CANNOT_RUN)


def _own_cgroup() -> Path:
    """The directory of this process's cgroup, or the nearest above it that can be seen."""
    mount = cgroup_mount()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            path = mount / line[3:].lstrip("/")
            return path if ".." not in path.parts and path.is_dir() else mount
    return mount
