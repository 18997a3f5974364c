/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The hops of `trace` in GRO, before RECEIVE: the driver gives a packet to the stack, which may merge it into another one.
 *
 * Each packet of each NIC passes here, before they are merged. So most runs end after a look at the protocol and the ports: a packet
 * that the filter excludes has no hop here, also if it was followed before.
 *
 * Both programs of a packet run in one softirq, which no other one interrupts.
 */
#ifndef TCPSCOPE_TRACE_GRO_BPF_H
#define TCPSCOPE_TRACE_GRO_BPF_H

#define WITHOUT_GRO "when a driver gives a packet to the stack, and which packets GRO merges"

struct given {
	struct followed followed; /* its skb is 0: none */
	__u64 device;
};

/* The packet that this CPU gives to GRO. Its skb may be freed, and used again, before GRO says what became of it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct given);
} givens SEC(".maps");

static __always_inline struct given *given_find(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&givens, &zero);
}

/*
 * What is cheap to ask, before all else is read. The data begins at the IP header. A short packet has something else behind it, and one
 * of napi_gro_frags() may have its headers in a fragment: that shows when they are read. Apart, for the stack of received().
 */
static __noinline bool may_be_given(struct sk_buff *skb)
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

static __always_inline int gro_begin(struct sk_buff *skb)
{
	const struct followed *followed = received(skb, HOP_GRO);
	struct given *given = given_find();

	if (!given || !followed)
		return 0;
	given->followed = *followed;
	given->device = (__u64)skb->dev;
	return 0;
}

/* GRO has merged the packet into another one, or keeps it: then it comes to RECEIVE, with all that GRO merges into it meanwhile. */
static __noinline int gro_end(int result)
{
	struct given *given = given_find();
	struct followed *followed;
	__u64 skb;

	if (!given)
		return 0;
	skb = given->followed.skb;
	given->followed.skb = 0;
	if (result != (int)bpf_core_enum_value(enum gro_result, GRO_MERGED) &&
	    result != (int)bpf_core_enum_value(enum gro_result, GRO_MERGED_FREE))
		return 0;
	copy_pass(&given->followed, given->device, HOP_MERGED);
	followed = bpf_map_lookup_elem(&packets, &skb);
	if (followed && followed->piece.number == given->followed.piece.number &&
	    followed->piece.seq == given->followed.piece.seq && followed->piece.hop == HOP_GRO)
		bpf_map_delete_elem(&packets, &skb);
	return 0;
}

static __always_inline bool is_given(void)
{
	const struct given *given = given_find();

	return given && given->followed.skb;
}

/* These are attached first: of a packet whose end is not seen, nothing may be left for the next one. */
OPTIONAL(WITHOUT_GRO)
SEC("tp_btf/napi_gro_receive_exit")
int TRACEPOINT_PROG_IF(is_given(), gro_exit, int result)
{
	return gro_end(result);
}

OPTIONAL(WITHOUT_GRO)
SEC("tp_btf/napi_gro_frags_exit")
int TRACEPOINT_PROG_IF(is_given(), gro_frags_exit, int result)
{
	return gro_end(result);
}

OPTIONAL(WITHOUT_GRO)
SEC("tp_btf/napi_gro_receive_entry")
int TRACEPOINT_PROG_IF(may_be_given(skb), gro, struct sk_buff *skb)
{
	return gro_begin(skb);
}

OPTIONAL(WITHOUT_GRO)
SEC("tp_btf/napi_gro_frags_entry")
int TRACEPOINT_PROG_IF(may_be_given(skb), gro_frags, struct sk_buff *skb)
{
	return gro_begin(skb);
}

#endif
