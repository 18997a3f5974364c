/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* A snapshot of the listeners, and the processes that hold them. */
#ifndef TCPSCOPE_SNAPSHOT_BPF_H
#define TCPSCOPE_SNAPSHOT_BPF_H

#include "activity.bpf.h"
#include "connection.bpf.h"
#include "lengths.bpf.h"
#include "mib.bpf.h"
#include "overflow.bpf.h"
#include "processor.bpf.h"
#include "queues.bpf.h"

#define MAX_LISTENERS 8192 /* listeners.py sizes `connections` alike */

struct listener {
	struct identity id;
	struct owner owner; /* the process that called listen(); of an older listener, the first holder */
	struct queues queues;
	__u32 drops
		DOC("the socket's own count since listen() (sk_drops): one per refused SYN, two per refused final ACK");
	__u64 socket;   /* address; socket and since_ns join a listener with its holders */
	__u64 since_ns; /* when listen() was called; 0: before the tool */
	bool wanted;    /* its address passes the filter */
	bool owner_wanted;
	bool has_cookie; /* every socket of this kernel has one */
	__u8 padding[5];
	__u64 net_cookie; /* of the namespace, whose inode number another one may get later; 0: not known */
	__u64 accepts;
	__u64 last_accept_ns;
	__u32 accepter; /* PID of the process that called accept() last */
	__u32 padding2;
	__u64 net_overflows; /* counters of the namespace, if refusals are sampled; net_drops -1: not read */
	__u64 net_drops;
	__u64 net_full;
	__u64 net_cookies;
	__u64 head;             /* address of the request at the head of the accept queue */
	__u64 oldest_synack_us; /* when its SYN-ACK was sent; 0: not known, after a SYN cookie */
	__u64 now_ns;
	__u64 refused[STEPS][CAUSES];
	__u64 unnamed[CAUSES];
};

const struct listener *listener_anchor __attribute__((unused));

/* A process that has the listener open. */
struct listener_holder {
	struct owner owner;
	__u64 socket;
	__u64 since_ns;
	__u32 fd DOC("file descriptor of the process");
	__u32 parent; /* its PID */
	bool inside;  /* the process is in the listener's network namespace now */
	bool wanted;  /* passes the filter */
	__u8 padding[6];
};

const struct listener_holder *listener_holder_anchor __attribute__((unused));

/*
 * The namespace's counters, summed over all CPUs. The kernel counts the cause before the drop. So the drops are read first:
 * each of them has its cause in what is read after. Not by bpf_loop(): 5.10 refuses a program with callbacks, even unused.
 */
static __noinline int net_counters_read(struct sock *sk, struct listener *record)
{
	char *counters = (char *)BPF_CORE_READ(sk, __sk_common.skc_net.net, mib.net_statistics);
	__u32 zero = 0;

	record->net_drops = 0;
	for (__u32 cpu = 0; cpu < possible_cpus; cpu++) {
		struct in_hand *copy = bpf_map_lookup_percpu_elem(&in_hand, &zero, cpu);
		__u64 value = 0, offset;

		if (!copy)
			break;
		offset = cpu_offset(&in_hand, copy);
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_listen_drops * 8);
		record->net_drops += value;
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_listen_overflows * 8);
		record->net_overflows += value;
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_reqq_full_drop * 8);
		record->net_full += value;
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_cookies_sent * 8);
		record->net_cookies += value;
	}
	return 0;
}

/* The listeners that a look has found, in memory shared with user space, which resets `found_count` before each look. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_LISTENERS);
	__type(key, __u32);
	__type(value, struct listener);
} found SEC(".maps");

__u32 found_count;

static __noinline int listener_read(struct sock *sk, const struct connection *connection, struct listener *record)
{
	struct inet_connection_sock *icsk = (struct inet_connection_sock *)sk;
	struct request_sock *oldest;
	struct activity *activity;
	__u64 key = (__u64)sk;

	__builtin_memset(record, 0, sizeof(*record));
	identity_read(sk, &record->id);
	record->id.cookie = cookie_if_any(sk);
	record->has_cookie = have_cookie_helper();
	record->net_cookie = net_cookie_of(sk);
	record->wanted = listener_wanted(sk, &record->id);
	if (!record->wanted && !sampled())
		return 0;
	record->owner = connection->opener;
	record->owner_wanted = filter_owner(&record->owner);
	queues_read(sk, &record->queues);
	record->socket = key;
	record->since_ns = connection->opened_ns;
	record->net_drops = -1;
	/* Before the counters: of a refusal in between the sampler sees the counter first, and waits for sk_drops. */
	record->drops = BPF_CORE_READ(sk, sk_drops.counter);
	if (sampled() && possible_cpus && bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_map_lookup_percpu_elem))
		net_counters_read(sk, record);
	record->now_ns = bpf_ktime_get_ns();
	oldest = BPF_CORE_READ(icsk, icsk_accept_queue.rskq_accept_head);
	record->head = (__u64)oldest;
	if (oldest)
		record->oldest_synack_us = BPF_CORE_READ((struct tcp_request_sock *)oldest, snt_synack);
	activity = bpf_map_lookup_elem(&activities, &key);
	if (activity) {
		record->accepts = activity->accepts;
		record->accepter = activity->accepter;
		record->last_accept_ns = activity->last_accept_ns;
		__builtin_memcpy(record->refused, activity->refused, sizeof(record->refused));
		__builtin_memcpy(record->unnamed, activity->unnamed, sizeof(record->unnamed));
	}
	return 1;
}

/* An entry of the table. A socket that listens no more has one until it is destroyed. */
static long look_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct sock *sk = (struct sock *)*key;
	__u32 at = found_count;
	struct listener *record;

	if (BPF_CORE_READ(sk, __sk_common.skc_state) != STATE_LISTEN)
		return 0;
	record = bpf_map_lookup_elem(&found, &at);
	if (record && listener_read(sk, connection, record))
		found_count = at + 1;
	return 0;
}

static __always_inline void holder_write(struct seq_file *seq, struct task_struct *task, struct sock *sk, __u32 fd)
{
	struct listener_holder holder = {.socket = (__u64)sk, .fd = fd};
	const struct connection *connection = connection_find(sk);

	if (connection)
		holder.since_ns = connection->opened_ns;
	owner_of_task(task, &holder.owner);
	holder.parent = BPF_CORE_READ(task, real_parent, tgid);
	holder.inside = BPF_CORE_READ(task, nsproxy, net_ns) == BPF_CORE_READ(sk, __sk_common.skc_net.net);
	holder.wanted = filter_owner(&holder.owner);
	bpf_seq_write(seq, &holder, sizeof(holder));
}

#endif
