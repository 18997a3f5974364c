/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What a discarded packet was: lost, refused, or no loss; and in which counter the kernel has counted it. */
#ifndef TCPSCOPE_DROPS_JUDGE_BPF_H
#define TCPSCOPE_DROPS_JUDGE_BPF_H

/* What else decides about a packet that is discarded for a reason. */
enum rule {
	RULE_NONE,
	RULE_RECEIVER,  /* the receiver, or the place in the kernel: the reason says nothing */
	RULE_NO_SOCKET, /* the flags */
	RULE_OVERFLOW,  /* the accept queue */
	RULE_STATE,     /* not counted so in SYN_SENT */
	RULE_ORDER,     /* whether it is the next segment */
	RULE_NOT_RST,   /* not counted so of a RST */
};

struct fact {
	__u8 kind;
	__u8 counter;
	__u8 rule;
	__u8 no_device; /* the packet was in a queue of the socket: skb->dev was overwritten */
	__u8 of_tcp;    /* no other packet is discarded for this reason */
};

/* A function of the kernel, by address, where a discard without a reason is harmless. */
struct place {
	__u64 begin, end;
	__u8 only; /* enum only */
	__u8 padding[7];
};

/* Of which packets. */
enum only { ONLY_ANY, ONLY_RECEIVED, ONLY_AFTER_FIN };

const volatile struct fact facts[2][REASONS]; /* of IPv4, IPv6 */
const volatile struct place places[PLACES];

/* A reason of a subsystem has the subsystem's number in its upper half. Without reasons it is -1. */
static __always_inline struct fact fact_of(__u32 reason, bool ipv6)
{
	const volatile struct fact *fact;

	if (reason == (__u32)-1)
		reason = 0;
	if (reason >= REASONS)
		return (struct fact){.kind = KIND_LOST};
	fact = &facts[ipv6][reason];
	return (struct fact){fact->kind, fact->counter, fact->rule, fact->no_device, fact->of_tcp};
}

/* Then nobody has to look at the packet. */
static __always_inline bool says_all(const struct fact *fact)
{
	return !want_packet && fact->of_tcp && !fact->rule;
}

/* tcp_rcv_state_process() takes an ACK that follows the peer's FIN, and then discards it as any other. */
static __always_inline bool is_after_fin(const struct discard *discard)
{
	return (discard->packet.flags & (TCP_ACK | TCP_SYN)) == TCP_ACK &&
	       (!discard->state || discard->state == STATE_CLOSE_WAIT || discard->state == STATE_LAST_ACK ||
		discard->state == STATE_CLOSING);
}

static __always_inline bool in_harmless_place(const struct discard *discard, __u64 location)
{
	for (int i = 0; i < PLACES && places[i].end; i++)
		if (location >= places[i].begin && location < places[i].end)
			return places[i].only == ONLY_RECEIVED    ? discard->direction != DIRECTION_SENT
			       : places[i].only == ONLY_AFTER_FIN ? is_after_fin(discard)
								  : true;
	return false;
}

/* The kernel refuses a final ACK because the accept queue is full, or because it cannot make the child. */
static __always_inline void refused_by_listener(struct discard *discard)
{
	struct sock *sk = discard->sk; /* outside of BPF_CORE_READ, which would look for our struct in the kernel */
	bool full = BPF_CORE_READ(sk, sk_ack_backlog) > BPF_CORE_READ(sk, sk_max_ack_backlog);

	discard->kind = KIND_REFUSED;
	discard->counter = full ? COUNTER_TcpExtListenOverflows : COUNTER_TcpExtListenDrops;
}

/* A packet for a listener that is discarded without a reason: tcp_check_req(), tcp_v4_do_rcv(), tcp_v6_do_rcv(). */
static __always_inline void judge_at_listener(struct discard *discard)
{
	struct inet_connection_sock *listener = (struct inet_connection_sock *)discard->sk;
	const struct packet *packet = &discard->packet;
	bool deferred = discard->deferred;

	if (packet->flags == NO_FLAGS)
		return;
	if (packet->flags & (TCP_SYN | TCP_RST)) {
		discard->kind = KIND_HARMLESS; /* a SYN that is answered once more; a peer that gives up */
		return;
	}
	if (overflow_has_reason)
		deferred = !packet->data && !(packet->flags & TCP_FIN) &&
			   BPF_CORE_READ(listener, icsk_accept_queue.rskq_defer_accept);
	if (deferred) {
		discard->kind = KIND_HARMLESS;
		discard->counter = COUNTER_TcpExtTCPDeferAcceptDrop;
	} else if (!(packet->flags & TCP_ACK) || (discard->noted && !discard->in_window)) {
		discard->kind = KIND_LOST;
	} else if (discard->noted && !overflow_has_reason) {
		refused_by_listener(discard);
	} else {
		discard->kind = KIND_REFUSED;
	}
}

static __always_inline void judge_without_reason(struct discard *discard, __u64 location)
{
	if (discard->state == STATE_TIME_WAIT || in_harmless_place(discard, location))
		discard->kind = KIND_HARMLESS;
	else if (discard->state == STATE_LISTEN)
		judge_at_listener(discard);
	else if (discard->direction == DIRECTION_SENT)
		discard->kind = KIND_LOST;
}

/* A SYN to a port without a listener is refused. A RST for a connection that is gone needs no answer. */
static __always_inline void judge_no_socket(struct discard *discard)
{
	__u16 flags = discard->packet.flags;

	if (flags == NO_FLAGS)
		return;
	discard->kind = flags & TCP_RST                                                              ? KIND_HARMLESS
			: discard->state == STATE_LISTEN || (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN ? KIND_REFUSED
												     : KIND_LOST;
}

/* tcp_data_queue() counts the next segment in one counter, tcp_data_queue_ofo() a later one in the other. */
static __always_inline enum counter counter_by_order(const struct discard *discard)
{
	const struct tcp_sock *tcp = (const struct tcp_sock *)discard->sk;

	if (!discard->sk || !discard->state || discard->packet.flags == NO_FLAGS)
		return COUNTER_NONE;
	return (__s32)(discard->packet.seq - BPF_CORE_READ(tcp, rcv_nxt)) > 0 ? COUNTER_TcpExtTCPOFODrop
									      : COUNTER_TcpExtTCPRcvQDrop;
}

static __noinline int judge(struct discard *discard, __u32 rule, __u64 location)
{
	switch (rule) {
	case RULE_RECEIVER:
		judge_without_reason(discard, location);
		break;
	case RULE_NO_SOCKET:
		judge_no_socket(discard);
		break;
	case RULE_OVERFLOW:
		if (discard->state == STATE_LISTEN)
			refused_by_listener(discard);
		break;
	case RULE_STATE:
		if (!discard->state || discard->state == STATE_SYN_SENT)
			discard->counter = COUNTER_NONE;
		break;
	case RULE_ORDER:
		discard->counter = counter_by_order(discard);
		break;
	case RULE_NOT_RST:
		if (discard->packet.flags & TCP_RST) /* or it is not known */
			discard->counter = COUNTER_NONE;
		break;
	}
	return 0;
}

/* Of a segment that came too early and waited: is it in another one that has come meanwhile, or was there no room for it? */
static __always_inline enum discard_kind kind_of_early(struct sock *sk, const struct tcp_skb_cb *segment)
{
	__s32 ahead = BPF_CORE_READ(segment, end_seq) - BPF_CORE_READ((struct tcp_sock *)sk, rcv_nxt);

	return ahead > 0 ? KIND_LOST : KIND_HARMLESS;
}

/* Of a segment in the window: what tcp_ack() or tcp_rcv_state_process() has against it. */
static __always_inline enum discard_kind kind_in_window(const struct discard *discard, const struct tcp_skb_cb *segment)
{
	struct tcp_sock *tcp = (struct tcp_sock *)discard->sk;
	bool closing = discard->state == STATE_CLOSE_WAIT || discard->state == STATE_LAST_ACK ||
		       discard->state == STATE_CLOSING;

	if (discard->packet.flags & TCP_RST)
		return KIND_HARMLESS;
	if (!(discard->packet.flags & TCP_ACK))
		return KIND_LOST;
	if (closing && BPF_CORE_READ(segment, seq) == BPF_CORE_READ(segment, end_seq))
		return KIND_HARMLESS; /* a bare ACK: tcp_ack() has handled it */
	return discard->state != STATE_ESTABLISHED && is_synchronized(discard->state) &&
			       (__s32)(BPF_CORE_READ(segment, ack_seq) - BPF_CORE_READ(tcp, snd_una)) < 0
		       ? KIND_HARMLESS
		       : KIND_LOST;
}

/*
 * What a socket has discarded without a tracepoint. False if that is not certain: another CPU may have discarded another packet
 * for this socket meanwhile, and this one could be taken.
 */
static __noinline bool judge_handled(struct discard *discard, struct handled *handled, struct sk_buff *skb)
{
	const struct tcp_skb_cb *segment = (struct tcp_skb_cb *)__builtin_preserve_access_index(&skb->cb);
	struct sock *sk = handled->sk;
	__u32 grown = handled->grown;
	bool early = skb != handled->skb;
	enum window where = is_synchronized(handled->state) ? window_of(sk, segment) : WINDOW_IN;

	if (grown < WATCHED) {
		discard->kind = watched[grown].kind;
		discard->counter = watched[grown].counter;
	} else if ((early || where == WINDOW_IN) && handled->of_process && backlog_is_full(sk)) {
		return false;
	} else if (early) {
		discard->kind = kind_of_early(sk, segment);
	} else if (handled->state != discard->state) {
		discard->kind = KIND_HARMLESS; /* it has changed the state */
	} else {
		discard->kind = where == WINDOW_BEFORE   ? KIND_HARMLESS
				: where == WINDOW_BEYOND ? KIND_LOST
							 : kind_in_window(discard, segment);
	}
	return true;
}

#endif
