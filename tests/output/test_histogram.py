"""Buckets, and what can be said of a distribution that is only known by buckets."""

from __future__ import annotations

import itertools
import statistics
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpscope.output.histogram import SUB_BITS, Histogram, bucket_start, draw
from tests import examples  # noqa: F401  for its settings

BUCKETS = 256


def bucket_of(value: int) -> int:
    """The kernel's rule, said once more: exact below 8, then 8 per power of two."""
    if value < 8:
        return value
    shift = value.bit_length() - 1 - SUB_BITS
    return ((shift + 1) << SUB_BITS) + (value >> shift) - 8


def histogram(values: list[int]) -> Histogram:
    buckets = [0] * BUCKETS
    for value in values:
        buckets[bucket_of(value)] += 1
    return Histogram(tuple(buckets), sum(values), min(values, default=None), max(values, default=None))


values = st.lists(st.integers(0, 2**30), min_size=1, max_size=200)


@given(st.integers(0, 2**31))
def test_a_bucket_starts_at_its_smallest_value(value: int) -> None:
    index = bucket_of(value)
    assert bucket_start(index) <= value < bucket_start(index + 1)
    assert (bucket_start(index + 1) - bucket_start(index)) * 8 <= max(8, bucket_start(index))


@given(values, st.sampled_from([1, 25, 50, 90, 99, 100]))
def test_percentiles_are_right_to_an_eighth(found: list[int], percent: int) -> None:
    ordered = sorted(found)
    exact = ordered[max(0, -(-percent * len(ordered) // 100) - 1)]
    value = histogram(found).percentile(percent)
    assert value is not None
    assert bucket_of(value) == bucket_of(exact)
    assert min(found) <= value <= max(found)


@given(values)
def test_percentiles_do_not_cross(found: list[int]) -> None:
    several = [histogram(found).percentile(percent) for percent in (1, 10, 50, 90, 99, 100)]
    assert several == sorted(several)


KERNELS_BUCKETS = """
#include <stdio.h>
#define __always_inline inline __attribute__((always_inline))
#define barrier_var(variable) __asm__ volatile("" : "+r"(variable))
typedef unsigned int __u32;
typedef unsigned long long __u64;
#include "src/tcpscope/bpf/bucket.bpf.h"
int main(void)
{
	__u32 us;

	while (scanf("%u", &us) == 1)
		printf("%u ", bucket_of(us));
}
"""


def test_the_kernel_finds_the_same_buckets(tmp_path: Path, tree: Path) -> None:
    """Its source, compiled for this machine, at both ends of every bucket."""
    starts = [start for index in range(BUCKETS) if (start := bucket_start(index)) < 1 << 32]
    values = sorted({*starts, *(start - 1 for start in starts if start), (1 << 32) - 1})
    command = ["gcc", "-O2", "-I", tree, "-x", "c", "-", "-o", tmp_path / "buckets"]
    subprocess.run(command, input=KERNELS_BUCKETS, text=True, check=True)
    done = subprocess.run([tmp_path / "buckets"], input="\n".join(map(str, values)), text=True, stdout=subprocess.PIPE)
    assert [int(word) for word in done.stdout.split()] == [bucket_of(value) for value in values]
    assert len(values) > 400


@given(values, values)
def test_a_sum_is_the_histogram_of_both(first: list[int], second: list[int]) -> None:
    both = histogram(first) + histogram(second)
    assert both == histogram(first + second)
    assert histogram(first) + histogram(second) == both
    assert both.count == len(first) + len(second)
    assert both.mean == pytest.approx(statistics.fmean(first + second))


@given(values)
def test_octaves_cover_everything(found: list[int]) -> None:
    octaves = histogram(found).octaves()
    for low, high, count in octaves:
        assert count == sum(low <= value <= high for value in found)
    assert sum(count for *_, count in octaves) == len(found)
    assert all(high + 1 == low for (_, high, _), (low, _, _) in itertools.pairwise(octaves))


def test_nothing() -> None:
    empty = histogram([])
    assert (empty.count, empty.mean, empty.percentile(50), empty.octaves()) == (0, None, None, [])
    assert (empty + histogram([5])).min == 5


def test_the_drawing() -> None:
    lines = draw(histogram([5, 6, 20]).octaves(), "us")
    assert lines == [
        "                   us : count    distribution",
        "        4 -> 7        : 2        |****************************************|",
        "        8 -> 15       : 0        |                                        |",
        "       16 -> 31       : 1        |********************                    |",
    ]
