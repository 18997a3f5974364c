/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The two queues of a listener, what limits them, and what it has accepted and refused. */
#ifndef TCPSCOPE_QUEUES_BPF_H
#define TCPSCOPE_QUEUES_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"

enum cause {
	CAUSE_UNKNOWN,
	CAUSE_ACCEPT_QUEUE_FULL,  /* ListenOverflows */
	CAUSE_SYN_QUEUE_FULL,     /* TCPReqQFullDrop */
	CAUSE_COOKIE_SENT,        /* SyncookiesSent: answered, not refused */
	CAUSE_SYN_QUEUE_RESERVED, /* only ListenDrops; no cookies, and the last quarter is for known peers */
	CAUSE_OTHER,              /* only ListenDrops: no route, no memory, a security module */
} __attribute__((packed));

enum step {
	STEP_UNKNOWN,
	STEP_SYN, /* tcp_conn_request */
	STEP_ACK, /* tcp_v4_syn_recv_sock, tcp_v6_syn_recv_sock */
} __attribute__((packed));

#define CAUSES (CAUSE_OTHER + 1)
#define STEPS (STEP_ACK + 1)

/* The two queues of a listener and what limits them. */
struct queues {
	__u32 accept_queue TITLE("ACCEPTQ") UNKNOWN_IS("max") DOC("connections that wait for accept()");
	__u32 accept_limit TITLE("LIMIT") UNKNOWN_IS("max")
	DOC("limit of the accept queue, which holds one connection more: listen()'s backlog, cut to somaxconn");
	__u32 syn_queue TITLE("SYNQ") UNKNOWN_IS("max")
	DOC("handshakes that wait for the final ACK; the accept queue's limit holds for them, too");
	__u32 somaxconn DOC("net.core.somaxconn of the namespace");
	__u32 max_syn_backlog DOC("net.ipv4.tcp_max_syn_backlog of the namespace");
	__u8 syncookies DOC("net.ipv4.tcp_syncookies of the namespace");
	bool abort_on_overflow DOC("net.ipv4.tcp_abort_on_overflow of the namespace");
	__u8 padding[2];
};

static __noinline int queues_read(struct sock *sk, struct queues *queues)
{
	struct inet_connection_sock *icsk = (struct inet_connection_sock *)sk;
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	struct netns_ipv4 *ipv4 = __builtin_preserve_access_index(&net->ipv4);

	queues->accept_queue = BPF_CORE_READ(sk, sk_ack_backlog);
	queues->accept_limit = BPF_CORE_READ(sk, sk_max_ack_backlog);
	queues->syn_queue = BPF_CORE_READ(icsk, icsk_accept_queue.qlen.counter);
	queues->somaxconn = BPF_CORE_READ(net, core.sysctl_somaxconn);
	queues->max_syn_backlog = BPF_CORE_READ(net, ipv4.sysctl_max_syn_backlog);
	queues->syncookies = READ_ANY_WIDTH(ipv4, sysctl_tcp_syncookies);
	queues->abort_on_overflow = READ_ANY_WIDTH(ipv4, sysctl_tcp_abort_on_overflow);
	return 0;
}

/* What a listener has accepted and refused. Inserted at the first of either, deleted at tcp_destroy_sock. */
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

#endif
