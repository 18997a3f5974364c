/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What `trace` keeps: the packets that it follows, their connections, and what waits there. */
#ifndef TCPSCOPE_TRACE_TABLES_BPF_H
#define TCPSCOPE_TRACE_TABLES_BPF_H

#define AT_A_TIME 32768 /* packets that began, and are followed */
#define HASH_BITS 12
#define HASHES (1 << HASH_BITS)
#define DEPTH 512 /* packets of one connection that wait, for each direction; a power of two */
#define NESTED 4  /* devices that send through each other */

const volatile __u32 possible_cpus;

/*
 * How many packets began on this CPU: a counter for all would need an atomic operation that returns the number (5.12). Since a softirq may
 * interrupt a program that takes one, it has a counter of its own then.
 */
struct numbers {
	__u64 begun[2];
	__u32 taking;
	__u32 padding;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct numbers);
} numbers SEC(".maps");

#define INTERRUPTING (1ULL << 40) /* added to the numbers of the second counter */

/* A packet at its last hop. */
struct piece {
	__u64 number;
	__u64 last_ns; /* 0: not known */
	__u32 seq, end_seq, ack;
	__u32 bytes;
	__u16 flags;
	enum hop hop;
	enum way direction;
	__u32 index; /* in the queue of its connection; only if `waits` */
	bool waits;
	bool hidden;   /* in a tunnel: its device has put another header before its own */
	enum hop side; /* the last hop at a function that it has passed since `hop`; HOP_UNKNOWN: none */
	__u8 where;    /* of `side` */
	bool left_out; /* the filter excludes where it is: it is followed without rows, to where it may be chosen again */
	__u8 padding[3];
};

/* A packet that is followed by its skb. */
struct followed {
	struct piece piece;
	struct identity id;
	__u64 skb;
	__u64 sk;    /* its full socket; 0: not known */
	__u64 owned; /* the socket whose owner is meant: of a request its listener; 0: not known */
	__u64 since_ns;
	struct chain chain; /* of the hook of netfilter that it is in */
};

/*
 * Inserted at the first hop. Deleted when the skb is freed, and when TCP or the application has taken all of it. A packet whose end no
 * tracepoint shows, such as one of the handshake, stays until its skb's address is used again, or until its ticket is the oldest one.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, AT_A_TIME);
	__type(key, __u64); /* address of the skb */
	__type(value, struct followed);
} packets SEC(".maps");

/*
 * How many followed packets share a hash of their skb's address. Most packets are of other traffic, and this tells them apart without a
 * look-up of a key. Counted up before its packet is inserted, and down after it was deleted.
 */
__u32 hashes[HASHES];

/* The packets in the order in which they began. The oldest one gives way to a new one, whether it is still followed or not. */
struct ticket {
	__u64 skb, since_ns;
};

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, AT_A_TIME);
	__type(value, struct ticket);
} tickets SEC(".maps");

/*
 * A connection that passes the filter. Inserted when it sends, or when TCP receives for it. Deleted at tcp_destroy_sock, and when
 * its socket connects again.
 */
struct flow {
	__u64 sk;
	struct identity id;
	__u32 first[2], next[2]; /* of its queues, by direction */
	__u32 taken[2];          /* what was read, and what was acknowledged, at the last look */
	__u32 ends[2];           /* the end of what was received, and of what was sent */
	__u64 written;           /* bytes before the last write, and FIRST_BYTE: trace_functions.bpf.h */
	__u32 written_seq;       /* where that begins */
	__u32 writes;            /* how many */
	__u32 pushed_out; /* packets with data that were sent, but have not been seen again since they gave way */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct flow);
} flows SEC(".maps");

struct ends {
	__u8 laddr[16], raddr[16];
	__u16 lport, rport;
	__u32 netns;
};

/* The sockets of `flows` by both ends, with the same life. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, struct ends);
	__type(value, __u64);
} sockets SEC(".maps");

enum { OF_READS, OF_ACKS }; /* the queues of a connection */

struct place {
	__u64 sk;
	__u32 index;
	__u32 queue;
};

struct waiting {
	struct piece piece; /* as a whole */
	__u64 skb;
	__u64 last_ns; /* the last hop of it, or of a segment that was cut from it; 0: none */
	enum hop hop;
	__u8 padding[7];
};

/* Inserted when a connection sends or receives data. Deleted when that is acknowledged or read, and with its flow. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, struct place);
	__type(value, struct waiting);
} waiting SEC(".maps");

/* The packets that this CPU gives to drivers, and those that it has just received. The skb may be freed and used again then. */
struct sending {
	__u32 depth;
	__u32 padding;
	__u64 devices[NESTED];
	struct followed packets[NESTED];
	__u64 received; /* the last skb for which no socket was known */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sending);
} sendings SEC(".maps");

static const struct followed not_followed;
static const struct flow new_flow;

/* A hop. */
struct at {
	__u64 now_ns;
	struct net_device *device;
	const struct chain *chain; /* that discards it; NULL: none */
	struct sock *sk;           /* whose owner is meant; NULL: not known */
	__u32 reason;
	__u16 queue;
	enum hop hop;
	__u8 where;
	bool late;    /* it happened before, unseen: the delay is not known */
	bool inexact; /* it may have */
};

static __always_inline bool is_after(__u32 sequence, __u32 other)
{
	return (__s32)(sequence - other) > 0;
}

/* A pointer as a number, as a whole. */
static __always_inline __u64 number_of(__u64 pointer)
{
	volatile union unknown upper;

	upper.whole = pointer;
	upper.bytes[0] = 0;
	return forgotten(pointer) | (__u64)upper.bytes[7] << 56;
}

static __always_inline __u32 *hash_of(__u64 skb)
{
	/* An skb begins a cache line. The factor is that of a multiplicative hash (Knuth, The Art of Computer Programming, 6.4). */
	return &hashes[(__u32)(forgotten(skb) >> 6) * 2654435761U >> (32 - HASH_BITS)];
}

static __always_inline struct followed *packet_find(__u64 skb)
{
	return *hash_of(skb) ? bpf_map_lookup_elem(&packets, &skb) : NULL;
}

static __always_inline void packet_delete(__u64 skb)
{
	if (!bpf_map_delete_elem(&packets, &skb))
		__sync_fetch_and_add(hash_of(skb), -1);
}

/* A new entry in the place of one that may be there. NULL: there is no room. */
static __always_inline struct followed *packet_add(__u64 skb)
{
	__u32 *count = hash_of(skb);

	__sync_fetch_and_add(count, 1);
	if (bpf_map_update_elem(&packets, &skb, &not_followed, BPF_NOEXIST)) {
		__sync_fetch_and_add(count, -1);
		bpf_map_update_elem(&packets, &skb, &not_followed, BPF_EXIST);
	}
	return bpf_map_lookup_elem(&packets, &skb);
}

#endif
