/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * How long a listener's two queues were, at each handshake that completed, and how often one of them was full.
 *
 * The child's first transition shows the handshake (tcp_create_openreq_child(), which counts TcpPassiveOpens right after it). The
 * lengths are those right after the handshake: its request has left the SYN queue, and its child is in the accept queue. Where
 * functions can be hooked, the listener is known at the transition, before the queues change. Elsewhere the listener's wake-up
 * tells it, in the same softirq, after they have changed (child.bpf.h).
 */
#ifndef TCPSCOPE_LENGTHS_BPF_H
#define TCPSCOPE_LENGTHS_BPF_H

#include "connection.bpf.h"
#include "distribution.bpf.h"
#include "mib.bpf.h"
#include "queues.bpf.h"

enum queue {
	QUEUE_SYN,
	QUEUE_ACCEPT,
} __attribute__((packed));

/* One of the queues of a listener. */
struct length_key {
	__u64 socket;   /* address; 0: one of several listeners of this address, and it is not known which */
	__u64 since_ns; /* when listen() was called; 0: before the tool */
	__u8 laddr[16];
	__u32 netns;
	__u16 lport;
	__u8 family;
	enum queue queue;
};

struct length {
	struct distribution lengths;
	__u64 full;   /* handshakes that found it full */
	__u64 cookie; /* not in the key: on 5.10 a socket may get one later */
	__u32 limit;
	__u32 owner_pid; /* the process that called listen(); of an older listener, the first holder */
	char owner_comm[16];
};

AGGREGATE(lengths, length_key, length, 2048)

const volatile bool want_lengths;

/* Does the filter want it? -4 includes a listener on ::, which takes IPv4 too, unless it is IPv6 only (IPV6_V6ONLY). */
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

/* The key of a listener. Its owner is in `value`. False if the filter excludes it. */
static __always_inline bool length_key_of(struct sock *listener, const struct connection *connection,
					  struct length_key *key)
{
	struct identity id = {};

	identity_read(listener, &id);
	if (!listener_wanted(listener, &id) || !filter_owner(connection ? &connection->opener : NULL))
		return false;
	__builtin_memcpy(key->laddr, id.laddr, 16);
	key->netns = id.netns;
	key->lport = id.lport;
	key->family = id.family;
	return true;
}

static __always_inline struct length *length_at(struct sock *listener, const struct connection *connection,
						const struct length_key *key)
{
	struct length *length = lengths_at(key);

	if (!length)
		return NULL;
	length->limit = BPF_CORE_READ(listener, sk_max_ack_backlog);
	if (key->socket)
		length->cookie = cookie_if_any(listener);
	if (key->socket && connection) {
		length->owner_pid = connection->opener.pid;
		__builtin_memcpy(length->owner_comm, connection->opener.comm, 16);
	}
	return length;
}

/* A handshake has completed. The lengths in the socket lack `joins` in the accept queue, and still have `leaves` in the other. */
static __noinline int lengths_add(struct sock *listener, __u32 joins, __u32 leaves)
{
	struct inet_connection_sock *icsk = (struct inet_connection_sock *)listener;
	const struct connection *connection = connection_find(listener);
	__u32 accept_queue = BPF_CORE_READ(listener, sk_ack_backlog) + joins;
	__u32 syn_queue = BPF_CORE_READ(icsk, icsk_accept_queue.qlen.counter);
	struct length_key key = {.socket = (__u64)listener};
	struct length *length;

	COUNT(seen);
	COUNT(seen);
	if (!length_key_of(listener, connection, &key)) {
		COUNT(filtered);
		COUNT(filtered);
		return 0;
	}
	if (connection)
		key.since_ns = connection->opened_ns;
	key.queue = QUEUE_ACCEPT;
	length = length_at(listener, connection, &key);
	if (length)
		distribution_add(&length->lengths, accept_queue);
	key.queue = QUEUE_SYN;
	length = length_at(listener, connection, &key);
	if (length)
		distribution_add(&length->lengths, syn_queue > leaves ? syn_queue - leaves : 0);
	return 0;
}

/* A handshake has found a queue full. `unnamed`: `listener` is one of several that may be meant. */
static __noinline int lengths_full(struct sock *listener, int cause, bool unnamed)
{
	const struct connection *connection = unnamed ? NULL : connection_find(listener);
	struct net *net = BPF_CORE_READ(listener, __sk_common.skc_net.net);
	struct netns_ipv4 *ipv4 = __builtin_preserve_access_index(&net->ipv4);
	struct length_key key = {};
	struct length *length;

	if (cause == CAUSE_ACCEPT_QUEUE_FULL)
		key.queue = QUEUE_ACCEPT;
	else if (cause != CAUSE_SYN_QUEUE_FULL && cause != CAUSE_SYN_QUEUE_RESERVED &&
		 !(cause == CAUSE_COOKIE_SENT && READ_ANY_WIDTH(ipv4, sysctl_tcp_syncookies) == 1))
		return 0; /* 2: cookies are always sent */
	COUNT(seen);
	if (!length_key_of(listener, connection, &key)) {
		COUNT(filtered);
		return 0;
	}
	if (!unnamed) {
		key.socket = (__u64)listener;
		key.since_ns = connection ? connection->opened_ns : 0;
	}
	length = length_at(listener, connection, &key);
	if (length)
		__sync_fetch_and_add(&length->full, 1);
	return 0;
}

/* The child of this CPU's handshake: until the listener is woken, or until the second copy has seen it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} made_child SEC(".maps");

const volatile bool hooked_ack4_enter;

/* `again`: this is the second copy of the program (recursion.bpf.h). */
static __noinline int child_made(struct sock *child, bool again)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);
	__u64 *place = bpf_map_lookup_elem(&made_child, &zero);
	struct request_sock *req;

	if (!packet || !place)
		return 0;
	if (again && *place == (__u64)child) {
		if (hooked_ack4_enter)
			*place = 0; /* the next child may lie at the same address */
		return 0;
	}
	if (*place && !hooked_ack4_enter)
		COUNT(missed); /* the listener of the child before was not woken */
	*place = again && hooked_ack4_enter ? 0 : (__u64)child;
	if (again)
		COUNT(rescued);
	if (!hooked_ack4_enter)
		return 0;
	if (packet->function == FUNCTION_NONE) {
		COUNT(missed);
		return 0;
	}
	/* With a SYN cookie, or TCP Fast Open, there was no request in the queue. */
	req = packet->function == FUNCTION_SYN ? NULL : packet->req;
	return lengths_add(packet->sk, 1, req && BPF_CORE_READ(req, __req_common.skc_listener) ? 1 : 0);
}

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(is_birth(old_state, new_state), made, struct sock *sk, int old_state, int new_state)
{
	return sk->sk_protocol == IPPROTO_TCP ? child_made(sk, false) : 0;
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(is_birth(old_state, new_state), made_again, struct sock *sk, int old_state, int new_state)
{
	return sk->sk_protocol == IPPROTO_TCP ? child_made(sk, true) : 0;
}

static __noinline int lengths_woken(struct sock *listener)
{
	__u32 zero = 0;
	__u64 *place = bpf_map_lookup_elem(&made_child, &zero);

	if (!place || !*place)
		return 0;
	*place = 0;
	return lengths_add(listener, 0, 0);
}

UNLESS("ack4_enter__fentry ack4_enter__kprobe")
OPTIONAL("how long the queues were at a handshake")
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_tcp_listener(listener), made_woken, struct sock *listener)
{
	return lengths_woken(listener);
}

/* The first copy leaves no child at its place. */
UNLESS("ack4_enter__fentry ack4_enter__kprobe")
AGAIN
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_tcp_listener(listener), made_woken_again, struct sock *listener)
{
	return lengths_woken(listener);
}

#endif
