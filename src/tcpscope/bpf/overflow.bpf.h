/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* A handshake that the kernel refused, or answered with a cookie. */
#ifndef TCPSCOPE_OVERFLOW_BPF_H
#define TCPSCOPE_OVERFLOW_BPF_H

#include "activity.bpf.h"
#include "connection.bpf.h"
#include "event.bpf.h"
#include "handshake.bpf.h"
#include "lengths.bpf.h"
#include "mib.bpf.h"
#include "queues.bpf.h"

#define STACK_DEPTH 24

enum answer {
	ANSWER_UNKNOWN,
	ANSWER_NONE,
	ANSWER_SYN_COOKIE,
	ANSWER_RST,
} __attribute__((packed));

struct overflow {
	struct event event;
	struct queues queues;
	enum cause cause WIDTH(17) DOC("why it was refused; UNKNOWN if sampled and not certain");
	enum step step DOC("at which step of the handshake") UNKNOWN_IS("zero");
	enum answer answer DOC("how the kernel answered the peer") UNKNOWN_IS("zero");
	__u8 padding;
	__u32 count DOC("number of refusals; 1 unless sampled");
	__u32 padding2;
	__u64 stack[STACK_DEPTH] KIND("stack") DOC("kernel stack, innermost first") UNKNOWN_IS("zero");
};

const struct overflow *overflow_anchor __attribute__((unused));

const volatile bool send_events;
const volatile bool send_stacks;

/* Without one of the first three user space samples; the fourth is a hook of the tracepoints that replace the third. */
const volatile bool hooked_syn_exit, hooked_ack4_exit, hooked_ack6_exit, hooked_syn_exit_again;

/* Does user space make events from snapshots? It needs all listeners of a namespace for that, and its counters. */
static __always_inline bool sampled(void)
{
	return send_events && !(hooked_syn_exit && hooked_ack4_exit && (hooked_ack6_exit || hooked_syn_exit_again));
}

/* The remote end of a handshake. It comes from the packet: at the SYN there is no request yet. */
static __always_inline void peer_read(struct sk_buff *skb, struct identity *id)
{
	unsigned char *head = BPF_CORE_READ(skb, head);
	unsigned char *ip = head + BPF_CORE_READ(skb, network_header);
	__be16 port = 0;
	__be32 v4 = 0;
	__u8 version = 0;

	bpf_probe_read_kernel(&port, 2, head + BPF_CORE_READ(skb, transport_header));
	bpf_probe_read_kernel(&version, 1, ip);
	id->rport = bpf_ntohs(port);
	if (version >> 4 == 6) {
		bpf_probe_read_kernel(id->raddr, 16, ip + 8);
		id->family = 6;
	} else {
		bpf_probe_read_kernel(&v4, 4, ip + 12);
		map_v4(id->raddr, v4);
		id->family = 4;
	}
}

/*
 * tcp_check_req() handles the final ACK of a request, and reads tcp_abort_on_overflow. An ACK that answers a SYN cookie does
 * not pass there. Its request is made from the cookie and has no listener; the kernel drops the ACK without an answer.
 */
static __always_inline enum answer answer_to(struct in_hand *packet, int step, int cause, bool abort_on_overflow)
{
	struct request_sock *req =
		packet->req; /* outside of BPF_CORE_READ, which would look for our struct in the kernel */

	if (cause == CAUSE_COOKIE_SENT)
		return ANSWER_SYN_COOKIE;
	if (packet->fast_open)
		return ANSWER_UNKNOWN; /* without the child tcp_conn_request() goes on and may send a SYN-ACK */
	if (step == STEP_ACK && cause == CAUSE_ACCEPT_QUEUE_FULL && abort_on_overflow &&
	    (packet->reset || BPF_CORE_READ(req, __req_common.skc_listener)))
		return ANSWER_RST;
	return ANSWER_NONE;
}

static __noinline int refusal(void *ctx, struct sk_buff *skb, int step, int cause)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);
	struct connection *connection;
	struct activity *activity;
	/* Without a lower bound: for both at once the compiler compares a difference, of which 6.12's verifier infers nothing. */
	__u32 row = step, column = cause;
	struct identity id = {};
	struct overflow *event;

	if (!packet || sampled())
		return 0;
	connection = packet->unnamed ? NULL : connection_find(packet->sk);
	activity = packet->unnamed ? NULL : activity_of(packet->sk);
	if (activity && row < STEPS && column < CAUSES)
		__sync_fetch_and_add(&activity->refused[row][column], 1);
	if (want_lengths)
		lengths_full(packet->sk, cause, packet->unnamed);
	if (!send_events)
		return 0;
	identity_read(packet->sk, &id);
	peer_read(skb, &id);
	id.cookie = packet->unnamed ? 0 : cookie_if_any(packet->sk);
	event = event_begin(sizeof(*event), bpf_ktime_get_ns(), &id, connection_owner(connection));
	if (!event)
		return 0;
	queues_read(packet->sk, &event->queues);
	event->queues.syn_queue += packet->reset; /* the request, which has left the queue already */
	if (packet->unnamed)
		event->queues.accept_queue = event->queues.accept_limit = event->queues.syn_queue = -1;
	event->cause = cause;
	event->step = step;
	event->count = 1;
	event->padding = event->padding2 = 0;
	event->answer = answer_to(packet, step, cause, event->queues.abort_on_overflow);
	__builtin_memset(event->stack, 0, sizeof(event->stack));
	if (send_stacks)
		bpf_get_stack(ctx, event->stack, sizeof(event->stack), 0);
	event_submit(event);
	return 0;
}

static __always_inline int handshake_exit(void *ctx, enum function function)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);
	int cause = handshake_cause(function);

	return packet && cause ? refusal(ctx, packet->skb, step_of(function), cause) : 0;
}

#endif
