/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Whose a discarded packet is: its ends, socket, device and namespace. */
#ifndef TCPSCOPE_DROPS_WHOSE_BPF_H
#define TCPSCOPE_DROPS_WHOSE_BPF_H

/*
 * Is it a socket of TCP with this local port? A reply without a socket has one that the kernel uses for all of them. Once a
 * socket is closed, only inet_sport has its port.
 */
static __always_inline bool is_of(struct sock *sk, __u16 lport)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family), port = BPF_CORE_READ(sk, __sk_common.skc_num);

	if ((family != AF_INET && family != AF_INET6) || !lport)
		return false;
	if (!port)
		port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	return port == lport;
}

/* Are the packet's ends those of the connection that is to receive it? A v4-mapped socket has both kinds of addresses. */
static __noinline bool is_for(struct sock *sk, const struct packet *packet)
{
	const __u64 *from = (const __u64 *)packet->saddr, *to = (const __u64 *)packet->daddr;
	__u64 here[2], there[2];

	if (packet->flags == NO_FLAGS || bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport)) != packet->sport ||
	    !is_of(sk, packet->dport))
		return false;
	if (packet->family == 4)
		return BPF_CORE_READ(sk, __sk_common.skc_daddr) == *(__be32 *)&packet->saddr[12] &&
		       BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr) == *(__be32 *)&packet->daddr[12];
	BPF_CORE_READ_INTO(&there, sk, __sk_common.skc_v6_daddr);
	BPF_CORE_READ_INTO(&here, sk, __sk_common.skc_v6_rcv_saddr);
	return there[0] == from[0] && there[1] == from[1] && here[0] == to[0] && here[1] == to[1];
}

static __always_inline __u32 netns_of_device(struct net_device *device)
{
	return device ? BPF_CORE_READ(device, nd_net.net, ns.inum) : 0;
}

/* The device of the packet. A received one must come from there: skb->dev is in a union, and may be something else. */
static __always_inline struct net_device *device_of(struct sk_buff *skb, const struct fact *fact)
{
	struct net_device *device = skb->dev;

	if (!device || fact->no_device)
		return NULL;
	return !skb->skb_iif || BPF_CORE_READ(device, ifindex) == skb->skb_iif ? device : NULL;
}

/*
 * Was a received packet sent by this socket, in another namespace of this host? It keeps its sender's socket until
 * ip_rcv_core() or ip6_rcv_core().
 */
static __always_inline bool sent_elsewhere(struct sk_buff *skb, const struct fact *fact, struct sock *sk)
{
	struct net_device *device = skb->skb_iif ? device_of(skb, fact) : NULL;

	return device && BPF_CORE_READ(device, nd_net.net) != BPF_CORE_READ(sk, __sk_common.skc_net.net);
}

static __always_inline __u32 netns_of(struct sk_buff *skb, struct sock *sk, struct net_device *device)
{
	struct dst_entry *route = (struct dst_entry *)(skb->_skb_refdst & ~1UL);

	if (sk)
		return BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	if (device)
		return netns_of_device(device);
	return route ? netns_of_device(BPF_CORE_READ(route, dev)) : 0;
}

/* Both ends, by the direction. A packet without an IP header has a socket that sends it. */
static __always_inline void identify(struct discard *discard, struct sock *receiver, struct sock *owner)
{
	struct packet *packet = &discard->packet;
	struct identity *id = &discard->id;
	struct sock *sk = receiver ?: owner;

	if (packet->family) {
		ends_read(packet, discard->direction == DIRECTION_SENT, id);
		if (sk && !is_of(sk, id->lport))
			sk = NULL;
	} else if (sk) {
		identity_read(sk, id);
	}
	discard->sk = sk;
	if (sk)
		discard->state = BPF_CORE_READ(sk, __sk_common.skc_state);
}

/* The socket in the table: the listener of a request. */
static __always_inline const struct owner *owner_of(const struct discard *discard)
{
	struct sock *sk = discard->sk;

	if (!sk || discard->state == STATE_TIME_WAIT)
		return NULL;
	if (discard->state == STATE_NEW_SYN_RECV)
		sk = BPF_CORE_READ(sk, __sk_common.skc_listener);
	return connection_owner(connection_find(sk));
}

#endif
