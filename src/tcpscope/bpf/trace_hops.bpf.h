/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* A packet has passed a hop: its event. And what waits for its acknowledgement or its reader. */
#ifndef TCPSCOPE_TRACE_HOPS_BPF_H
#define TCPSCOPE_TRACE_HOPS_BPF_H

#define AT_ONCE 128 /* packets that one ACK, or one read, takes out of a queue: before 5.17 */

/* The event of a hop. */
static __noinline int hop_send(const struct piece *piece, const struct identity *id, const struct at *at)
{
	__u64 last_ns = *(const volatile __u64 *)&piece->last_ns, since_us = -1; /* another processor may write it */
	struct net_device *device =
		at->device; /* outside of BPF_CORE_READ, which would look for our struct in the kernel */
	__u8 room[COUNTED_BYTES(0)] __attribute__((aligned(8)));
	struct trace *event;

	if (piece->left_out)
		return 0;
	if (last_ns && !at->late)
		since_us = at->now_ns > last_ns ? (at->now_ns - last_ns) / 1000 : 0;
	if (since_min_us && (since_us == (__u64)-1 || since_us < since_min_us)) {
		COUNT(seen);
		COUNT(filtered);
		return 0;
	}
	event = event_begin_in(room, sizeof(*event), at->now_ns, id,
			       at->sk ? connection_owner(connection_find(at->sk)) : NULL);
	if (!event)
		return 0;
	event->packet = piece->number;
	event->since_us = since_us;
	event->seq = piece->seq;
	event->ack = piece->ack;
	event->packet_bytes = piece->bytes;
	event->data_bytes = piece->end_seq - piece->seq - !!(piece->flags & TCP_SYN) - !!(piece->flags & TCP_FIN);
	event->reason = at->reason;
	event->cpu = bpf_get_smp_processor_id();
	event->queue = at->queue;
	event->flags = piece->flags;
	event->hop = at->hop;
	event->before = piece->side ?: piece->hop;
	event->direction = piece->direction;
	event->where = at->where;
	__builtin_memset(event->device, 0, sizeof(event->device));
	if (!IS_GROUPING)
		__builtin_memset(event->chain, 0, sizeof(event->chain));
	if (device)
		BPF_CORE_READ_STR_INTO(&event->device, device, name);
	if (!IS_GROUPING && at->chain)
		chain_write(at->chain, event->chain);
	return event_submit(event);
}

static __always_inline struct at at_hop(enum hop hop)
{
	return (struct at){.now_ns = bpf_ktime_get_ns(), .reason = -1, .queue = -1, .hop = hop};
}

static __always_inline struct waiting *waiting_find(struct sock *sk, __u32 queue, __u32 index)
{
	struct place place = {.sk = (__u64)sk, .index = index, .queue = queue};

	return bpf_map_lookup_elem(&waiting, &place);
}

static __always_inline void waiting_delete(struct sock *sk, __u32 queue, __u32 index)
{
	struct place place = {.sk = (__u64)sk, .index = index, .queue = queue};

	bpf_map_delete_elem(&waiting, &place);
}

/* The packet waits for the acknowledgement or the reader. If the queue is full, the oldest one gives way. */
static __noinline int waiting_add(struct flow *flow, struct followed *followed, __u32 queue)
{
	struct waiting new = {.skb = followed->skb};
	__u32 index, which = queue & 1;
	struct place place = {.sk = followed->sk, .queue = which};

	if (flow->next[which] - flow->first[which] >= DEPTH) {
		waiting_delete((struct sock *)followed->sk, which, flow->first[which]++);
		COUNT(missed);
	}
	index = flow->next[which]++;
	followed->piece.index = index;
	followed->piece.waits = true;
	new.piece = followed->piece;
	place.index = index;
	if (bpf_map_update_elem(&waiting, &place, &new, BPF_ANY))
		COUNT(table_full);
	return 0;
}

/* The packet has passed this hop. Of what this host sends the queue of its connection knows it, too. */
static __always_inline int hop_note(struct followed *followed, const struct at *at)
{
	struct waiting *sent;

	hop_send(&followed->piece, &followed->id, at);
	followed->piece.hop = at->hop;
	followed->piece.side = HOP_UNKNOWN;
	followed->piece.last_ns = at->now_ns;
	if (!followed->piece.waits || followed->piece.direction != WAY_SENT)
		return 0;
	sent = waiting_find((struct sock *)followed->sk, OF_ACKS, followed->piece.index);
	if (!sent)
		return 0;
	sent->hop = at->hop;
	sent->last_ns = at->now_ns;
	if (sent->skb == followed->skb) {
		sent->piece.hop = at->hop;
		sent->piece.last_ns = at->now_ns;
	}
	return 0;
}

/* A packet that is at its hop no more: it may not be followed any longer, or its entry be that of another one. */
static __noinline int copy_pass(struct followed *copy, __u64 device, enum hop hop)
{
	struct at at = at_hop(hop);

	at.device = (struct net_device *)device;
	at.sk = (struct sock *)copy->owned;
	return hop_note(copy, &at);
}

/*
 * For hop_pass(). The verifier looks at a global function once, not once for each way that leads to a call. Before 5.12 such a function
 * takes numbers only.
 */
__noinline int hop_passed(__u64 skb, __u64 now_ns, __u64 device, __u32 reason, __u32 rest)
{
	struct followed *followed = packet_find(skb);
	struct at at = {.now_ns = now_ns, .device = (struct net_device *)device, .reason = reason};

	if (!followed) { /* another processor has just taken it out of the table */
		COUNT(missed);
		return 0;
	}
	at.hop = rest;
	at.where = rest >> 8;
	at.queue = rest >> 16;
	at.sk = (struct sock *)followed->owned;
	if (at.hop == HOP_DROPPED && at.where)
		at.chain = &followed->chain;
	return hop_note(followed, &at);
}

/* A packet of the table `packets` has passed this hop. */
static __always_inline int hop_pass(struct followed *followed, const struct at *at)
{
	return hop_passed(followed->skb, at->now_ns, number_of((__u64)at->device), at->reason,
			  (__u32)at->queue << 16 | at->where << 8 | at->hop);
}

/* One that waits. False: it goes on waiting. A read does not take the sequence number of a FIN. */
static __noinline bool waiting_end(struct flow *flow, struct sock *sk, __u32 queue, __u32 upto, struct at *at)
{
	__u32 which = queue & 1, index = flow->first[which], end_seq;
	struct waiting *first = waiting_find(sk, which, index);
	struct followed *followed;

	if (first) {
		end_seq = first->piece.end_seq - (which == OF_READS && first->piece.flags & TCP_FIN);
		if (is_after(end_seq, upto))
			return false;
		at->late = !is_after(end_seq, flow->taken[which]) ||
			   (at->inexact && (end_seq != upto || !(first->piece.flags & (TCP_SYN | TCP_FIN))));
		if (first->last_ns) {
			first->piece.hop = first->hop;
			first->piece.last_ns = first->last_ns;
		}
		hop_send(&first->piece, &flow->id, at);
		followed = which == OF_READS ? packet_find(first->skb) : NULL;
		if (followed && followed->piece.number == first->piece.number &&
		    followed->piece.seq == first->piece.seq)
			packet_delete(first->skb);
		waiting_delete(sk, which, index);
	}
	flow->first[which]++;
	return true;
}

/* An ACK or a read takes packets out of the queue. */
struct take {
	struct flow *flow;
	struct sock *sk;
	__u32 queue, upto;
	struct at at;
};

/* `inexact`: only the ACK of a SYN or FIN is known to have come now. */
static __always_inline struct take take_of(struct flow *flow, __u32 queue, __u32 upto, bool inexact, __u64 now_ns)
{
	struct take take = {.flow = flow, .sk = (struct sock *)flow->sk, .queue = queue, .upto = upto};

	take.at = (struct at){.now_ns = now_ns, .reason = -1, .queue = -1, .inexact = inexact};
	take.at.hop = queue == OF_ACKS ? HOP_ACKED : HOP_READ;
	take.at.sk = take.sk;
	return take;
}

static __always_inline bool take_next(struct take *take)
{
	__u32 which = take->queue & 1;

	return take->flow->first[which] != take->flow->next[which] &&
	       waiting_end(take->flow, take->sk, which, take->upto, &take->at);
}

static long take_turn(__u32 index, struct take *take)
{
	return !take_next(take);
}

/* The same as a global function, as hop_passed() is. False: there is no next one. */
__noinline int take_one(__u64 sk, __u32 queue, __u32 upto, __u32 inexact, __u64 now_ns)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &sk);
	struct take take;

	if (!flow)
		return 0;
	take = take_of(flow, queue, upto, inexact, now_ns);
	return take_next(&take);
}

/*
 * The bytes before `upto` have been read or acknowledged. Before 5.17 a program takes only so many at once: those behind them have to
 * wait for its next run, and have no delay then.
 */
static __always_inline void waiting_take(struct flow *flow, __u32 queue, __u32 upto, bool inexact, bool loops)
{
	__u64 now_ns = bpf_ktime_get_ns();

	if (loops) {
		struct take take = take_of(flow, queue, upto, inexact, now_ns);

		bpf_loop(DEPTH, take_turn, &take, 0);
	} else {
		for (int i = 0; i < AT_ONCE && take_one(flow->sk, queue, upto, inexact, now_ns); i++)
			;
	}
	flow->taken[queue & 1] = upto;
}

#endif
