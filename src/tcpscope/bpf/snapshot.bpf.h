/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* A listener as it is now, once for each process that holds it. */
#ifndef TCPSCOPE_SNAPSHOT_BPF_H
#define TCPSCOPE_SNAPSHOT_BPF_H

#include "connection.bpf.h"
#include "mib.bpf.h"
#include "overflow.bpf.h"
#include "queues.bpf.h"

#define MAX_CPUS 1024

struct listener {
	struct identity id;
	struct owner owner;
	struct queues queues;
	__u32 fd DOC("file descriptor of the process");
	__u64 socket; /* address, to join the holders of one listener */
	__u32 drops DOC("the socket's own count since listen() (sk_drops): a refused SYN is one, a final ACK two");
	bool wanted; /* this holder passes the filter */
	__u8 padding[3];
	__u64 accepts;
	__u64 last_accept_ns;
	__u64 net_overflows; /* the counters of the namespace, for samples; all bits set if they cannot be read */
	__u64 net_drops;
	__u64 net_full;
	__u64 oldest_synack_us; /* when the SYN-ACK of the connection at the head of the accept queue was sent */
	__u64 now_ns;
	__u64 refused[STEPS][CAUSES];
};

const struct listener *listener_anchor __attribute__((unused));

const volatile bool hooked_syn_exit, hooked_ack4_exit, hooked_ack6_exit; /* without one of them user space samples */

/* Then the events are made from snapshots, which needs every listener of a namespace beside its counters. */
static __always_inline bool sampled(void)
{
	return send_events && !(hooked_syn_exit && hooked_ack4_exit && hooked_ack6_exit);
}

/*
 * The namespace's counters over all CPUs. A loop, not bpf_loop(): 5.10 refuses a program with callbacks, used or not.
 */
static __noinline int net_counters_read(struct sock *sk, struct listener *record)
{
	char *counters = (char *)BPF_CORE_READ(sk, __sk_common.skc_net.net, mib.net_statistics);
	__u32 zero = 0;

	record->net_drops = 0;
	for (__u32 cpu = 0; cpu < MAX_CPUS; cpu++) {
		struct in_hand *copy = bpf_map_lookup_percpu_elem(&in_hand, &zero, cpu);
		__u64 value = 0, offset;

		if (!copy)
			break;
		offset = cpu_offset(copy);
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_listen_overflows * 8);
		record->net_overflows += value;
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_listen_drops * 8);
		record->net_drops += value;
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_reqq_full_drop * 8);
		record->net_full += value;
	}
	return 0;
}

/* A listener on :: takes IPv4 too, unless it is for IPv6 only (IPV6_V6ONLY, net.ipv6.bindv6only): -4 and -6 mean it. */
static __always_inline bool listener_wanted(struct sock *sk, struct identity *id)
{
	struct sock_common *common = &sk->__sk_common;
	const __u64 *address = (const __u64 *)id->laddr;
	__u8 family = id->family;
	bool wanted;

	if (filter.family == 4 && family == 6 && !address[0] && !address[1] &&
	    !BPF_CORE_READ_BITFIELD_PROBED(common, skc_ipv6only))
		id->family = 4;
	wanted = filter_identity(id);
	id->family = family;
	return wanted;
}

/* A record has no room on the stack of 512 bytes. Snapshots are read one after the other, so one place is enough. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct listener);
} scratch SEC(".maps");

static __always_inline void listener_write(struct seq_file *seq, struct task_struct *task, struct file *file, __u32 fd)
{
	struct sock *sk = tcp_sock_of_file(file);
	struct inet_connection_sock *icsk;
	struct request_sock *oldest;
	struct activity *activity;
	struct listener *record;
	__u32 zero = 0;
	__u64 key;

	if (!sk || BPF_CORE_READ(sk, __sk_common.skc_state) != STATE_LISTEN)
		return;
	record = bpf_map_lookup_elem(&scratch, &zero);
	if (!record)
		return;
	__builtin_memset(record, 0, sizeof(*record));
	cookie_give(file, STATE_LISTEN);
	identity_read(sk, &record->id);
	record->id.cookie = cookie_if_any(sk);
	record->wanted = listener_wanted(sk, &record->id);
	if (!record->wanted && !sampled())
		return;
	owner_of_task(task, &record->owner);
	record->wanted = record->wanted && filter_owner(&record->owner);
	queues_read(sk, &record->queues);
	record->fd = fd;
	record->socket = key = (__u64)sk;
	record->net_drops = -1;
	/* Before the counters: a refusal in between is then one of the namespace that waits for its packet. */
	record->drops = BPF_CORE_READ(sk, sk_drops.counter);
	if (sampled() && bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_map_lookup_percpu_elem))
		net_counters_read(sk, record);
	record->now_ns = bpf_ktime_get_ns();
	icsk = (struct inet_connection_sock *)sk;
	oldest = BPF_CORE_READ(icsk, icsk_accept_queue.rskq_accept_head);
	if (oldest)
		record->oldest_synack_us = BPF_CORE_READ((struct tcp_request_sock *)oldest, snt_synack);
	activity = bpf_map_lookup_elem(&activities, &key);
	if (activity) {
		record->accepts = activity->accepts;
		record->last_accept_ns = activity->last_accept_ns;
		__builtin_memcpy(record->refused, activity->refused, sizeof(record->refused));
	}
	bpf_seq_write(seq, record, sizeof(*record));
}

#endif
