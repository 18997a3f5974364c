/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The way of a packet that a device of this host receives, to who reads it. */
#ifndef TCPSCOPE_TRACE_RECEIVED_BPF_H
#define TCPSCOPE_TRACE_RECEIVED_BPF_H

/*
 * Is a packet that was followed to this hop the one that a device receives now, or gives to GRO? A second device of this host may: a
 * bridge, or the device of a tunnel.
 */
static __always_inline bool may_arrive(struct sk_buff *skb, const struct piece *piece, enum hop hop)
{
	return piece->hop == HOP_START_XMIT || piece->hop == HOP_XMIT ||
	       (piece->hop == HOP_GRO && hop == HOP_RECEIVE) ||
	       (piece->hop == HOP_RECEIVE && (skb->skb_iif || piece->hidden));
}

/*
 * What is cheap to ask of a packet that a device receives, or gives to GRO, before all else is read. The data begins at the IP header. A
 * short packet has something else behind it, and one of napi_gro_frags() may have its headers in a fragment: that shows when they are
 * read. Apart, for the stack of received().
 */
static __noinline bool may_be_received(struct sk_buff *skb)
{
	__u8 headers[IPV6_BYTES + 4] __attribute__((aligned(8)));
	const __u8 *ports;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return false;
	if (filter.netns_count != ANY_VALUE && !wanted_netns(BPF_CORE_READ(skb->dev, nd_net.net, ns.inum)))
		return false;
	if (bpf_probe_read_kernel(headers, sizeof(headers), skb->data))
		return false;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (headers[9] != IPPROTO_TCP)
			return false;
		if ((headers[0] & 15) * 4 != IPV4_BYTES)
			return true;
		ports = headers + IPV4_BYTES;
	} else {
		if (headers[6] != IPPROTO_TCP)
			return is_extension(headers[6]);
		ports = headers + IPV6_BYTES;
	}
	return are_ports_chosen(ports[2] << 8 | ports[3], ports[0] << 8 | ports[1]);
}

/* It may be the last one of a handshake, see handshake_end(). */
static __noinline int received_note(struct sk_buff *skb)
{
	__u32 zero = 0;
	struct sending *sending = bpf_map_lookup_elem(&sendings, &zero);

	if (sending)
		sending->received = (__u64)skb;
	return 0;
}

enum arrived { ARRIVED_OTHER, ARRIVED, ARRIVED_INSIDE };

/* What a device receives, with its ends: a packet, or one in a tunnel that is followed. Apart, for the stack of received(). */
static __noinline enum arrived arrived_read(struct sk_buff *skb, const struct followed *followed, struct packet *packet,
					    struct identity *id)
{
	enum arrived arrived = ARRIVED;

	if (packet_read_at(skb, data_offset(skb), packet) != OF_TCP || packet->flags == NO_FLAGS) {
		if (!followed || !is_inside(skb, followed) || inner_read(skb, packet) != OF_TCP)
			return ARRIVED_OTHER;
		arrived = ARRIVED_INSIDE;
	}
	ends_read(packet, false, id);
	id->netns = BPF_CORE_READ(skb->dev, nd_net.net, ns.inum);
	return arrived;
}

/*
 * A device receives a packet, or gives it to GRO. It may be one that was sent on this host. It belongs to another connection now. NULL:
 * it is not followed.
 */
static __noinline struct followed *received_begin(struct sk_buff *skb, enum hop hop)
{
	struct followed *followed = followed_find(skb);
	struct packet packet = {};
	struct identity id = {};
	enum arrived arrived = arrived_read(skb, followed, &packet, &id);
	bool chosen, hidden = arrived == ARRIVED_INSIDE;
	struct sock *sk = NULL;

	if (arrived == ARRIVED_OTHER)
		return NULL;
	chosen = filter_identity(&id);
	if (chosen) {
		sk = (struct sock *)socket_with(&id);
		chosen = is_owner_chosen(sk);
	}
	if (followed && ((!hidden && !is_same(followed, &packet)) || !may_arrive(skb, &followed->piece, hop))) {
		followed_delete(skb);
		followed = NULL;
	}
	if (!followed && !hidden && chosen)
		followed = followed_add(skb, &packet, WAY_RECEIVED, 0);
	if (!followed)
		return NULL;
	if (sk)
		id.cookie = cookie_if_any(sk);
	followed->id = id;
	followed->sk = followed->owned = (__u64)sk;
	followed->piece.direction = WAY_RECEIVED;
	followed->piece.waits = false;
	followed->piece.hidden = hidden;
	followed->piece.left_out = !chosen;
	if (!hidden)
		piece_read(skb, &packet, &followed->piece); /* several may have become one (GRO) */
	if (!sk)
		received_note(skb);
	return followed;
}

/* Apart, so that what is on the stack before the hop is gone when the hop's event is there. */
static __noinline struct followed *received(struct sk_buff *skb, enum hop hop)
{
	struct at at = at_hop(hop);
	struct followed *followed = received_begin(skb, hop);

	if (!followed)
		return NULL;
	at.device = skb->dev;
	hop_pass(followed, &at);
	return followed;
}

#define TCP_SKB_CB(skb) ((const struct tcp_skb_cb *)__builtin_preserve_access_index(&(skb)->cb))

/* A connection that TCP receives for, and that was not seen before. NULL: not chosen. */
static __noinline struct flow *flow_of(struct sock *sk)
{
	struct identity id = {};
	struct flow *flow;

	if (!may_be_chosen(sk))
		return NULL;
	flow = flow_find(sk);
	if (flow)
		return flow;
	identity_read(sk, &id);
	return is_chosen(&id, sk) ? flow_add(sk, &id) : NULL;
}

/* While nothing waits, nobody looks at what is read. */
static __always_inline void unread_add(struct flow *flow, struct followed *followed)
{
	struct tcp_sock *tcp = (struct tcp_sock *)followed->sk;

	if (flow->first[OF_READS] == flow->next[OF_READS])
		flow->taken[OF_READS] = BPF_CORE_READ(tcp, copied_seq);
	waiting_add(flow, followed, OF_READS);
}

/* A packet that comes to TCP, and that no hop has seen. Apart, as the stacks of all callers together have 512 bytes. */
static __noinline struct followed *handled_begin(struct sk_buff *skb)
{
	struct packet packet = {};

	if (packet_read(skb, &packet) != OF_TCP || packet.flags == NO_FLAGS)
		return NULL;
	return followed_add(skb, &packet, WAY_RECEIVED, 0);
}

/*
 * TCP takes a segment of an established connection. It is about to handle what it says, if it is in the window. In the backlog another
 * one, also with a FIN, may have been merged into it.
 */
static __always_inline int handled(struct sock *sk, struct sk_buff *skb, __u64 cookie, bool loops)
{
	const struct tcp_skb_cb *said = TCP_SKB_CB(skb);
	__u32 seq = said->seq, end_seq = said->end_seq, ack = said->ack_seq;
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct followed *followed = followed_now(skb);
	struct flow *flow = flow_of(sk);
	struct at at;
	__u16 fin = READ_ANY_WIDTH(said, tcp_flags) & TCP_FIN;
	bool in_window;

	if (!flow) {
		if (followed)
			followed_delete(skb);
		return 0;
	}
	at = at_hop(HOP_TCP);
	in_window = window_of(sk, said) == WINDOW_IN;
	flow->id.cookie = cookie;
	follow_on(flow, OF_READS, BPF_CORE_READ(tcp, rcv_nxt), end_seq);
	if (is_after(BPF_CORE_READ(tcp, snd_una), flow->taken[OF_ACKS])) /* by an ACK that no program has seen */
		flow->taken[OF_ACKS] = BPF_CORE_READ(tcp, snd_una);
	if (!followed)
		followed = handled_begin(skb);
	if (followed) {
		followed->id = flow->id;
		followed->sk = followed->owned = (__u64)sk;
		followed->piece.left_out = false;
		at.sk = sk;
		followed->piece.end_seq = end_seq;
		followed->piece.flags |= fin;
		hop_pass(followed, &at);
		if (end_seq - seq == !!fin) /* no data */
			followed_delete(skb);
		else if (in_window && is_after(end_seq, BPF_CORE_READ(tcp, rcv_nxt)))
			unread_add(flow, followed);
	}
	if (in_window && is_after(ack, BPF_CORE_READ(tcp, snd_una)) && !is_after(ack, BPF_CORE_READ(tcp, snd_nxt)))
		waiting_take(flow, OF_ACKS, ack, false, loops);
	return 0;
}

/* A read has moved copied_seq, or not. */
static __always_inline int taken(struct sock *sk, bool loops)
{
	struct flow *flow = may_be_chosen(sk) ? flow_find(sk) : NULL;
	__u32 copied;

	if (!flow)
		return 0;
	copied = BPF_CORE_READ((struct tcp_sock *)sk, copied_seq);
	if (copied != flow->taken[OF_READS])
		waiting_take(flow, OF_READS, copied, false, loops);
	return 0;
}

/* A connection was accepted. The ACK that this CPU received for it has no hop left, unless it brought data. */
static __noinline int handshake_end(struct sock *sk)
{
	__u32 zero = 0;
	struct sending *sending = bpf_map_lookup_elem(&sendings, &zero);
	struct followed *followed = sending ? packet_find(sending->received) : NULL;

	if (followed && !followed->sk && followed->piece.hop == HOP_RECEIVE &&
	    followed->piece.end_seq == followed->piece.seq &&
	    followed->id.rport == bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport)))
		packet_delete(sending->received);
	return 0;
}

/*
 * An ACK has changed the state of the connection. It may have been preceded by ACKs that no program saw. A socket may connect again,
 * after connect() was refused or a disconnect: then it is another connection.
 */
static __always_inline int state_changed(struct sock *sk, int state, bool loops)
{
	__u32 acked = BPF_CORE_READ((struct tcp_sock *)sk, snd_una);
	struct flow *flow = flow_find(sk);

	if (flow && state == STATE_SYN_SENT) {
		destroyed(sk);
		return 0;
	}
	if (!flow && state == STATE_ESTABLISHED)
		return handshake_end(sk);
	if (flow && is_after(acked, flow->taken[OF_ACKS]))
		waiting_take(flow, OF_ACKS, acked, true, loops);
	return 0;
}

#endif
