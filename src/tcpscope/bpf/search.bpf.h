/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Which listener has refused a SYN that no socket names: a search in the kernel's own table of listeners. Of several that the
 * SYN can have reached, it is the one whose sk_drops has grown since the last packet that a program saw for it.
 */
#ifndef TCPSCOPE_SEARCH_BPF_H
#define TCPSCOPE_SEARCH_BPF_H

#include "connection.bpf.h"
#include "mib.bpf.h"
#include "queues.bpf.h"

#define SAME_BUCKET 128 /* most sockets of one bucket that are looked at */

struct listening {
	__u64 net_cookie;
	__u32 drops; /* sk_drops at the last packet that a program saw for this listener */
	__u32 padding;
};

/* Inserted at listen() or after the seed, deleted at tcp_destroy_sock. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct listening);
} listening SEC(".maps");

static __always_inline void listening_explain(struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct listening *entry = bpf_map_lookup_elem(&listening, &key);

	if (entry)
		entry->drops = BPF_CORE_READ(sk, sk_drops.counter);
}

/*
 * The listeners that a SYN can have reached, in the kernel's own table (inet_lhash2_lookup()): those of its destination, or,
 * if none of them can have refused it, those of all addresses, too. There are several with SO_REUSEPORT, and each counts
 * what it drops in sk_drops.
 */
struct search {
	struct net *net;
	struct sock *first; /* of all that match */
	struct sock *found; /* the last one that can have refused the SYN */
	struct hlist_nulls_node *node;
	__u32 address[4]; /* of the SYN, in network order; of IPv4 only the last word counts */
	__u32 matches, could;
	__u16 port;
	bool v6, any;
	__u8 cause;
	bool mark; /* none is searched, refused_perhaps() is called for each */
};

/* In a map: the verifier would follow each value on the stack through each turn of the loop. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct search);
} searches SEC(".maps");

static __always_inline __u32 rotated(__u32 word, int by)
{
	return word << by | word >> (32 - by);
}

/* The hash function of the table is jhash (include/linux/jhash.h), of one word or of four. */
static __always_inline __u32 jhash_end(__u32 a, __u32 b, __u32 c)
{
	c = (c ^ b) - rotated(b, 14);
	a = (a ^ c) - rotated(c, 11);
	b = (b ^ a) - rotated(a, 25);
	c = (c ^ b) - rotated(b, 16);
	a = (a ^ c) - rotated(c, 4);
	b = (b ^ a) - rotated(a, 14);
	return (c ^ b) - rotated(b, 24);
}

static __always_inline __u32 jhash_of(const __u32 *words, int count, __u32 mix)
{
	__u32 a = 0xdeadbeef + (count << 2) + mix, b = a, c = a;

	if (count == 1)
		return jhash_end(a + words[0], b, c);
	a += words[0], b += words[1], c += words[2];
	a = (a - c) ^ rotated(c, 4), c += b;
	b = (b - a) ^ rotated(a, 6), a += c;
	c = (c - b) ^ rotated(b, 8), b += a;
	a = (a - c) ^ rotated(c, 16), c += b;
	b = (b - a) ^ rotated(a, 19), a += c;
	c = (c - b) ^ rotated(b, 4), b += a;
	return jhash_end(a + words[3], b, c);
}

/* Does it listen on the address of the SYN? */
static __always_inline bool matches(const struct search *search, struct sock *sk)
{
	__u64 copy[COMMON_BYTES / 8] = {};
	const struct sock_common *common = (const struct sock_common *)copy;
	struct sock_common *original = &sk->__sk_common;
	const __u32 *bound;

	bpf_probe_read_kernel(copy, sizeof(copy), sk);
	if (common->skc_net.net != search->net || common->skc_num != search->port || common->skc_state != STATE_LISTEN)
		return false;
	if (!search->v6)
		return common->skc_rcv_saddr == (search->any ? 0 : search->address[3]) &&
		       !(common->skc_family == AF_INET6 && BPF_CORE_READ_BITFIELD_PROBED(original, skc_ipv6only));
	bound = (const __u32 *)&common->skc_v6_rcv_saddr;
	if (common->skc_family != AF_INET6)
		return false;
	if (search->any)
		return !(bound[0] | bound[1] | bound[2] | bound[3]);
	return bound[0] == search->address[0] && bound[1] == search->address[1] && bound[2] == search->address[2] &&
	       bound[3] == search->address[3];
}

static __always_inline bool syn_queue_is_full(struct sock *sk)
{
	struct inet_connection_sock *icsk = (struct inet_connection_sock *)sk;

	return BPF_CORE_READ(icsk, icsk_accept_queue.qlen.counter) > (int)BPF_CORE_READ(sk, sk_max_ack_backlog);
}

/* Can it have refused the SYN? A cookie drops nothing. It is sent because the SYN queue is full, or always. */
static __always_inline bool could_refuse(const struct search *search, struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct listening *entry;

	if (search->cause == CAUSE_COOKIE_SENT)
		return syn_queue_is_full(sk);
	entry = bpf_map_lookup_elem(&listening, &key);
	return !entry || entry->drops != (__u32)BPF_CORE_READ(sk, sk_drops.counter);
}

/* The object's: one of several listeners has refused the SYN for this cause, perhaps this one. */
static __always_inline void refused_perhaps(struct sock *sk, __u64 cause);

/* One that matches. With `mark` it is not known which one has refused. */
static __always_inline void candidate(struct search *search, struct sock *sk)
{
	if (search->mark) {
		refused_perhaps(sk, search->cause);
		listening_explain(sk);
		return;
	}
	if (!search->matches++)
		search->first = sk;
	if (could_refuse(search, sk)) {
		search->could++;
		search->found = sk;
	}
}

static long search_node(__u32 index, void *unused)
{
	__u32 zero = 0;
	struct search *search = bpf_map_lookup_elem(&searches, &zero);
	struct hlist_nulls_node *node = search ? search->node : NULL;
	struct sock *sk = (void *)node - bpf_core_field_offset(struct sock_common, skc_nulls_node);

	if (!search || (__u64)node & 1) /* the end */
		return 1;
	if (matches(search, sk))
		candidate(search, sk);
	search->node = BPF_CORE_READ(node, next);
	return 0;
}

static __noinline int search_bucket(struct search *search)
{
	struct net *net = search->net; /* outside of BPF_CORE_READ, which would look for our struct in the kernel */
	struct inet_hashinfo *table = BPF_CORE_READ(net, ipv4.tcp_death_row.hashinfo);
	__u32 mix = BPF_CORE_READ(net, hash_mix), none = 0, hash;
	struct inet_listen_hashbucket *bucket;

	/* ipv6_portaddr_hash(), ipv4_portaddr_hash() */
	hash = search->any  ? jhash_of(&none, 1, mix)
	       : search->v6 ? jhash_of(search->address, 4, mix)
			    : jhash_of(search->address + 3, 1, mix);
	hash = (hash ^ search->port) & BPF_CORE_READ(table, lhash2_mask);
	bucket = (void *)BPF_CORE_READ(table, lhash2) + hash * bpf_core_type_size(struct inet_listen_hashbucket);
	search->node = BPF_CORE_READ(bucket, nulls_head.first);
	bpf_loop(SAME_BUCKET, search_node, NULL, 0);
	return 0;
}

/*
 * Is the queue not full that must have been? Then another listener has refused the SYN: one of another address, which TPROXY
 * or a sk_lookup program has chosen, or one that is gone.
 */
static __always_inline bool has_room(const struct search *search, struct sock *sk)
{
	switch (search->cause) {
	case CAUSE_ACCEPT_QUEUE_FULL:
		return BPF_CORE_READ(sk, sk_ack_backlog) <= BPF_CORE_READ(sk, sk_max_ack_backlog);
	case CAUSE_SYN_QUEUE_FULL:
		return !syn_queue_is_full(sk);
	}
	return false;
}

/*
 * Names the listener of a SYN. False if there is none. Those of the destination may be bound to another device than that of
 * the SYN. Then one of all addresses may have refused it.
 */
static __noinline int listener_of_syn(struct search *search, struct in_hand *packet)
{
	search_bucket(search);
	if (!search->could) {
		search->any = true;
		search_bucket(search);
	}
	packet->sk = search->could == 1 ? search->found : search->first;
	packet->unnamed = search->matches > 1 && search->could != 1;
	if (search->matches == 1 && !search->could && has_room(search, packet->sk))
		return false;
	return packet->sk != NULL;
}

/* The refusal may be that of each of them. */
static __noinline int listeners_mark(struct search *search)
{
	search->mark = true;
	search_bucket(search);
	if (!search->any)
		return 0;
	search->any = false;
	search_bucket(search);
	return 0;
}

#endif
