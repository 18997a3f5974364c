/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What a listener has accepted and refused. */
#ifndef TCPSCOPE_ACTIVITY_BPF_H
#define TCPSCOPE_ACTIVITY_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"
#include "queues.bpf.h"

/* Inserted at the first of either, deleted at tcp_destroy_sock. */
struct activity {
	__u64 accepts;
	__u64 last_accept_ns;
	__u32 accepter; /* PID of the process that called accept() last */
	__u32 padding;
	__u64 refused[STEPS][CAUSES];
	__u64 unnamed[CAUSES]; /* refused by this listener or by another one of its address */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct activity);
} activities SEC(".maps");

static const struct activity new_activity;

static __always_inline struct activity *activity_of(struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct activity *found = bpf_map_lookup_elem(&activities, &key);

	if (found)
		return found;
	table_put(&activities, &key, &new_activity, BPF_NOEXIST);
	found = bpf_map_lookup_elem(&activities, &key);
	if (!found)
		COUNT(table_full);
	return found;
}

/* accept() returned `child`. */
static __always_inline void accepted_from(struct sock *listener, struct sock *child)
{
	struct activity *activity;

	if (!listener || !child)
		return;
	activity = activity_of(listener);
	if (!activity)
		return;
	__sync_fetch_and_add(&activity->accepts, 1);
	activity->accepter = bpf_get_current_pid_tgid() >> 32;
	activity->last_accept_ns = bpf_ktime_get_ns();
}

/* One of several listeners has refused a SYN for this cause, perhaps this one (search.bpf.h). */
static __always_inline void refused_perhaps(struct sock *sk, __u64 cause)
{
	struct activity *activity = activity_of(sk);

	barrier_var(cause); /* the compiler would compare one load of it, and use another */
	if (activity && cause < CAUSES)
		__sync_fetch_and_add(&activity->unnamed[cause], 1);
}

#endif
