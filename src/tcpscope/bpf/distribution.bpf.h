/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* How a number is distributed: part of the values of an aggregate. aggregate.py makes a Histogram of it. */
#ifndef TCPSCOPE_DISTRIBUTION_BPF_H
#define TCPSCOPE_DISTRIBUTION_BPF_H

#include "aggregate.bpf.h"
#include "bucket.bpf.h"

#define BUCKETS 256 /* a power of two, so that a mask bounds the index */

struct distribution {
	__u64 total; /* sum of the numbers */
	struct extremes extremes;
	__u32 buckets[BUCKETS];
};

static __always_inline void distribution_add(struct distribution *distribution, __u32 value)
{
	__u32 bucket = bucket_of(value);

	__sync_fetch_and_add(&distribution->buckets[bucket & (BUCKETS - 1)], 1);
	__sync_fetch_and_add(&distribution->total, value);
	extremes_add(&distribution->extremes, value);
}

#endif
