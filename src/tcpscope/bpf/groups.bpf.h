/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Counts the events of each group (--count). Then no event leaves the kernel. User space says which bits of an event make
 * its group, and reads the groups: groups.py. An object defines HAS_GROUPS before it includes event.bpf.h.
 */
#ifndef TCPSCOPE_GROUPS_BPF_H
#define TCPSCOPE_GROUPS_BPF_H

#include "aggregate.bpf.h"

#define GROUP_WORDS 12

/* Some bits of an event: those of `mask` in the 64-bit word number `word`. */
struct event_bits {
	__u64 mask;
	__u32 word;
	__u32 shift; /* the lowest of them */
};

struct group_key {
	__u64 words[GROUP_WORDS];
};

struct group {
	__u64 count; /* events */
	__u64 sum;   /* of a number that they have */
};

const volatile bool grouping;
const volatile struct event_bits group_by[GROUP_WORDS]; /* mask 0: unused */
const volatile struct event_bits group_sum;

AGGREGATE(groups, group_key, group, 16384)

/*
 * The key takes the place of the event: the stack has no room for both. The words of group_by ascend, so each is read before
 * another is written there. User space makes the maps' keys as short as the words that it uses.
 */
static __always_inline void group_add(__u64 *event)
{
	__u64 number = group_sum.mask ? (event[group_sum.word] & group_sum.mask) >> group_sum.shift : 0;
	struct group *group;

#pragma unroll
	for (int i = 0; i < GROUP_WORDS && group_by[i].mask; i++)
		event[i] = event[group_by[i].word] & group_by[i].mask;
	group = groups_at((struct group_key *)event);
	if (!group)
		return;
	__sync_fetch_and_add(&group->count, 1);
	if (group_sum.mask)
		__sync_fetch_and_add(&group->sum, number);
}

#endif
