"""Standard output and standard error of the command line: all or a counted loss, whatever the reader does.

A descriptor may be non-blocking, because it is shared with another process that made it so. Then a write may take a
part of the data, or nothing. A reader may also stop reading while the pipe is full. `Output` waits until the descriptor
is writable. It waits no longer than `PATIENCE_SECONDS` once the run shall end.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import stat
import struct
import sys
import termios
from typing import Any, ClassVar

from tcpscope.stop import Stop

PATIENCE_SECONDS = 0.5
"""How long a reader may take nothing, once the run shall end."""
_ATOMIC = (
    select.PIPE_BUF
)  # a pipe takes so many bytes as a whole or not at all; if it is writable, it has room for them


class Output(io.RawIOBase):
    """Writes to a descriptor. `write` returns how many bytes were taken; what is missing will never be.

    stop  the run that writes, if it is one that can be stopped
    over  the command has ended: nothing is waited for any more
    lost  bytes that were not taken
    cut   what was taken ends within a line
    """

    stop: ClassVar[Stop | None] = None
    over: ClassVar[bool] = False

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._whole = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self.lost = 0
        self.cut = self._gave_up = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all. Raises BrokenPipeError if nobody reads any more."""
        rest = memoryview(data)
        while rest and self._is_writable():
            try:
                taken = os.write(self._descriptor, rest[: self._end(rest)])
            except BlockingIOError:  # another process was quicker
                continue
            self.cut = rest[taken - 1] != ord("\n")
            rest = rest[taken:]
        if rest:
            self._gave_up = True
            self.lost += len(rest)
        return len(data) - len(rest)

    def _end(self, data: memoryview) -> int:
        """Where to end the next piece: a pipe that is not read any more shall hold whole lines."""
        if self._whole or len(data) <= _ATOMIC:
            return len(data)
        room = max(_ATOMIC, _capacity_of_empty_pipe(self._descriptor))
        return len(data) if len(data) <= room else bytes(data[:room]).rfind(b"\n") + 1 or room

    def _is_writable(self) -> bool:
        """Wait until it is, or has no reader. False if the run shall end and the reader takes nothing."""
        if self._gave_up:
            return False
        if self._poll.poll(0):
            return True
        try:
            while not (self.over or (self.stop is not None and self.stop.is_over)):
                if self.stop is None:
                    self._poll.poll()
                else:
                    self.stop.wait_to_write(self._descriptor)
                if self._poll.poll(0):
                    return True
            return bool(self._poll.poll(PATIENCE_SECONDS * 1000))
        except BaseException:  # a signal that ends the command: nothing is written after it
            self._gave_up = True
            raise


def _capacity_of_empty_pipe(descriptor: int) -> int:
    """How many bytes the pipe takes without waiting. 0 if there is something in it, or if it is no pipe."""
    try:
        capacity = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
        (waiting,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    except OSError:
        return 0
    return 0 if waiting else capacity


def take_over() -> None:
    """Let `print()` and `sys.stdout.buffer` write through an `Output`, unless somebody has put another stream there."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout = _text(sys.stdout)
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = _text(sys.stderr, line_buffering=True)


def _text(stream: Any, line_buffering: bool = False) -> io.TextIOWrapper:
    output = Output(stream.fileno())
    return io.TextIOWrapper(
        output,  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=line_buffering or output.isatty(),
    )


def lost_by(stream: Any) -> int:
    """Bytes that the reader of `stream` did not take."""
    return stream.lost if isinstance(stream, Output) else 0


def complaint(stream: Any) -> str:
    """What was not written to `stream`, in words. Empty if everything was."""
    if not (lost := lost_by(stream)):
        return ""
    cut = "; the last line is incomplete" if stream.cut else ""
    return f"the reader of standard output stopped reading, and {lost} bytes were not written{cut}"
