/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * A timewait socket keeps its port. It is found in the kernel's table of connections at the transition to CLOSE, where it has
 * taken the socket's place. It ends with its timer, in whichever way the kernel ends it (inet_twsk_kill()): the timer runs out,
 * or inet_twsk_deschedule_put() stops it.
 */
#ifndef TCPSCOPE_PORTS_TIMEWAIT_BPF_H
#define TCPSCOPE_PORTS_TIMEWAIT_BPF_H

/* A timewait socket that counts in a pool. Inserted at the transition to CLOSE, deleted with its timer. */
struct timewait {
	__u32 pool;
	__u32 holder;
	__u16 port; /* taken by bind(); 0: not */
	__be16 rport;
	__be32 raddr;
	__u64 cookie;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct inet_timewait_sock */
	__type(value, struct timewait);
} timewaits SEC(".maps");

/* tw_timer_handler(), which the timers of all timewait sockets have: read from the first of them. 0: there was none yet. */
volatile __u64 timewait_function;

/* On this CPU, the timewait socket whose timer was taken away last. It may be set again at once: inet_twsk_reschedule(). */
struct rearmed {
	__u64 socket;
	struct timewait timewait;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rearmed);
} rearmed SEC(".maps");

#define CHAIN 64 /* most sockets of one chain that are looked at */

/*
 * The timewait socket that has taken the place of a socket in the kernel's table of connections (inet_twsk_hashdance()). 0: there
 * is none. A socket that is closed has no skc_num any more.
 */
static __noinline __u64 timewait_of(__u64 socket)
{
	struct sock *sk = (struct sock *)socket;
	__u16 port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	__u64 mine[COMMON_BYTES / 8] = {}, other[COMMON_BYTES / 8] = {};
	const struct sock_common *own = (const struct sock_common *)mine;
	const struct sock_common *common = (const struct sock_common *)other;
	struct hlist_nulls_node *node;
	struct inet_hashinfo *table;
	struct inet_ehash_bucket *chain;

	bpf_probe_read_kernel(mine, sizeof(mine), sk);
	table = BPF_CORE_READ(own->skc_net.net, ipv4.tcp_death_row.hashinfo);
	chain = BPF_CORE_READ(table, ehash);
	chain = (void *)chain +
		(own->skc_hash & BPF_CORE_READ(table, ehash_mask)) * bpf_core_type_size(struct inet_ehash_bucket);
	node = BPF_CORE_READ(chain, chain.first);
	for (int i = 0; i < CHAIN && !((__u64)node & 1); i++) {
		__u64 found = (__u64)node - bpf_core_field_offset(struct sock_common, skc_nulls_node);

		if (bpf_probe_read_kernel(other, sizeof(other), (void *)found))
			break;
		if (common->skc_state == STATE_TIME_WAIT && common->skc_dport == own->skc_dport &&
		    common->skc_daddr == own->skc_daddr && common->skc_num == port &&
		    common->skc_family == own->skc_family && common->skc_net.net == own->skc_net.net &&
		    common->skc_rcv_saddr == own->skc_rcv_saddr &&
		    cookie_if_any((struct sock *)found) == cookie_if_any(sk))
			return found;
		node = BPF_CORE_READ(node, next);
	}
	if (!((__u64)node & 1))
		COUNT(missed); /* it may be in the rest of the chain */
	return 0;
}

/* A timewait socket or a full one takes or gives back a port that bind() has taken, for its pool and for the namespace. */
static __always_inline void ports_count(__u32 place, __u16 port, bool takes)
{
	struct pool_key key = {.kind = POOL_NAMESPACE};
	struct pool *pool = pool_find(place);

	if (!pool || !port)
		return;
	key.netns = pool->key.netns;
	port_count(place, port, false, takes);
	port_count(pool_place(&key), port, false, takes);
}

/* A timewait socket counts in a pool from now on. */
static __noinline int timewait_begin(__u64 address, __u32 pool, __u32 holder, __u32 port)
{
	struct inet_timewait_sock *tw = (struct inet_timewait_sock *)address;
	struct timewait mine = {.pool = pool, .holder = holder, .port = port};

	if (!pool)
		return 0;
	if (!timewait_function)
		timewait_function = (__u64)BPF_CORE_READ(tw, tw_timer.function);
	mine.cookie = cookie_if_any((struct sock *)tw);
	mine.rport = BPF_CORE_READ(tw, __tw_common.skc_dport);
	mine.raddr = BPF_CORE_READ(tw, __tw_common.skc_daddr);
	if (table_put(&timewaits, &address, &mine, BPF_NOEXIST)) {
		if (!bpf_map_lookup_elem(&timewaits, &address))
			NO_ROOM();
		return 0;
	}
	ports_count(pool, port, true);
	pool_count(pool, holder, STATE_TIME_WAIT, 1);
	return 1;
}

/* Its timer is taken away. */
static __noinline int timewait_end(__u64 address)
{
	struct timewait *entry = bpf_map_lookup_elem(&timewaits, &address), mine;
	struct rearmed *last;
	__u32 zero = 0;

	if (!entry)
		return 0;
	mine = *entry;
	if (bpf_map_delete_elem(&timewaits, &address)) {
		if (bpf_map_lookup_elem(&timewaits, &address))
			COUNT(missed);
		return 0;
	}
	ports_count(mine.pool, mine.port, false);
	pool_count(mine.pool, mine.holder, STATE_TIME_WAIT, -1);
	last = bpf_map_lookup_elem(&rearmed, &zero);
	if (last) {
		last->socket = address;
		last->timewait = mine;
	}
	return 0;
}

/* Its timer is set again, if it was taken away just before, on this CPU. */
static __noinline int timewait_again(__u64 address)
{
	struct inet_timewait_sock *tw = (struct inet_timewait_sock *)address;
	struct rearmed *last;
	__u32 zero = 0;

	last = bpf_map_lookup_elem(&rearmed, &zero);
	if (!last)
		return 0;
	if (last->socket == address && last->timewait.cookie == cookie_if_any((struct sock *)tw) &&
	    last->timewait.rport == BPF_CORE_READ(tw, __tw_common.skc_dport) &&
	    last->timewait.raddr == BPF_CORE_READ(tw, __tw_common.skc_daddr))
		timewait_begin(address, last->timewait.pool, last->timewait.holder, last->timewait.port);
	last->socket = 0;
	return 0;
}

#endif
