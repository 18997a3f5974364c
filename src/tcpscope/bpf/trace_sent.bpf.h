/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The way of a packet that this host sends, or forwards, to a driver. */
#ifndef TCPSCOPE_TRACE_SENT_BPF_H
#define TCPSCOPE_TRACE_SENT_BPF_H

#define SEARCHED 16         /* packets of a queue, the newest, of which one may be that of which a segment was cut */
#define NETDEV_TX_BUSY 0x10 /* include/linux/netdevice.h */

/* A packet that this host sends, at the first hop that is seen of it. NULL: not chosen, or no place. */
static __noinline struct followed *sent_begin(struct sk_buff *skb, const struct packet *packet)
{
	struct sock *sk = BPF_CORE_READ(skb, sk), *owned = owned_of(sk);
	struct followed *followed;
	struct identity id = {};

	if (is_connection(sk)) { /* the header may have changed (NAT) */
		identity_read(sk, &id);
		id.cookie = cookie_if_any(sk);
	} else {
		ends_read(packet, true, &id);
		id.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	}
	if (!is_chosen(&id, owned))
		return NULL;
	followed = followed_add(skb, packet, WAY_SENT, 0);
	if (!followed)
		return NULL;
	followed->id = id;
	followed->owned = (__u64)owned;
	if (!is_connection(sk))
		return followed;
	followed->sk = (__u64)sk;
	if (!flow_find(sk))
		flow_add(sk, &followed->id);
	return followed;
}

/* Anybody who sent a packet of TCP. A received one may have the socket of its sender, in another namespace. */
static __always_inline bool is_sent_here(struct sk_buff *skb)
{
	return skb->sk && !skb->skb_iif;
}

/*
 * Is a packet that was followed to this hop the one that a device gets now? A packet that a device has received has skb_iif. Without
 * it the skb is new, at an address whose last packet may have been the same: a keepalive, or a SYN-ACK that is sent again. One in a
 * tunnel, whose device has taken it, may have waited for the link address of the next hop (ARP). The driver of a pair of devices may
 * come back on its processor after another one has received the packet: then it is at XMIT again.
 */
static __always_inline bool may_be_queued(struct sk_buff *skb, enum hop hop, bool hidden)
{
	return hop == HOP_TRANSMIT || hop == HOP_START_XMIT || (hop == HOP_RECEIVE && skb->skb_iif) ||
	       (hop == HOP_XMIT && (hidden || skb->skb_iif));
}

/* TCP, or who forwards, gives the packet to a device. A device may give it to another one. */
static __noinline int queued(struct sk_buff *skb)
{
	struct sock *sk = BPF_CORE_READ(skb, sk);
	struct packet packet = {};
	struct followed *followed = followed_find(skb);
	struct flow *flow;
	struct at at;
	bool hidden = false;

	if (!followed && (!is_sent_here(skb) || is_other(skb->sk)))
		return 0;
	at = at_hop(HOP_QUEUE);
	if (packet_read(skb, &packet) != OF_TCP || packet.flags == NO_FLAGS) {
		if (!followed || !is_inside(skb, followed))
			return 0;
		hidden = true;
	}
	if (followed &&
	    ((!hidden && !is_same(followed, &packet)) || !may_be_queued(skb, followed->piece.hop, hidden))) {
		followed_delete(skb);
		followed = NULL;
	}
	at.device = skb->dev;
	at.queue = skb->queue_mapping;
	if (followed && followed->piece.hop != HOP_TRANSMIT) {
		at.sk = (struct sock *)followed->owned;
		followed->piece.hidden = hidden;
		return hop_pass(followed, &at);
	}
	if (hidden || !is_sent_here(skb))
		return 0;
	if (followed)
		piece_read(skb, &packet, &followed->piece); /* now it has its IP header */
	else
		followed = sent_begin(skb, &packet);
	if (!followed)
		return 0;
	at.sk = owned_of(sk);
	hop_pass(followed, &at);
	flow = followed->sk ? flow_find(sk) : NULL;
	if (flow && followed->piece.end_seq != followed->piece.seq) {
		follow_on(flow, OF_ACKS, followed->piece.seq, followed->piece.end_seq);
		waiting_add(flow, followed, OF_ACKS);
	}
	return 0;
}

/*
 * The place in the queue of the packet of which the kernel has cut this segment: the newest one with that sequence number, or another
 * copy of it. NOWHERE: there is none.
 */
#define NOWHERE ((__u64) - 1)

__noinline __u64 whole_find(__u64 sk, __u32 seq)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &sk);
	__u64 newest = NOWHERE;

	if (!flow)
		return NOWHERE;
	for (__u32 i = 1; i <= SEARCHED; i++) {
		__u32 index = flow->next[OF_ACKS] - i;
		struct waiting *sent;

		if (i > flow->next[OF_ACKS] - flow->first[OF_ACKS])
			break;
		sent = waiting_find((struct sock *)sk, OF_ACKS, index);
		if (!sent || is_after(sent->piece.seq, seq) || !is_after(sent->piece.end_seq, seq))
			continue;
		if (sent->piece.hop == HOP_SEGMENTED)
			return index;
		if (newest == NOWHERE)
			newest = index;
	}
	return newest;
}

static __always_inline struct waiting *waiting_with(struct flow *flow, struct sock *sk, __u32 seq)
{
	__u64 index = whole_find(flow->sk, seq);

	return index == NOWHERE ? NULL : waiting_find(sk, OF_ACKS, index);
}

/* An skb that no hop has seen: the kernel has cut it from a larger packet. Or it was queued before the tool began. */
static __noinline struct followed *segment_begin(struct sk_buff *skb)
{
	struct packet packet = {};
	struct followed *followed;
	struct waiting *whole;
	struct flow *flow;
	struct sock *sk;

	if (!is_sent_here(skb) || is_other(skb->sk))
		return NULL;
	sk = BPF_CORE_READ(skb, sk);
	flow = flow_find(sk);
	if (!flow || (packet_read(skb, &packet) != OF_TCP && inner_read(skb, &packet) != OF_TCP))
		return NULL;
	if (packet.flags == NO_FLAGS)
		return NULL;
	whole = waiting_with(flow, sk, packet.seq);
	followed = followed_add(skb, &packet, WAY_SENT, whole ? whole->piece.number : 0);
	if (!followed)
		return NULL;
	followed->sk = followed->owned = (__u64)sk;
	followed->id = flow->id;
	if (whole) {
		followed->piece.hop = whole->piece.hop;
		followed->piece.last_ns = whole->piece.last_ns;
		followed->piece.index = whole->piece.index;
		followed->piece.waits = true;
	} else if (flow->pushed_out) {
		flow->pushed_out--;
	} else if (followed->piece.end_seq != followed->piece.seq) {
		COUNT(missed);
	}
	return followed;
}

/* A hop on the way to the wire. */
static __noinline struct followed *outward(struct sk_buff *skb, struct net_device *device, enum hop hop)
{
	struct followed *followed = followed_now(skb);
	struct at at;

	if (!followed)
		followed = segment_begin(skb);
	if (!followed)
		return NULL;
	at = at_hop(hop);
	at.device = device;
	at.sk = (struct sock *)followed->owned;
	at.queue = skb->queue_mapping;
	hop_pass(followed, &at);
	return followed;
}

/* The packet goes to a driver. */
static __noinline int driven(struct sk_buff *skb, struct net_device *device)
{
	struct followed *followed = outward(skb, device, HOP_START_XMIT);
	struct sending *sending;
	__u32 zero = 0, depth;

	if (!followed)
		return 0;
	sending = bpf_map_lookup_elem(&sendings, &zero);
	if (!sending)
		return 0;
	depth = sending->depth;
	if (depth >= NESTED) {
		COUNT(missed);
		return 0;
	}
	sending->devices[depth & (NESTED - 1)] = (__u64)device;
	sending->packets[depth & (NESTED - 1)] = *followed;
	sending->depth = depth + 1;
	return 0;
}

/*
 * The driver has taken it, or has no room: then it comes again. The skb may have been freed, or be with its receiver. The device of a
 * tunnel gives it to another one, which does not see that it is TCP.
 */
static __noinline int driver_took(struct sk_buff *skb, struct net_device *device, int result)
{
	__u32 zero = 0, depth;
	struct sending *sending = bpf_map_lookup_elem(&sendings, &zero);
	struct followed *sent, *followed;

	depth = sending ? sending->depth : 0;
	if (!depth)
		return 0;
	sent = &sending->packets[(depth - 1) & (NESTED - 1)];
	if (sent->skb != (__u64)skb || sending->devices[(depth - 1) & (NESTED - 1)] != (__u64)device)
		return 0;
	sending->depth = depth - 1;
	if (result >= NETDEV_TX_BUSY)
		return 0;
	copy_pass(sent, (__u64)device, HOP_XMIT);
	followed = followed_find(skb);
	if (followed && followed->piece.number == sent->piece.number && followed->piece.seq == sent->piece.seq &&
	    followed->piece.hop == HOP_START_XMIT) {
		followed->piece.hop = HOP_XMIT;
		followed->piece.last_ns = sent->piece.last_ns;
	}
	return 0;
}

#endif
