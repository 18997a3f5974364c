"""Takes what a probe adds up by key in the kernel (bpf/aggregate.bpf.h), while the probe goes on."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from tcpscope.kernel.loaded import Loaded
from tcpscope.session import wait_for_programs


class Aggregate:
    """The aggregate `name` of an object, of struct `value` by struct `key`."""

    def __init__(self, loaded: Loaded, name: str, key: str, value: str) -> None:
        self._loaded, self._name = loaded, name
        self._epoch = loaded.memory("epoch").cast("I")
        self._key = loaded.spec.layout(key, internal=True)
        self._value = loaded.spec.layout(value, internal=True)

    def take(self) -> Iterator[tuple[Any, Any]]:
        """Raw rows of keys and values, of what was added since the last call. Read it to its end."""
        ended = f"{self._name}_{'odd' if self._epoch[0] & 1 else 'even'}"
        self._epoch[0] += 1
        wait_for_programs()  # those that may have read the old number
        yield from self._loaded.entries(ended, self._key, self._value, take=True)


def extremes(value: Any) -> tuple[int | None, int | None]:
    """The least and the greatest of a value that has a `struct extremes`; None if nothing was added."""
    lowest = [number - 1 for number in _words(value.min) if number]
    return (min(lowest), max(_words(value.max))) if lowest else (None, None)


def _words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)
