/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Buckets of a histogram: one per microsecond below 8 us, then 8 per power of two, so a bucket is at most 1/8 of its value
 * wide. output/histogram.py has the same formula, and its test compares the two.
 *
 * It is inline, because a program on 6.12 must not call a global function while preemption is disabled. It has no branch
 * for each power of two, because the verifier would follow each branch to the end of the program.
 */
#ifndef TCPSCOPE_BUCKET_BPF_H
#define TCPSCOPE_BUCKET_BPF_H

#define SUB_BITS 3

/* 1 if the value is greater, else 0. */
static __always_inline __u64 exceeds(__u64 value, __u64 limit)
{
	__u64 difference = limit - value;

	barrier_var(difference); /* otherwise the compiler makes it a comparison and a branch */
	return difference >> 63;
}

static __always_inline __u32 bucket_of(__u32 us)
{
	__u64 value = us, log2 = 0, shift;

	if (us < (1 << SUB_BITS))
		return us;
#pragma unroll
	for (int step = 4; step >= 0; step--) {
		shift = exceeds(value, (1ULL << (1 << step)) - 1) << step;
		value >>= shift;
		log2 += shift;
	}
	return ((log2 - SUB_BITS + 1) << SUB_BITS) + ((us >> (log2 - SUB_BITS)) & ((1 << SUB_BITS) - 1));
}

#endif
