/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Has the kernel refused the packet of a handshake, or answered it with a cookie, and why? The counters of this CPU tell: by how
 * much they have grown while a function of the kernel handled the packet. An object says in refusal() what it does about it.
 */
#ifndef TCPSCOPE_HANDSHAKE_BPF_H
#define TCPSCOPE_HANDSHAKE_BPF_H

#include "kernel.bpf.h"
#include "mib.bpf.h"
#include "queues.bpf.h"

/* What is known of the packet is in `in_hand`, but for `skb`, of which the verifier knows the type there. */
static __noinline int refusal(void *ctx, struct sk_buff *skb, int step, int cause);

/* A function is entered. If the function that handles the packet calls another one, the outermost one counts. */
static __always_inline void handshake_enter(enum function function, struct sock *sk, struct sk_buff *skb,
					    struct request_sock *req)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);

	if (!packet || (packet->function && packet->function < function && packet->sk == sk && packet->skb == skb))
		return;
	packet->sk = sk;
	packet->skb = skb;
	packet->req = req;
	packet->function = function;
	mib_read(packet, &packet->before);
}

static __always_inline void mib_subtract(struct mib *now, const struct mib *before)
{
	now->overflows -= before->overflows;
	now->drops -= before->drops;
	now->cookies -= before->cookies;
	now->full -= before->full;
	now->fast_open_fails -= before->fast_open_fails;
}

/* Without cookies tcp_conn_request() reserves the last quarter of tcp_max_syn_backlog for known peers. */
static __always_inline bool reserved_quarter(struct sock *sk)
{
	struct queues queues = {};

	queues_read(sk, &queues);
	return !queues.syncookies &&
	       (int)(queues.max_syn_backlog - queues.syn_queue) < (int)(queues.max_syn_backlog >> 2);
}

/* CAUSE_UNKNOWN: neither refused nor answered with a cookie. */
static __always_inline enum cause cause_of(const struct mib *grown, enum step step, struct sock *sk)
{
	if (!grown->drops)
		return grown->cookies ? CAUSE_COOKIE_SENT : CAUSE_UNKNOWN;
	return grown->overflows                           ? CAUSE_ACCEPT_QUEUE_FULL
	       : grown->full                              ? CAUSE_SYN_QUEUE_FULL
	       : step == STEP_SYN && reserved_quarter(sk) ? CAUSE_SYN_QUEUE_RESERVED
							  : CAUSE_OTHER;
}

static __always_inline enum step step_of(enum function function)
{
	return function == FUNCTION_SYN ? STEP_SYN : STEP_ACK;
}

/*
 * A function returns. Only the outermost function reports. If the program at its entry was skipped, another function is
 * there, or none. If this program is skipped, the packet stays there until the next one comes.
 */
static __noinline int handshake_cause(int function)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);
	struct mib grown = {};

	if (!packet || packet->function != (__u32)function)
		return CAUSE_UNKNOWN;
	packet->function = FUNCTION_NONE;
	mib_read(packet, &grown);
	mib_subtract(&grown, &packet->before);
	packet->fast_open = grown.fast_open_fails;
	return cause_of(&grown, step_of(function), packet->sk);
}

#endif
