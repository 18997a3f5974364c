"""Distributions: their buckets, their percentiles, and how they are drawn.

Buckets are as in bpf/rtt.bpf.c: exact below 8, then 8 per power of two, so a value is known to 1/8 of itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tcpscope.output import Column

SUB_BITS = 3
BUCKETS = (64 - SUB_BITS + 1) << SUB_BITS
_BAR = 40

COLUMNS = (
    Column("count", doc="values"),
    Column("min_us", unit="us", doc="shortest"),
    Column("p50_us", unit="us", doc="half of them are not longer; known to 1/8"),
    Column("p90_us", unit="us", doc="90 % are not longer; known to 1/8"),
    Column("p99_us", unit="us", doc="99 % are not longer; known to 1/8"),
    Column("max_us", unit="us", doc="longest"),
    Column("mean_us", "float", unit="us", doc="average"),
    Column("histogram", "distribution", "us", doc="[from_us, to_us, count] by power of two"),
)

IMPORTANT = ("count", "p50_us", "p99_us", "max_us", "total", "time", "p90_us", "min_us", "mean_us")
"""What a narrow terminal shows of a group, the most important first."""


def bucket_of(value: int) -> int:
    """The index of the bucket that `value` falls into."""
    if value < 1 << SUB_BITS:
        return value
    octave = value.bit_length() - SUB_BITS
    return (octave << SUB_BITS) + (value >> octave - 1 & (1 << SUB_BITS) - 1)


def bucket_start(index: int) -> int:
    """The smallest value that falls into bucket `index`."""
    if index < 1 << SUB_BITS:
        return index
    octave, part = divmod(index, 1 << SUB_BITS)
    return ((1 << SUB_BITS) + part) << (octave - 1)


@dataclass(frozen=True)
class Histogram:
    """Counts by bucket, with the exact sum, minimum and maximum of the values."""

    buckets: tuple[int, ...]
    sum: int
    min: int | None
    max: int | None

    @classmethod
    def of(cls, values: Iterable[int]) -> Histogram:
        """The histogram of these values, which are below 2**64."""
        known = list(values)
        buckets = [0] * BUCKETS
        for value in known:
            buckets[bucket_of(value)] += 1
        return cls(tuple(buckets), sum(known), min(known, default=None), max(known, default=None))

    @property
    def count(self) -> int:
        return sum(self.buckets)

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def __add__(self, other: Histogram) -> Histogram:
        lowest = [value for value in (self.min, other.min) if value is not None]
        highest = [value for value in (self.max, other.max) if value is not None]
        return Histogram(
            tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True)),
            self.sum + other.sum,
            min(lowest, default=None),
            max(highest, default=None),
        )

    def percentile(self, percent: float) -> int | None:
        """The value that `percent` of the values do not exceed. It is interpolated in its bucket, within min and max.

        It is off by at most the width of a bucket: 1/8 of the value.
        """
        if not self.count or self.min is None or self.max is None:
            return None
        rank, below = percent / 100 * self.count, 0
        for index, n in enumerate(self.buckets):
            if n and below + n >= rank:
                low, high = bucket_start(index), bucket_start(index + 1)
                value = low + (high - 1 - low) * (rank - below) / n
                return round(min(max(value, self.min), self.max))
            below += n
        return self.max

    def octaves(self) -> list[tuple[int, int, int]]:
        """(from, to, count) by power of two, both ends included, from the first to the last that is not empty."""
        sums: dict[int, int] = {}
        for index, n in enumerate(self.buckets):
            if n:
                sums[bucket_start(index).bit_length()] = sums.get(bucket_start(index).bit_length(), 0) + n
        if not sums:
            return []
        return [
            (1 << bits - 1 if bits else 0, (1 << bits) - 1 if bits else 0, sums.get(bits, 0))
            for bits in range(min(sums), max(sums) + 1)
        ]


def draw(octaves: Iterable[tuple[int, int, int]], unit: str) -> list[str]:
    """Lines of a log2 histogram of [from, to, count]."""
    rows = list(octaves)
    most = max((n for *_, n in rows), default=0)
    lines = [f"{unit:>21} : count    distribution"]
    for low, high, n in rows:
        bar = "*" * round(n * _BAR / most)
        lines.append(f"{low:>9} -> {high:<9}: {n:<8} |{bar:<{_BAR}}|")
    return lines


def figures(histogram: Histogram) -> dict[str, Any]:
    """The values of COLUMNS."""
    mean = histogram.mean
    return {
        "count": histogram.count,
        "min_us": histogram.min,
        "p50_us": histogram.percentile(50),
        "p90_us": histogram.percentile(90),
        "p99_us": histogram.percentile(99),
        "max_us": histogram.max,
        "mean_us": None if mean is None else round(mean, 1),
        "histogram": [list(octave) for octave in histogram.octaves()],
    }
