"""Reads an aggregate (bpf/aggregate.bpf.h) while programs fill it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from tcpscope.kernel.loaded import Loaded
from tcpscope.output.histogram import Histogram, bucket_start
from tcpscope.session import wait_for_programs

_LARGEST = 2**32 - 1


class Aggregate:
    """The aggregate `name` of a loaded object. `key` and `value` name the structs of its keys and values.

    A `key` that is a number is the size of the keys, which are bytes then.
    """

    def __init__(self, loaded: Loaded, name: str, key: str | int, value: str) -> None:
        self._loaded, self._name = loaded, name
        self._epoch = loaded.memory("epoch").cast("I")
        self._key = key if isinstance(key, int) else loaded.spec.layout(key, internal=True)
        self._value = loaded.spec.layout(value, internal=True)

    def take(self) -> Iterator[tuple[Any, Any]]:
        """Remove and return what programs added since the last call: pairs of raw rows of `key` and `value`.

        The caller must exhaust the iterator, or the rest stays in the kernel and is added to a later interval.
        """
        ended = f"{self._name}_{'odd' if self._epoch[0] & 1 else 'even'}"
        self._epoch[0] += 1
        wait_for_programs()  # a program may still fill the old map
        yield from self._loaded.entries(ended, self._key, self._value, take=True)


def extremes(value: Any) -> tuple[int | None, int | None]:
    """The smallest and the largest value that programs added to a `struct extremes`; None if there was none."""
    lowest = [number - (number < _LARGEST) for number in _words(value.min) if number]
    return (min(lowest), max(_words(value.max))) if lowest else (None, None)


def distribution(value: Any) -> Histogram:
    """The numbers that programs added to a `struct distribution` (bpf/distribution.bpf.h)."""
    buckets = _words(value.buckets)
    lowest, highest = extremes(value)
    if lowest is None or highest is None:
        return Histogram(buckets, value.total, None, None)
    # Two runs of the program may overwrite each other's extremes, on one CPU or in one shard. The buckets are right.
    filled = [index for index, n in enumerate(buckets) if n]
    return Histogram(
        buckets,
        value.total,
        min(lowest, bucket_start(filled[0] + 1) - 1),
        max(highest, bucket_start(filled[-1])),
    )


def _words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)
