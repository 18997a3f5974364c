"""When a run ends: at a signal, at a deadline, or because the code says so; and waiting that notices."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

_LONGEST_WAIT = 1e6  # seconds; poll() takes an int of milliseconds, and who waits longer asks again


def _in_foreground(pid: int) -> bool:
    """Whether our terminal sends the signals of its keys to us and this process, whatever standard input is."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # we have none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp() == os.getpgid(pid)
    except OSError:  # it has hung up
        return False
    finally:
        os.close(terminal)


class Stop:
    """Asked to stop? By a signal, the code, or because `duration` seconds have passed since `begin()`.

    As a context manager it catches SIGINT and SIGTERM, and SIGHUP (nohup) and SIGQUIT unless they are ignored. `output`
    is a descriptor whose reader may go away. `afterwards` handles these signals after the run; None: who did before.
    """

    SIGNALS: ClassVar = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    afterwards: ClassVar[Any] = None

    def __init__(self, duration: float | None = None, output: int | None = None) -> None:
        self._duration, self._output = duration, output
        self.deadline: float | None = None
        self.stopped = self._closed = False
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in self.SIGNALS:
            if number in (signal.SIGHUP, signal.SIGQUIT) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, lambda *_: self.stop())
        return self

    def end_with(self, pid: int) -> None:
        """Stop when this child of ours has ended. A first signal is for the child, and only a second one for us.

        It is passed on, but for what a terminal sends to both. One that may not be passed on is for us.
        """

        def look(*_: object) -> None:
            with contextlib.suppress(ChildProcessError):  # it was reaped: the run has failed before it began
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    self.stop()

        def first(number: int, *_: object) -> None:
            for each in self._previous:
                if each != signal.SIGCHLD:
                    signal.signal(each, lambda *_: self.stop())
            if number not in (signal.SIGINT, signal.SIGQUIT) or not _in_foreground(pid):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
                except PermissionError:  # it has become another user, and we have no CAP_KILL
                    self.stop()

        for number in self._previous:
            signal.signal(number, first)
        self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, look)
        look()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            ours = self.afterwards is None or number == signal.SIGCHLD
            signal.signal(number, handler if ours else self.afterwards)
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._read)
            os.close(self._write)

    def begin(self) -> None:
        """The duration runs from here: what is watched for a second is not loaded within it."""
        if self._duration is not None:
            self.deadline = time.monotonic() + self._duration

    def stop(self) -> None:
        self.stopped = True
        if not self._closed:
            os.write(self._write, b"x")

    def __bool__(self) -> bool:
        return self.stopped or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def is_over(self) -> bool:
        """Asked to stop, or closed."""
        return self._closed or bool(self)

    def wait_until_stopped(self) -> None:
        """Until a stop is asked for, however late that is after the deadline."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while not self.stopped:
            poll.poll()

    def wait_to_write(self, descriptor: int, longest: float | None = None) -> None:
        """Until `descriptor` is writable or has no reader, or a stop is asked for, or `longest` seconds have passed."""
        seconds = _LONGEST_WAIT if longest is None else longest
        if self.deadline is not None:
            seconds = min(seconds, self.deadline - time.monotonic())
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        poll.register(descriptor, select.POLLOUT)
        poll.poll(min(max(0, seconds), _LONGEST_WAIT) * 1000)

    def wait(self, seconds: float, *descriptors: int) -> None:
        """Until one of the descriptors is readable, the time is over, or a stop is asked for.

        BrokenPipeError as soon as nobody reads the output any more: what has nothing to write would never know.
        """
        if self.deadline is not None:
            seconds = min(seconds, self.deadline - time.monotonic())
        poll = select.poll()
        for fd in (self._read, *descriptors):
            poll.register(fd, select.POLLIN)
        if self._output is not None:
            poll.register(self._output, 0)  # POLLERR (a pipe) and POLLHUP (a socket, a terminal) come unasked
        for fd, _ in poll.poll(min(max(0, seconds), _LONGEST_WAIT) * 1000):
            if fd == self._output:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Signalled(BaseException):
    """A signal came; of this number."""


@contextlib.contextmanager
def tidied() -> Iterator[None]:
    """For work before a run: a signal ends it by an exception, so that temporary files go, and then acts as ever."""
    handlers = {number: signal.getsignal(number) for number in Stop.SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def end(number: int, _: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # nothing disturbs what is removed now
        raise _Signalled(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        try:
            for number in before:
                signal.signal(number, end)
            yield
        finally:
            restore()
    except _Signalled as signalled:
        restore()
        os.kill(os.getpid(), signalled.args[0])
        raise
