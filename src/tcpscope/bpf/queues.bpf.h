/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The two queues of a listener, what limits them, and why they refuse a handshake. */
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

#endif
