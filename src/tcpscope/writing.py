"""Standard output and standard error of the command line: all or a counted loss, whatever the reader does.

A descriptor may be non-blocking, because it is shared with another process that made it so. Then a write may take a
part of the data, or nothing. A reader may also stop reading while the pipe is full. `Output` waits until the descriptor
is writable. It waits no longer than `PATIENCE_SECONDS` once the run shall end.

A terminal says that it is writable if it has room for one byte (`n_tty_poll()`). A blocking write of more then sleeps
until somebody reads the terminal. So `Output` opens the terminal again for itself, non-blocking.
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
import time
from typing import Any, ClassVar

from tcpscope.stop import Stop

PATIENCE_SECONDS = 0.5
"""How long a reader may take nothing, once the run shall end."""
_PAUSE_SECONDS = 0.01
"""Before a write is tried again that was refused although the descriptor is writable."""
_LOOK_SECONDS = 0.05
"""How often to look at a full terminal: the kernel may wake a writer before there is room, and not again."""
_TIOCGDEV = 0x80045432  # the number of the terminal; for /dev/tty and a master the one that is behind it
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
        self._own = _opened_again(descriptor)
        self._whole = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._poll = select.poll()
        self._poll.register(self._target, select.POLLOUT)
        self.lost = self._refusals = 0
        self.cut = self._gave_up = False

    def close(self) -> None:
        super().close()
        self._use_descriptor()

    @property
    def _target(self) -> int:
        """Where the bytes go."""
        return self._descriptor if self._own is None else self._own

    def _use_descriptor(self) -> None:
        """Close what was opened, if anything."""
        if self._own is not None:
            self._poll.unregister(self._own)
            self._poll.register(self._descriptor, select.POLLOUT)
            os.close(self._own)
            self._own = None

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
                taken = os.write(self._target, rest[: self._end(rest)])
            except BlockingIOError:  # another process was quicker, or is writing to the terminal
                self._refusals += 1
                continue
            except OSError:
                self._use_descriptor()  # where our caller may now put another file
                raise
            self._refusals = 0
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
        try:
            if self._refusals:
                time.sleep(_PAUSE_SECONDS)
                if self._is_over and self._refusals * _PAUSE_SECONDS >= PATIENCE_SECONDS:
                    return False
            if self._poll.poll(0):
                return True
            while not self._is_over:
                if self.stop is None:
                    self._poll.poll(None if self._own is None else _LOOK_SECONDS * 1000)
                else:
                    self.stop.wait_to_write(self._target, None if self._own is None else _LOOK_SECONDS)
                if self._poll.poll(0):
                    return True
            return bool(self._poll.poll(PATIENCE_SECONDS * 1000))
        except BaseException:  # a signal that ends the command: nothing is written after it
            self._gave_up = True
            raise

    @property
    def _is_over(self) -> bool:
        return self.over or (self.stop is not None and self.stop.is_over)


def _opened_again(descriptor: int) -> int | None:
    """The terminal of `descriptor`, non-blocking. None if that is none, or cannot be opened (another user's)."""
    if not os.isatty(descriptor):
        return None
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    if _number_of_terminal(own) == _number_of_terminal(descriptor):
        return own
    os.close(own)  # of a master: a new pair of terminals
    return None


def _number_of_terminal(descriptor: int) -> int:
    return int.from_bytes(fcntl.ioctl(descriptor, _TIOCGDEV, bytes(4)), sys.byteorder)


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
