/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Refused handshakes where no function can be hooked. Two tracepoints show the packets that a listener has handled, at the end
 * of it and in the same softirq:
 *
 *   consume_skb  a SYN, refused or not (tcp_rcv_state_process())
 *   kfree_skb    a packet that was thrown away, such as a refused final ACK. Its argument rx_sk is the listener (6.11)
 *
 * Whether the kernel refused the packet, and why, is in the counters of this CPU: each program compares them with the CPU's
 * last look at that namespace. Softirqs do not nest, and all code that counts a refusal runs in one, or with softirqs off (a
 * process that writes to a TUN device). So between the packet and the end of its handling nothing else is counted here.
 * What else counts ListenDrops between two looks is no refusal. It ends with a packet that is freed, too, and the look at
 * that one takes it away: an ICMP error for a request (tcp_req_err()), a SYN to a broadcast address (tcp_v4_conn_request()).
 *
 * If the kernel has run no program for a packet, the next look finds two refusals in place of one. One is reported, and the
 * other counts as missed. Which listener has refused a SYN: search.bpf.h.
 */
#ifndef TCPSCOPE_REFUSED_BPF_H
#define TCPSCOPE_REFUSED_BPF_H

#include "connection.bpf.h"
#include "extension.bpf.h"
#include "handshake.bpf.h"
#include "mib.bpf.h"
#include "queues.bpf.h"
#include "search.bpf.h"

/* kfree_skb has the argument rx_sk since "net: add rx_sk to trace_kfree_skb" (6.11), which came with this function. */
#define HAS_RX_SK NEEDS("sk_skb_reason_drop")
#define RX_SK 3 /* its place among the arguments */

#define UNLESS_FUNCTIONS UNLESS("syn_exit__fexit syn_exit__kretprobe")

/* The counters of one CPU in one namespace, at this CPU's last look. */
struct look {
	struct mib mib;
	__u64 resets; /* EmbryonicRsts */
	bool begun;
	__u32 listeners; /* of the namespace, in `listening`; in the copy of CPU 0 */
};

/*
 * Inserted with the first listener of a namespace, deleted with its last one. Also inserted with the first packet for a
 * listener that is not in the table; then it stays.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, __u64); /* cookie of the namespace */
	__type(value, struct look);
} looks SEC(".maps");

static const struct look no_look;

/* All programs are attached: what the counters have grown by from now on was seen. */
bool looking;

static __noinline int look_read(struct net *net, __u64 cpu_offset, struct look *look)
{
	const char *counters = (const char *)BPF_CORE_READ(net, mib.net_statistics) + cpu_offset;

	mib_read_at(counters, &look->mib);
	bpf_probe_read_kernel(&look->resets, 8, counters + mib_embryonic_rsts * 8);
	look->begun = true;
	return 0;
}

/* The first look at a namespace, for all CPUs: none of its listeners can refuse anything yet, or the tool starts. */
static __noinline int looks_begin(struct net *net, __u64 cookie)
{
	__u32 zero = 0;

	if (bpf_map_update_elem(&looks, &cookie, &no_look, BPF_NOEXIST))
		return 0;
	for (__u32 cpu = 0; cpu < possible_cpus; cpu++) {
		struct in_hand *copy = bpf_map_lookup_percpu_elem(&in_hand, &zero, cpu);
		struct look *look = bpf_map_lookup_percpu_elem(&looks, &cookie, cpu);

		if (!copy || !look)
			break;
		look_read(net, cpu_offset(&in_hand, copy), look);
	}
	return 0;
}

/*
 * By how much the counters of this CPU have grown since its last look. False at the first look. `at_listener`: the packet was
 * for a listener. So the namespace has one, which may be older than the tool and not in its table.
 */
static __noinline int look_again(struct net *net, bool at_listener, struct look *grown)
{
	__u64 cookie = BPF_CORE_READ(net, net_cookie);
	__u32 zero = 0;
	struct in_hand *mine = bpf_map_lookup_elem(&in_hand, &zero);
	struct look *last = bpf_map_lookup_elem(&looks, &cookie);
	struct look before;

	if (!mine || !looking)
		return false;
	if (!last) {
		if (at_listener)
			looks_begin(net, cookie);
		return false;
	}
	before = *last;
	look_read(net, cpu_offset(&in_hand, mine), last);
	grown->mib = last->mib;
	mib_subtract(&grown->mib, &before.mib);
	grown->resets = last->resets - before.resets;
	return before.begun;
}

/* Refusals of packets for which no program has run. */
static __always_inline void count_missed(__u64 refusals)
{
	if (refusals > 1)
		__sync_fetch_and_add(&counters[bpf_get_smp_processor_id() & (CPU_SLOTS - 1)].missed, refusals - 1);
}

/* A socket begins to listen, or is found listening at the start. */
static __noinline int listening_begin(struct sock *sk)
{
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	struct listening entry = {
		.net_cookie = BPF_CORE_READ(net, net_cookie),
		.drops = BPF_CORE_READ(sk, sk_drops.counter),
	};
	__u64 key = (__u64)sk;
	struct look *look;

	if (!looking || bpf_map_update_elem(&listening, &key, &entry, BPF_NOEXIST))
		return 0;
	looks_begin(net, entry.net_cookie);
	look = bpf_map_lookup_percpu_elem(&looks, &entry.net_cookie, 0);
	if (look)
		__sync_fetch_and_add(&look->listeners, 1);
	else
		COUNT(table_full);
	return 0;
}

/* 1 if there was an entry to delete. */
static __noinline int listening_end(struct sock *sk)
{
	__u64 key = (__u64)sk, cookie;
	struct listening *entry = bpf_map_lookup_elem(&listening, &key);
	struct look *look;

	if (!entry)
		return 0;
	cookie = entry->net_cookie;
	if (bpf_map_delete_elem(&listening, &key))
		return 0;
	look = bpf_map_lookup_percpu_elem(&looks, &cookie, 0);
	if (look) {
		__sync_fetch_and_add(&look->listeners, -1);
		if (!look->listeners)
			bpf_map_delete_elem(&looks, &cookie);
	}
	return 1;
}

/* What the kernel frees: which namespace handled it, and whether it may have counted a refusal. */
struct freed {
	struct net *net;
	__u32 address[4];
	__u16 port;
	bool v6, syn, icmp_error;
	bool unicast;
};

/* It may be, if its extension headers cannot be walked. */
static __always_inline bool may_be_icmp6(const unsigned char *ip, __u32 length, __u8 first)
{
	union unknown room;
	struct header header = header_find((__u64)ip, length, first, &room);

	return !header.at || header.type == IPPROTO_ICMPV6;
}

static __noinline int freed_read(struct sk_buff *skb, struct freed *freed)
{
	unsigned char *head = BPF_CORE_READ(skb, head);
	__u32 network = BPF_CORE_READ(skb, network_header), tail = BPF_CORE_READ(skb, tail);
	unsigned char *ip = head + network;
	unsigned char *transport = head + BPF_CORE_READ(skb, transport_header);
	struct dst_entry *dst = (struct dst_entry *)(BPF_CORE_READ(skb, _skb_refdst) & ~SKB_DST_NOREF);
	bool of_tcp = !BPF_CORE_READ(skb, dev); /* tcp_v4_rcv(), tcp_v6_rcv() */
	__u8 first[10] = {}, begin[14] = {};
	__u16 port;

	bpf_probe_read_kernel(first, sizeof(first), ip);
	bpf_probe_read_kernel(begin, sizeof(begin), transport);
	freed->v6 = first[0] >> 4 == 6;
	freed->net = BPF_CORE_READ(dst, dev, nd_net.net);
	if (!of_tcp) {
		freed->icmp_error = freed->v6 ? begin[0] < 128 && may_be_icmp6(ip, tail - network, first[6])
					      : first[9] == IPPROTO_ICMP && begin[0] && begin[0] != 8;
		return 0;
	}
	freed->syn = (freed->v6 || first[9] == IPPROTO_TCP) && (begin[13] & 0x17) == 2; /* and no FIN, RST, ACK */
	bpf_probe_read_kernel(&port, 2, transport + 2);
	freed->port = bpf_ntohs(port);
	if (freed->v6) {
		bpf_probe_read_kernel(freed->address, 16, ip + 24);
		freed->unicast = BPF_CORE_READ((struct rt6_info *)dst, rt6i_flags) & RTF_LOCAL;
	} else {
		bpf_probe_read_kernel(freed->address + 3, 4, ip + 16);
		freed->unicast = !(BPF_CORE_READ((struct rtable *)dst, rt_flags) & (RTCF_BROADCAST | RTCF_MULTICAST));
	}
	return 0;
}

/*
 * A packet without a socket and with a route is consumed: a SYN that a listener has handled, an ICMP message, or others. Returns
 * why the SYN was refused; CAUSE_UNKNOWN: it was not.
 */
static __noinline int consumed(struct sk_buff *skb)
{
	struct freed freed = {};
	struct look grown = {};
	struct in_hand *packet;
	struct search *search;
	__u32 zero = 0;

	packet = bpf_map_lookup_elem(&in_hand, &zero);
	search = bpf_map_lookup_elem(&searches, &zero);
	if (!packet || !search)
		return CAUSE_UNKNOWN;
	packet->consumed = (__u64)skb;
	freed_read(skb, &freed);
	if (!freed.net || !(freed.syn || freed.icmp_error) || !look_again(freed.net, freed.syn, &grown))
		return CAUSE_UNKNOWN;
	if (!freed.syn || !freed.unicast || !(grown.mib.drops || grown.mib.cookies))
		return CAUSE_UNKNOWN;
	count_missed(grown.mib.drops ?: grown.mib.cookies);
	__builtin_memset(search, 0, sizeof(*search));
	search->net = freed.net;
	search->port = freed.port;
	search->v6 = freed.v6;
	__builtin_memcpy(search->address, freed.address, sizeof(freed.address));
	search->cause = cause_of(&grown.mib, STEP_ACK, NULL); /* not yet whether it is the reserved quarter */
	if (!listener_of_syn(search, packet)) {
		COUNT(missed);
		return CAUSE_UNKNOWN;
	}
	search->cause = cause_of(&grown.mib, STEP_SYN, packet->sk);
	packet->skb = skb;
	packet->req = NULL;
	packet->reset = false;
	packet->fast_open = grown.mib.fast_open_fails;
	if (packet->unnamed)
		listeners_mark(search);
	else if (grown.mib.drops)
		listening_explain(packet->sk);
	return search->cause;
}

static __always_inline int syn_consumed(void *ctx, struct sk_buff *skb)
{
	int cause = consumed(skb);

	return cause ? refusal(ctx, skb, STEP_SYN, cause) : 0;
}

HAS_RX_SK
SEC("tp_btf/consume_skb")
int TRACEPOINT_PROG_IF(!skb->sk && skb->_skb_refdst, syn_exit__consume, struct sk_buff *skb)
{
	return syn_consumed(ctx, skb);
}

/* The second copy, for a packet at which the first one has not looked. */
AGAIN
UNLESS_FUNCTIONS
HAS_RX_SK
SEC("tp_btf/consume_skb")
int TRACEPOINT_PROG_IF(!skb->sk && skb->_skb_refdst, syn_exit_again__consume, struct sk_buff *skb)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);

	if (!packet || packet->consumed != (__u64)skb)
		return syn_consumed(ctx, skb);
	packet->consumed = 0;
	return 0;
}

/* An object that follows listeners itself calls listening_begin() and listening_end() in its own programs. */
#ifndef FOLLOWS_LISTENERS
OPTIONAL(WITHOUT_REFUSALS)
UNLESS_FUNCTIONS
HAS_RX_SK
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(new_state == STATE_LISTEN, begins, struct sock *sk, int old_state, int new_state)
{
	if (sk->sk_protocol == IPPROTO_TCP) {
		COOKIE_OF(sk); /* later only its address is known */
		listening_begin(sk);
	}
	return 0;
}

OPTIONAL(WITHOUT_REFUSALS)
UNLESS_FUNCTIONS
HAS_RX_SK
ROLE("forgets")
SEC("tp_btf/tcp_destroy_sock")
int TRACEPOINT_PROG(ends, struct sock *sk)
{
	listening_end(sk);
	return 0;
}

AGAIN
UNLESS_FUNCTIONS
HAS_RX_SK
ROLE("forgets")
SEC("tp_btf/tcp_destroy_sock")
int TRACEPOINT_PROG(ends_again, struct sock *sk)
{
	if (listening_end(sk))
		COUNT(rescued);
	return 0;
}
#endif

static long older_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct sock *sk = (struct sock *)*key;

	/* Not called without the helper (5.19), but the object has this function on every kernel. */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_map_lookup_percpu_elem) &&
	    BPF_CORE_READ(sk, __sk_common.skc_state) == STATE_LISTEN)
		listening_begin(sk);
	return 0;
}

/*
 * After the seed, which stands before it: the listeners that it has found. Only after the second seed: between the two, the
 * programs are attached one after the other.
 */
OPTIONAL(WITHOUT_REFUSALS)
UNLESS_FUNCTIONS
HAS_RX_SK
ROLE("seeds")
SEC("iter/bpf_map")
int older(struct bpf_iter__bpf_map *ctx)
{
	if (ctx->map || !seed_counts)
		return 0;
	looking = true;
	bpf_for_each_map_elem(&connections, older_entry, NULL, 0);
	return 0;
}

#endif
