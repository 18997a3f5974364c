"""Reads a ring buffer of the kernel."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from tcpscope.errors import MalformedError
from tcpscope.kernel._libbpf import ffi, lib
from tcpscope.kernel.resources import failed

BATCH_BYTES = 256 << 10
"""Larger batches are not faster, and the rows of a batch take most of the tool's memory."""


class Ring:
    """Reads a ring buffer map whose records are all `record_size` bytes. `fd` is for poll(). Raises OSError."""

    def __init__(self, map_fd: int, record_size: int) -> None:
        ring = lib.tcpscope_ring_new(map_fd)
        if ring == ffi.NULL:
            raise failed(ffi.errno, "the ring buffer cannot be mapped")
        self._ring = ffi.gc(ring, lib.tcpscope_ring_free)
        self._closed = False
        self.fd: int = lib.tcpscope_ring_fd(ring)
        self.record_size = record_size
        self._buffer = bytearray(BATCH_BYTES)
        self._view = memoryview(self._buffer)
        self._pointer = ffi.from_buffer(self._buffer)

    def close(self) -> None:
        """Give back the buffer's memory. There are no more batches. May be called twice."""
        if not self._closed:
            self._closed = True
            ffi.release(self._ring)

    def batches(self) -> Iterator[memoryview]:
        """All records that are in the ring now, in batches. A batch is valid until the next one is asked for."""
        while not self._closed:
            size = lib.tcpscope_ring_drain(self._ring, self._pointer, BATCH_BYTES, self.record_size)
            if size == -errno.EBADMSG:
                what = f"the ring buffer has a record that is not of {self.record_size} bytes"
                raise MalformedError(what, "each must be one whole event")
            if size < 0:
                raise failed(-size, "the ring buffer cannot be read")
            if size:
                yield self._view[:size]
            if size + self.record_size <= BATCH_BYTES:
                return
