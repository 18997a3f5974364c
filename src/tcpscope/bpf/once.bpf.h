/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The kernel does not start a program on a CPU where it runs already (__bpf_trace_run): a softirq that interrupts it and
 * passes the same tracepoint is left out. So such a program is attached twice. The first one notes each event that it
 * takes; the second, which the tracepoint calls after it, takes those that it does not find noted. That is exact for one
 * interruption, and there are not more: softirqs do not nest.
 *
 * Only the first makes notes and only the second wipes them, and neither interrupts itself.
 */
#ifndef TCPSCOPE_ONCE_BPF_H
#define TCPSCOPE_ONCE_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"

#define NOTES 8

struct note {
	__u64 sk; /* 0: free */
	__u64 what;
};

struct notes {
	struct note note[NOTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct notes);
} noted SEC(".maps");

/* For the first of the two programs: something has happened at a socket, `what` in a word. */
static __always_inline void once_note(struct sock *sk, __u32 what)
{
	__u32 zero = 0;
	struct notes *notes = bpf_map_lookup_elem(&noted, &zero);

	if (!notes)
		return;
#pragma unroll
	for (int i = 0; i < NOTES; i++)
		if (!notes->note[i].sk) {
			notes->note[i].what = what;
			notes->note[i].sk = (__u64)sk;
			return;
		}
	/* Left over: the second program was not attached yet, or was itself left out. */
	__builtin_memset(notes, 0, sizeof(*notes));
	notes->note[0].what = what;
	notes->note[0].sk = (__u64)sk;
}

/* For the second: was the first one left out? */
static __always_inline bool once_missed(struct sock *sk, __u32 what)
{
	__u32 zero = 0;
	struct notes *notes = bpf_map_lookup_elem(&noted, &zero);

	if (!notes)
		return false;
#pragma unroll
	for (int i = 0; i < NOTES; i++)
		if (notes->note[i].what == what && notes->note[i].sk == (__u64)sk) {
			notes->note[i].sk = 0;
			return false;
		}
	COUNT(rescued);
	return true;
}

#endif
