"""Reads what programs send: from a ring buffer of the kernel, or from a perf event array."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

from tcpscope.errors import MalformedError, NotPermittedError
from tcpscope.kernel._libbpf import ffi, lib
from tcpscope.kernel.features import perf_event_denied
from tcpscope.kernel.resources import failed

BATCH_BYTES = 256 << 10
"""Larger batches are not faster, and the rows of a batch take most of the tool's memory."""


class Ring:
    """Reads a ring buffer map whose records are all `record_size` bytes. `fd` is for poll(). Raises OSError.

    lost    events for which there was no room, as far as the kernel knows; None: it does not count them
    counts  whether it knows of all of them
    """

    what = "ring buffer"
    counts = False
    kernel_bytes = 0
    """Memory of buffers that belong to no map."""

    def __init__(self, map_fd: int, record_size: int) -> None:
        self._start(lib.tcpscope_ring_new(map_fd), lib.tcpscope_ring_free, lib.tcpscope_ring_drain, record_size)
        self._fails = lib.tcpscope_ring_fails
        self.fd: int = lib.tcpscope_ring_fd(self._reader)
        self._bytes: int = lib.tcpscope_ring_bytes(self._reader)

    def _start(self, reader: Any, free: Any, drain: Any, record_size: int) -> None:
        if reader == ffi.NULL:
            raise self._failed(ffi.errno)
        self._reader = ffi.gc(reader, free)
        self._drain = drain
        self._closed = False
        self.record_size = record_size
        self._buffer = bytearray(max(BATCH_BYTES, record_size))
        self._view = memoryview(self._buffer)
        self._pointer = ffi.from_buffer(self._buffer)

    def _failed(self, error: int) -> Exception:
        return failed(error, f"the {self.what} cannot be mapped")

    @property
    def lost(self) -> int | None:
        return None

    def close(self) -> None:
        """Give back the buffer's memory. There are no more batches. May be called twice."""
        if not self._closed:
            self._closed = True
            ffi.release(self._reader)

    def batches(self) -> Iterator[memoryview]:
        """All records that are there now, in batches. A batch is valid until the next one is asked for.

        Others may come faster than they are read. So it ends, too, when as much was read as there is room for.
        """
        left = self._bytes
        while left > 0 and not self._closed:
            size = self._drain(self._reader, self._pointer, len(self._buffer), self.record_size)
            if size == -errno.EBADMSG:
                what = f"the {self.what} has a record that is not of {self.record_size} bytes"
                raise MalformedError(what, "each must be one whole event")
            if size < 0:
                raise failed(-size, f"the {self.what} cannot be read")
            left -= size
            if size:
                yield self._view[:size]
            if size + self.record_size <= len(self._buffer) and not self._fails(self._reader):
                return


class PerfArray(Ring):
    """The same of a perf event array, with a buffer of `size` bytes for each processor."""

    what = "perf event array"
    largest = (1 << 16) - 8 - 8 - 4
    """Bytes of the largest record: with its headers, filled up to 8 bytes, the kernel writes its size in 16 bits."""

    def __init__(self, map_fd: int, record_size: int, size: int) -> None:
        self._start(lib.tcpscope_perf_new(map_fd, size), lib.tcpscope_perf_free, lib.tcpscope_perf_drain, record_size)
        self._fails = lib.tcpscope_perf_fails
        self.fd: int = lib.tcpscope_perf_fd(self._reader)
        self.counts = lib.tcpscope_perf_counts(self._reader)
        self._bytes = self.kernel_bytes = lib.tcpscope_perf_bytes(self._reader)

    def _failed(self, error: int) -> Exception:
        what = f"the {self.what} cannot be opened: {os.strerror(error)}"
        if error == errno.EPERM:  # perf_mmap()
            hint = "a smaller --buffer, CAP_IPC_LOCK or a larger 'ulimit -l' helps"
            return NotPermittedError(f"{what}, beyond the limit of locked memory", hint, ("CAP_IPC_LOCK",))
        if error == errno.EACCES:  # perf_event_open()
            return NotPermittedError(what, perf_event_denied("perf event arrays need") or "CAP_PERFMON is needed")
        return failed(error, f"the {self.what} cannot be opened")

    _lost = 0

    @property
    def lost(self) -> int:
        if not self._closed:
            self._lost = lib.tcpscope_perf_lost(self._reader)
        return self._lost

    def close(self) -> None:
        _ = self.lost
        super().close()
