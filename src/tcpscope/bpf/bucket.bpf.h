/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Buckets: exact below 8 us, then 8 per power of two, so a value is known to 1/8 of itself; the last of them begins far
 * above 2^32 us. output/histogram.py has the same formula, and its test compares them.
 *
 * Inline: 6.12 does not let a program call a global function while preemption is disabled. Without a branch for each power:
 * the verifier would follow every way to the end of the program.
 */
#ifndef TCPSCOPE_BUCKET_BPF_H
#define TCPSCOPE_BUCKET_BPF_H

#define SUB_BITS 3

/* 1 if the value is greater, else 0. */
static __always_inline __u64 exceeds(__u64 value, __u64 limit)
{
	__u64 difference = limit - value;

	barrier_var(difference); /* the compiler would make it a comparison again */
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
