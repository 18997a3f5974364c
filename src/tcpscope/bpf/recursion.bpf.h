/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Since "bpf: Prevent bpf program recursion for raw tracepoint probes" (6.1) the kernel skips a program on a CPU where it
 * runs already. A softirq may interrupt the program and pass the same tracepoint: that event would be lost. So such a
 * program is attached twice. The tracepoint calls the second copy after the first, and the second handles what the first
 * was skipped for. Softirqs do not nest, so one copy is free.
 *
 * The second copy sees from the table whether the first one ran. If it did, the entry has the new state, or, at the end of a
 * socket, the entry is gone. A second look at a segment finds nothing new. If a socket has no entry and the transition
 * makes none, the second copy does nothing: the first copy handled it and deleted the entry, or the filter excludes the
 * socket, or no process held the socket when the tool began. If the table was full, the first copy left a note.
 *
 * If a process is preempted inside a program, the kernel skips the program on that CPU until the process runs again. Before
 * 7.0 no process is preempted at a tracepoint. Since 7.0 one can be, in a few instructions at both ends of a copy
 * (processor_release()). If both copies are skipped, the transition is missed: missed.bpf.h.
 */
#ifndef TCPSCOPE_RECURSION_BPF_H
#define TCPSCOPE_RECURSION_BPF_H

#include "connection.bpf.h"

/* On this CPU, the last transition whose socket found the table full. A place may become free before the second copy runs. */
struct no_place {
	__u64 sk;
	__u64 state;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct no_place);
} no_places SEC(".maps");

/* For the first copy. */
static __always_inline void note_no_place(struct sock *sk, int state)
{
	__u32 zero = 0;
	struct no_place *note = bpf_map_lookup_elem(&no_places, &zero);

	if (!note)
		return;
	note->sk = (__u64)sk;
	note->state = state;
}

static __always_inline bool had_no_place(struct sock *sk, int state)
{
	__u32 zero = 0;
	struct no_place *note = bpf_map_lookup_elem(&no_places, &zero);
	bool noted = note && note->sk == (__u64)sk && note->state == (__u64)state;

	if (noted)
		note->sk = 0;
	return noted;
}

/*
 * For the second copy: was the first one skipped? `makes_entry`: this transition adds an entry for a socket that has none.
 */
static __always_inline bool was_skipped(struct sock *sk, int new_state, bool makes_entry)
{
	struct connection *connection = connection_find(sk);

	if (connection) {
		if (connection->state == new_state)
			return false;
	} else {
		if (!makes_entry || !filter_may_want(sk) || had_no_place(sk, new_state))
			return false;
		if (!connection_add(sk)) {
			COUNT(missed);
			return false;
		}
	}
	COUNT(rescued);
	return true;
}

#endif
