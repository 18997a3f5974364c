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
	followed = packet_find(skb);
	if (followed && followed->piece.number == given->followed.piece.number &&
	    followed->piece.seq == given->followed.piece.seq && followed->piece.hop == HOP_GRO)
		packet_delete(skb);
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
int TRACEPOINT_PROG_IF(may_be_received(skb), gro, struct sk_buff *skb)
{
	return gro_begin(skb);
}

OPTIONAL(WITHOUT_GRO)
SEC("tp_btf/napi_gro_frags_entry")
int TRACEPOINT_PROG_IF(may_be_received(skb), gro_frags, struct sk_buff *skb)
{
	return gro_begin(skb);
}

#endif
