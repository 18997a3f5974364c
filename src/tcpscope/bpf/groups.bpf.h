/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Counts the events of each group (--count). Then no event leaves the kernel. User space says which bits of an event make
 * its group, and reads the groups: groups.py. An object defines HAS_GROUPS before it includes event.bpf.h. With
 * GROUPS_ARE_DISTRIBUTIONS too, a group has the distribution of a number.
 */
#ifndef TCPSCOPE_GROUPS_BPF_H
#define TCPSCOPE_GROUPS_BPF_H

#include "aggregate.bpf.h"
#ifdef GROUPS_ARE_DISTRIBUTIONS
#include "distribution.bpf.h"
#define GROUPS 4096
#else
#define GROUPS 16384
#endif

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
	__u64 first_ns, last_ns;
#ifdef GROUPS_ARE_DISTRIBUTIONS
	struct distribution numbers; /* of those events in which it is known: not all its bits are set */
#endif
};

const volatile bool grouping;
const volatile struct event_bits group_by[GROUP_WORDS]; /* mask 0: unused */
const volatile struct event_bits group_sum;

AGGREGATE(groups, group_key, group, GROUPS)

#ifdef GROUPS_ARE_DISTRIBUTIONS
static __always_inline void group_add_number(struct group *group, __u64 number)
{
	if (number == group_sum.mask >> group_sum.shift)
		return;
	distribution_add(&group->numbers, number > (__u32)-1 ? (__u32)-1 : number);
}
#else
static __always_inline void group_add_number(struct group *group, __u64 number)
{
	__sync_fetch_and_add(&group->sum, number);
}
#endif

/*
 * The key takes the place of the event: the stack has no room for both. The words of group_by ascend, so each is read before
 * another is written there. User space makes the maps' keys as short as the words that it uses.
 */
static __always_inline void group_add(__u64 *event)
{
	__u64 number = group_sum.mask ? (event[group_sum.word] & group_sum.mask) >> group_sum.shift : 0;
	__u64 time_ns = event[0];
	struct group *group;

#pragma unroll
	for (int i = 0; i < GROUP_WORDS && group_by[i].mask; i++)
		event[i] = event[group_by[i].word] & group_by[i].mask;
	group = groups_at((struct group_key *)event);
	if (!group)
		return;
	__sync_fetch_and_add(&group->count, 1);
	if (!group->first_ns || time_ns < group->first_ns)
		group->first_ns = time_ns;
	if (time_ns > group->last_ns)
		group->last_ns = time_ns;
	if (group_sum.mask)
		group_add_number(group, number);
}

#endif
