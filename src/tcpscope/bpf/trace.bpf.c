// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * The packets of chosen connections on their way through the stack: one event at each hop.
 *
 * A packet is followed by the address of its skb, and then by its connection. Loopback and veth give the receiver the skb of the
 * sender. An address is used again, so a packet is the one that was seen before only if its sequence numbers are the same, and the
 * last hop is one that comes before this one. Changed addresses and ports (NAT) do not matter.
 *
 * An skb does not live as long as its data. What the other end has to acknowledge, and what the application has to read, waits
 * in a queue of the connection: `waiting`. Segments that the kernel cuts from a larger packet are found there by their sequence
 * number.
 *
 * The hops here are tracepoints, which every kernel has. Those of the devices fire with softirqs off, so no softirq interrupts their
 * programs. Of the others there are two copies (recursion.bpf.h). Before a device's packet is received: trace_gro.bpf.h. Hops at
 * functions: trace_functions.bpf.h.
 */
#define HAS_GROUPS
#define GROUPS_ARE_DISTRIBUTIONS
#define COUNTED_BYTES(size) 168 /* of struct trace, without the chain: the stack has no room for it */
#include "socket_event.bpf.h"
#include "packet.bpf.h"
#include "trace_netfilter.bpf.h"

#define AT_A_TIME 32768 /* packets that began, and are followed */
#define HASH_BITS 12
#define HASHES (1 << HASH_BITS)
#define GONE_NS 10000000000 /* longer than a packet waits that no connection of this host waits for */
#define DEPTH 512           /* packets of one connection that wait, for each direction; a power of two */
#define AT_ONCE 128         /* of them that one ACK, or one read, takes out of the queue: before 5.17 */
#define SEARCHED 16         /* of them that may be the packet of which a segment was cut: the newest */
#define NESTED 4            /* devices that send through each other */
#define BULK 1024           /* packets that leave a queue discipline at once */
#define BULK_TURNS 16       /* the same before 5.17 */
#define MORE_TURNS 64       /* and behind them: these are only counted */

#define NETDEV_TX_BUSY 0x10 /* include/linux/netdevice.h */

enum hop {
	HOP_UNKNOWN,
	HOP_WRITE,
	HOP_TRANSMIT,
	HOP_IP_OUT,
	HOP_QUEUE,
	HOP_ENQUEUE,
	HOP_SEGMENTED,
	HOP_DEQUEUE,
	HOP_START_XMIT,
	HOP_XMIT,
	HOP_ACKED,
	HOP_GRO,
	HOP_MERGED,
	HOP_RECEIVE,
	HOP_IP_IN,
	HOP_DELIVER,
	HOP_FORWARD,
	HOP_TCP_IN,
	HOP_BACKLOG,
	HOP_TCP,
	HOP_READ,
	HOP_NETFILTER,
	HOP_FUNCTION,
	HOP_CONSUMED,
	HOP_DROPPED,
} __attribute__((packed));

enum way { WAY_UNKNOWN, WAY_RECEIVED, WAY_SENT } __attribute__((packed));

struct trace {
	struct event event;
	__u64 packet WIDTH(6)
	DOC("number of the packet in this run; segments have that of the packet they were cut from");
	__u64 since_us TITLE("SINCE(us)") UNIT("us") UNKNOWN_IS("max") DOC("since the hop before");
	__u32 seq WIDTH(10) DOC("sequence number of its first byte");
	__u32 ack WIDTH(10) DOC("what it acknowledges");
	__u32 packet_bytes TITLE("LEN") WIDTH(5) UNIT("bytes") UNKNOWN_IS("zero") DOC("length of the IP packet");
	__u32 data_bytes TITLE("DATA") WIDTH(5) UNIT("bytes") DOC("data in it");
	__u32 reason WIDTH(19) NAMED_BY("skb_drop_reason", "SKB_DROP_REASON_") AND_BY("qdisc_drop_reason", "")
		SUBSYSTEMS("skb_drop_reason_subsys", "SKB_DROP_REASON_SUBSYS_") UNKNOWN_IS("max")
		DOC("of DROPPED: why, in the kernel's words, since Linux 5.17");
	__u32 cpu WIDTH(3) DOC("processor on which the hop was");
	__u16 queue WIDTH(5) UNKNOWN_IS("max") DOC("transmit queue of the device");
	__u16 flags KIND("tcp_flags") WIDTH(7) DOC("TCP flags");
	char device[16] KIND("comm") WIDTH(8) UNKNOWN_IS("zero") DOC("network device");
	enum hop hop DOC("where the packet is");
	enum hop before UNKNOWN_IS("zero") DOC("the hop before");
	enum way direction TITLE("DIR") UNKNOWN_IS("zero") DOC("RECEIVED, also to be forwarded; SENT by this host");
	__u8 where KIND("function") TITLE("WHERE") WIDTH(11) UNKNOWN_IS("zero")
	DOC("of NETFILTER: the hook; of DROPPED: the hook of netfilter that discards it; of FUNCTION: the function");
	char chain[CHAIN_BYTES] KIND("comm") WIDTH(17) NOT_COUNTED UNKNOWN_IS("zero")
	DOC("of DROPPED: the base chain of nf_tables that discards it, as family:table:chain");
};
const struct trace *trace_anchor __attribute__((unused));
_Static_assert(offsetof(struct trace, chain) == COUNTED_BYTES(0), "the room of an event that is only counted");

const volatile __u64 since_min_us; /* hops with a shorter delay are filtered */

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

/* The event of a hop. */
static __noinline int hop_send(const struct piece *piece, const struct identity *id, const struct at *at)
{
	__u64 last_ns = *(const volatile __u64 *)&piece->last_ns, since_us = -1; /* another processor may write it */
	struct net_device *device =
		at->device; /* outside of BPF_CORE_READ, which would look for our struct in the kernel */
	__u8 room[COUNTED_BYTES(0)] __attribute__((aligned(8)));
	struct trace *event;

	if (piece->left_out)
		return 0;
	if (last_ns && !at->late)
		since_us = at->now_ns > last_ns ? (at->now_ns - last_ns) / 1000 : 0;
	if (since_min_us && (since_us == (__u64)-1 || since_us < since_min_us)) {
		COUNT(seen);
		COUNT(filtered);
		return 0;
	}
	event = event_begin_in(room, sizeof(*event), at->now_ns, id,
			       at->sk ? connection_owner(connection_find(at->sk)) : NULL);
	if (!event)
		return 0;
	event->packet = piece->number;
	event->since_us = since_us;
	event->seq = piece->seq;
	event->ack = piece->ack;
	event->packet_bytes = piece->bytes;
	event->data_bytes = piece->end_seq - piece->seq - !!(piece->flags & TCP_SYN) - !!(piece->flags & TCP_FIN);
	event->reason = at->reason;
	event->cpu = bpf_get_smp_processor_id();
	event->queue = at->queue;
	event->flags = piece->flags;
	event->hop = at->hop;
	event->before = piece->side ?: piece->hop;
	event->direction = piece->direction;
	event->where = at->where;
	__builtin_memset(event->device, 0, sizeof(event->device));
	if (!IS_GROUPING)
		__builtin_memset(event->chain, 0, sizeof(event->chain));
	if (device)
		BPF_CORE_READ_STR_INTO(&event->device, device, name);
	if (!IS_GROUPING && at->chain)
		chain_write(at->chain, event->chain);
	return event_submit(event);
}

static __always_inline struct at at_hop(enum hop hop)
{
	return (struct at){.now_ns = bpf_ktime_get_ns(), .reason = -1, .queue = -1, .hop = hop};
}

static __always_inline struct waiting *waiting_find(struct sock *sk, __u32 queue, __u32 index)
{
	struct place place = {.sk = (__u64)sk, .index = index, .queue = queue};

	return bpf_map_lookup_elem(&waiting, &place);
}

static __always_inline void waiting_delete(struct sock *sk, __u32 queue, __u32 index)
{
	struct place place = {.sk = (__u64)sk, .index = index, .queue = queue};

	bpf_map_delete_elem(&waiting, &place);
}

/* The packet waits for the acknowledgement or the reader. If the queue is full, the oldest one gives way. */
static __noinline int waiting_add(struct flow *flow, struct followed *followed, __u32 queue)
{
	struct waiting new = {.skb = followed->skb};
	__u32 index, which = queue & 1;
	struct place place = {.sk = followed->sk, .queue = which};

	if (flow->next[which] - flow->first[which] >= DEPTH) {
		waiting_delete((struct sock *)followed->sk, which, flow->first[which]++);
		COUNT(missed);
	}
	index = flow->next[which]++;
	followed->piece.index = index;
	followed->piece.waits = true;
	new.piece = followed->piece;
	place.index = index;
	if (bpf_map_update_elem(&waiting, &place, &new, BPF_ANY))
		COUNT(table_full);
	return 0;
}

/* The packet has passed this hop. Of what this host sends the queue of its connection knows it, too. */
static __always_inline int hop_note(struct followed *followed, const struct at *at)
{
	struct waiting *sent;

	hop_send(&followed->piece, &followed->id, at);
	followed->piece.hop = at->hop;
	followed->piece.side = HOP_UNKNOWN;
	followed->piece.last_ns = at->now_ns;
	if (!followed->piece.waits || followed->piece.direction != WAY_SENT)
		return 0;
	sent = waiting_find((struct sock *)followed->sk, OF_ACKS, followed->piece.index);
	if (!sent)
		return 0;
	sent->hop = at->hop;
	sent->last_ns = at->now_ns;
	if (sent->skb == followed->skb) {
		sent->piece.hop = at->hop;
		sent->piece.last_ns = at->now_ns;
	}
	return 0;
}

/* A packet that is at its hop no more: it may not be followed any longer, or its entry be that of another one. */
static __noinline int copy_pass(struct followed *copy, __u64 device, enum hop hop)
{
	struct at at = at_hop(hop);

	at.device = (struct net_device *)device;
	at.sk = (struct sock *)copy->owned;
	return hop_note(copy, &at);
}

/*
 * For hop_pass(). The verifier looks at a global function once, not once for each way that leads to a call. Before 5.12 such a function
 * takes numbers only.
 */
__noinline int hop_passed(__u64 skb, __u64 now_ns, __u64 device, __u32 reason, __u32 rest)
{
	struct followed *followed = packet_find(skb);
	struct at at = {.now_ns = now_ns, .device = (struct net_device *)device, .reason = reason};

	if (!followed) { /* another processor has just taken it out of the table */
		COUNT(missed);
		return 0;
	}
	at.hop = rest;
	at.where = rest >> 8;
	at.queue = rest >> 16;
	at.sk = (struct sock *)followed->owned;
	if (at.hop == HOP_DROPPED && at.where)
		at.chain = &followed->chain;
	return hop_note(followed, &at);
}

/* A packet of the table `packets` has passed this hop. */
static __always_inline int hop_pass(struct followed *followed, const struct at *at)
{
	return hop_passed(followed->skb, at->now_ns, number_of((__u64)at->device), at->reason,
			  (__u32)at->queue << 16 | at->where << 8 | at->hop);
}

/* One that waits. False: it goes on waiting. A read does not take the sequence number of a FIN. */
static __noinline bool waiting_end(struct flow *flow, struct sock *sk, __u32 queue, __u32 upto, struct at *at)
{
	__u32 which = queue & 1, index = flow->first[which], end_seq;
	struct waiting *first = waiting_find(sk, which, index);
	struct followed *followed;

	if (first) {
		end_seq = first->piece.end_seq - (which == OF_READS && first->piece.flags & TCP_FIN);
		if (is_after(end_seq, upto))
			return false;
		at->late = !is_after(end_seq, flow->taken[which]) ||
			   (at->inexact && (end_seq != upto || !(first->piece.flags & (TCP_SYN | TCP_FIN))));
		if (first->last_ns) {
			first->piece.hop = first->hop;
			first->piece.last_ns = first->last_ns;
		}
		hop_send(&first->piece, &flow->id, at);
		followed = which == OF_READS ? packet_find(first->skb) : NULL;
		if (followed && followed->piece.number == first->piece.number &&
		    followed->piece.seq == first->piece.seq)
			packet_delete(first->skb);
		waiting_delete(sk, which, index);
	}
	flow->first[which]++;
	return true;
}

/* An ACK or a read takes packets out of the queue. */
struct take {
	struct flow *flow;
	struct sock *sk;
	__u32 queue, upto;
	struct at at;
};

/* `inexact`: only the ACK of a SYN or FIN is known to have come now. */
static __always_inline struct take take_of(struct flow *flow, __u32 queue, __u32 upto, bool inexact, __u64 now_ns)
{
	struct take take = {.flow = flow, .sk = (struct sock *)flow->sk, .queue = queue, .upto = upto};

	take.at = (struct at){.now_ns = now_ns, .reason = -1, .queue = -1, .inexact = inexact};
	take.at.hop = queue == OF_ACKS ? HOP_ACKED : HOP_READ;
	take.at.sk = take.sk;
	return take;
}

static __always_inline bool take_next(struct take *take)
{
	__u32 which = take->queue & 1;

	return take->flow->first[which] != take->flow->next[which] &&
	       waiting_end(take->flow, take->sk, which, take->upto, &take->at);
}

static long take_turn(__u32 index, struct take *take)
{
	return !take_next(take);
}

/* The same as a global function, as hop_passed() is. False: there is no next one. */
__noinline int take_one(__u64 sk, __u32 queue, __u32 upto, __u32 inexact, __u64 now_ns)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, &sk);
	struct take take;

	if (!flow)
		return 0;
	take = take_of(flow, queue, upto, inexact, now_ns);
	return take_next(&take);
}

/*
 * The bytes before `upto` have been read or acknowledged. Before 5.17 a program takes only so many at once: those behind them have to
 * wait for its next run, and have no delay then.
 */
static __always_inline void waiting_take(struct flow *flow, __u32 queue, __u32 upto, bool inexact, bool loops)
{
	__u64 now_ns = bpf_ktime_get_ns();

	if (loops) {
		struct take take = take_of(flow, queue, upto, inexact, now_ns);

		bpf_loop(DEPTH, take_turn, &take, 0);
	} else {
		for (int i = 0; i < AT_ONCE && take_one(flow->sk, queue, upto, inexact, now_ns); i++)
			;
	}
	flow->taken[queue & 1] = upto;
}

static __always_inline struct flow *flow_find(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&flows, &key);
}

static __always_inline void ends_of(const struct identity *id, struct ends *ends)
{
	__builtin_memcpy(ends->laddr, id->laddr, 16);
	__builtin_memcpy(ends->raddr, id->raddr, 16);
	ends->lport = id->lport;
	ends->rport = id->rport;
	ends->netns = id->netns;
}

/* Without a test in the loop, of which the verifier would follow each turn apart. */
static __always_inline void waiting_clear(struct flow *flow, struct sock *sk, __u32 queue)
{
	__u32 first = flow->first[queue];
	const struct waiting *oldest = waiting_find(sk, queue, first);

	if (first == flow->next[queue])
		return;
	/* Before 5.17 it may have been read or acknowledged together with too many others, and have waited for its turn. */
	if (oldest && !is_after(oldest->piece.end_seq, flow->taken[queue]))
		COUNT_MANY(missed, flow->next[queue] - first);
	for (int i = 0; i < DEPTH; i++)
		waiting_delete(sk, queue, first + i);
}

/* 1 if there was an entry to delete. */
static __noinline int destroyed(struct sock *sk)
{
	struct flow *flow = flow_find(sk);
	__u64 key = (__u64)sk, *known;
	struct ends ends;

	if (!flow)
		return 0;
	waiting_clear(flow, sk, OF_READS);
	waiting_clear(flow, sk, OF_ACKS);
	ends_of(&flow->id, &ends);
	known = bpf_map_lookup_elem(&sockets, &ends);
	if (known && *known == key)
		bpf_map_delete_elem(&sockets, &ends);
	bpf_map_delete_elem(&flows, &key);
	return 1;
}

static __noinline struct flow *flow_add(struct sock *sk, const struct identity *id)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	__u64 key = (__u64)sk;
	struct flow *flow;
	struct ends ends;

	table_put(&flows, &key, &new_flow, BPF_NOEXIST);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow) {
		COUNT(table_full);
		return NULL;
	}
	flow->sk = key;
	flow->id = *id;
	flow->taken[OF_ACKS] = BPF_CORE_READ(tcp, snd_una);
	flow->taken[OF_READS] = BPF_CORE_READ(tcp, copied_seq);
	flow->ends[OF_READS] = BPF_CORE_READ(tcp, rcv_nxt);
	ends_of(id, &ends);
	if (bpf_map_update_elem(&sockets, &ends, &key, BPF_ANY))
		COUNT(table_full);
	return flow;
}

/* Is it a connection's own socket? That of the kernel, which sends RSTs and the ACKs of TIME_WAIT, is in CLOSE. */
static __always_inline bool is_of_connection(__u8 state)
{
	return state != STATE_TIME_WAIT && state != STATE_NEW_SYN_RECV && state != STATE_LISTEN && state != STATE_CLOSE;
}

static __always_inline bool is_connection(struct sock *sk)
{
	return is_of_connection(BPF_CORE_READ(sk, __sk_common.skc_state));
}

static __always_inline bool are_ports_chosen(__u16 lport, __u16 rport)
{
	if (filter.has_port && !PORT_IN(filter_port, lport) && !PORT_IN(filter_port, rport))
		return false;
	return (!filter.has_lport || PORT_IN(filter_lport, lport)) &&
	       (!filter.has_rport || PORT_IN(filter_rport, rport));
}

/* What is cheap to ask of a connection, before all else is read of it. Its local port is 0 when it has ended. */
static __always_inline bool may_be_chosen(struct sock *sk)
{
	__u16 lport = sk->__sk_common.skc_num;

	return !lport || are_ports_chosen(lport, bpf_ntohs(sk->__sk_common.skc_dport));
}

static __always_inline bool is_other(struct sock *sk)
{
	return sk && is_of_connection(sk->__sk_common.skc_state) && !may_be_chosen(sk);
}

/* Does the header say that it is this one? Its ports and addresses may have changed. */
static __always_inline bool is_same(const struct followed *followed, const struct packet *packet)
{
	return packet->flags != NO_FLAGS && followed->piece.seq == packet->seq && followed->piece.ack == packet->ack;
}

static __always_inline struct followed *followed_find(struct sk_buff *skb)
{
	return packet_find((__u64)skb);
}

static __always_inline void followed_delete(struct sk_buff *skb)
{
	packet_delete((__u64)skb);
}

/* The TCP header of a packet that TCP gives to IP: it has no IP header yet. False if it is not there. */
static __noinline bool transport_read(struct sk_buff *skb, struct packet *packet)
{
	__u8 header[TCP_BYTES + 2] __attribute__((aligned(8))) = {};

	if (skb->transport_header + TCP_BYTES > skb->tail)
		return false;
	bpf_probe_read_kernel(header, TCP_BYTES, skb->head + skb->transport_header);
	packet->bytes = skb->len;
	tcp_header_parse(header, 0, packet);
	return true;
}

/*
 * Does the header behind that of a tunnel say that it is this one? Without a header of TCP anywhere it is encrypted, or the skb is
 * another one: that shows at the next header.
 */
static __noinline bool is_inside(struct sk_buff *skb, const struct followed *followed)
{
	__u32 numbers[2] = {};

	bpf_probe_read_kernel(numbers, sizeof(numbers), skb->head + BPF_CORE_READ(skb, inner_transport_header) + 4);
	return bpf_ntohl(numbers[0]) == followed->piece.seq && bpf_ntohl(numbers[1]) == followed->piece.ack;
}

/* The headers behind that of a tunnel. */
static __always_inline enum of_tcp inner_read(struct sk_buff *skb, struct packet *packet)
{
	return packet_read_at(skb, skb->inner_network_header, packet);
}

/* Of what a device receives the data begins at the IP header. Unless GRO has looked at it, skb->network_header is not set yet. */
static __always_inline __u32 data_offset(struct sk_buff *skb)
{
	return BPF_CORE_READ(skb, data) - BPF_CORE_READ(skb, head);
}

/* Is the packet still the one that was followed? Less than 0: that shows later. */
static __noinline int is_still(struct sk_buff *skb, const struct followed *followed)
{
	struct packet packet = {};

	if (followed->piece.hop == HOP_TRANSMIT)
		return transport_read(skb, &packet) && is_same(followed, &packet);
	if (packet_read_at(skb, followed->piece.hop == HOP_GRO ? data_offset(skb) : skb->network_header, &packet) !=
	    OF_TCP)
		return is_inside(skb, followed) ? 1 : -1;
	return is_same(followed, &packet);
}

/* The packet that an skb is, if it is followed. One comparison for all others. */
static __noinline struct followed *followed_now(struct sk_buff *skb)
{
	struct followed *followed = followed_find(skb);
	int still;

	if (!followed)
		return NULL;
	still = is_still(skb, followed);
	if (still > 0)
		return followed;
	if (!still)
		followed_delete(skb);
	return NULL;
}

/* The length from the IP header on. The header of a packet of more than 64 KB does not say it. */
static __always_inline __u32 length_of(struct sk_buff *skb, const struct packet *packet)
{
	__u64 head, data;

	if (packet->bytes)
		return packet->bytes;
	head = (__u64)BPF_CORE_READ(skb, head);
	data = (__u64)BPF_CORE_READ(skb, data);
	return skb->len - (head + skb->network_header - data);
}

static __always_inline void piece_read(struct sk_buff *skb, const struct packet *packet, struct piece *piece)
{
	piece->bytes = length_of(skb, packet);
	piece->seq = packet->seq;
	piece->ack = packet->ack;
	piece->flags = packet->flags;
	piece->end_seq = packet->seq + (piece->bytes > packet->headers ? piece->bytes - packet->headers : 0) +
			 !!(packet->flags & TCP_SYN) + !!(packet->flags & TCP_FIN);
}

static __always_inline __u64 next_number(void)
{
	__u32 zero = 0, interrupting;
	struct numbers *mine = bpf_map_lookup_elem(&numbers, &zero);
	__u64 number;

	if (!mine)
		return 0;
	interrupting = mine->taking++ & 1;
	barrier();
	number = mine->begun[interrupting]++;
	barrier();
	mine->taking--;
	return number * possible_cpus + bpf_get_smp_processor_id() + 1 + (interrupting ? INTERRUPTING : 0);
}

/* The connection with these ends; 0: not known. Apart, as handled_begin() is. */
static __noinline __u64 socket_with(const struct identity *id)
{
	struct ends ends;
	__u64 *sk;

	ends_of(id, &ends);
	sk = bpf_map_lookup_elem(&sockets, &ends);
	return sk ? *sk : 0;
}

/*
 * Has the packet no hop left that an skb shows? If TCP has taken it, its connection shows the rest. If GRO or the backlog has merged it,
 * or it belongs to a handshake, which tcp_probe does not see, the connection's sequence numbers say that it has arrived.
 */
static __noinline bool is_over(const struct followed *followed)
{
	struct tcp_sock *tcp = (struct tcp_sock *)(followed->sk ?: socket_with(&followed->id));
	__u32 acked = BPF_CORE_READ(tcp, snd_una);
	const struct flow *flow = flow_find((struct sock *)tcp);
	bool lives = flow && flow->id.lport == followed->id.lport && flow->id.rport == followed->id.rport;

	if (followed->piece.direction == WAY_SENT)
		return followed->sk && followed->piece.hop == HOP_XMIT &&
		       followed->piece.end_seq != followed->piece.seq &&
		       (!lives || !is_after(followed->piece.end_seq, acked));
	if (followed->piece.hop != HOP_RECEIVE)
		return followed->piece.hop == HOP_TCP;
	if (followed->piece.left_out) /* most likely it has arrived */
		return true;
	if (!tcp)
		return bpf_ktime_get_ns() - followed->piece.last_ns > GONE_NS;
	return !lives || !(is_after(followed->piece.end_seq, BPF_CORE_READ(tcp, rcv_nxt)) ||
			   is_after(followed->piece.ack, acked));
}

/* The packet that began first gives way, so that there is a ticket for another one. */
__noinline int oldest_push_out(void)
{
	struct ticket ticket = {};
	struct followed *followed;
	struct flow *flow;

	if (bpf_map_pop_elem(&tickets, &ticket))
		return 0;
	followed = packet_find(ticket.skb);
	if (!followed || followed->since_ns != ticket.since_ns)
		return 0;
	if (!is_over(followed)) {
		COUNT(missed);
		flow = followed->piece.waits ? flow_find((struct sock *)followed->sk) : NULL;
		if (flow && followed->piece.direction == WAY_SENT)
			flow->pushed_out++;
	}
	packet_delete(ticket.skb);
	return 0;
}

/* From now on the packet is followed. NULL: no place. Without a number it is a new packet. */
static __noinline struct followed *followed_add(struct sk_buff *skb, const struct packet *packet, enum way direction,
						__u64 number)
{
	struct ticket ticket = {.skb = (__u64)skb, .since_ns = bpf_ktime_get_ns()};
	struct followed *followed;

	if (bpf_map_push_elem(&tickets, &ticket, BPF_ANY)) {
		oldest_push_out();
		if (bpf_map_push_elem(&tickets, &ticket, BPF_ANY)) { /* another processor was quicker */
			COUNT(missed);
			return NULL;
		}
	}
	followed = packet_add(ticket.skb);
	if (!followed) {
		COUNT(missed);
		return NULL;
	}
	followed->skb = ticket.skb;
	followed->since_ns = ticket.since_ns;
	piece_read(skb, packet, &followed->piece);
	followed->piece.direction = direction;
	followed->piece.number = number ?: next_number();
	return followed;
}

static __always_inline void ends_read(const struct packet *packet, bool out, struct identity *id)
{
	id->family = packet->family;
	id->lport = out ? packet->sport : packet->dport;
	id->rport = out ? packet->dport : packet->sport;
	__builtin_memcpy(id->laddr, out ? packet->saddr : packet->daddr, 16);
	__builtin_memcpy(id->raddr, out ? packet->daddr : packet->saddr, 16);
}

/* The socket in the table of owners: of a request its listener. */
static __always_inline struct sock *owned_of(struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	if (state == STATE_TIME_WAIT)
		return NULL;
	return state == STATE_NEW_SYN_RECV ? BPF_CORE_READ(sk, __sk_common.skc_listener) : sk;
}

static __always_inline bool is_owner_chosen(struct sock *owned)
{
	return !filter_wants_owner() || filter_owner(owned ? connection_owner(connection_find(owned)) : NULL);
}

/* What the filter says, before anything is counted: other traffic is no event. */
static __always_inline bool is_chosen(const struct identity *id, struct sock *owned)
{
	return filter_identity(id) && is_owner_chosen(owned);
}

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

/* Has something passed that no program has seen? `begins` is where what was seen has to end, or later. */
static __always_inline void follow_on(struct flow *flow, int which, __u32 begins, __u32 end_seq)
{
	if (flow->ends[which] && is_after(begins, flow->ends[which]))
		COUNT(missed);
	if (!flow->ends[which] || is_after(end_seq, flow->ends[which]))
		flow->ends[which] = end_seq;
}

/*
 * Is a packet that was followed to this hop the one that a device gets now? A packet that a device has received has skb_iif. Without
 * it the skb is new, at an address whose last packet may have been the same: a keepalive, or a SYN-ACK that is sent again. One in a
 * tunnel, whose device has taken it, may have waited for the link address of the next hop (ARP).
 */
static __always_inline bool may_be_queued(struct sk_buff *skb, enum hop hop, bool hidden)
{
	return hop == HOP_TRANSMIT || hop == HOP_START_XMIT || (hop == HOP_RECEIVE && skb->skb_iif) ||
	       (hop == HOP_XMIT && hidden);
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
 * TCP takes a segment of an established connection. It is about to handle what it says. In the backlog another one, also with a FIN,
 * may have been merged into it.
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

	if (!flow) {
		if (followed)
			followed_delete(skb);
		return 0;
	}
	at = at_hop(HOP_TCP);
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
		else if (is_after(end_seq, BPF_CORE_READ(tcp, rcv_nxt)))
			unread_add(flow, followed);
	}
	if (is_after(ack, BPF_CORE_READ(tcp, snd_una)) && !is_after(ack, BPF_CORE_READ(tcp, snd_nxt)))
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

/* Does the packet have to be cut (GSO)? */
static __always_inline bool is_large(struct sk_buff *skb)
{
	struct skb_shared_info *shared = (struct skb_shared_info *)(skb->head + skb->end);

	return BPF_CORE_READ(shared, gso_size);
}

/* The skb is freed. A large packet is freed when its segments have been made. */
static __noinline int freed(struct sk_buff *skb, enum hop hop, __u32 reason)
{
	struct followed *followed = followed_find(skb);
	struct at at;

	if (!followed)
		return 0;
	followed = followed_now(skb);
	if (!followed) {
		followed_delete(skb);
		return 0;
	}
	if (hop == HOP_CONSUMED && followed->piece.hop < HOP_START_XMIT && is_large(skb)) {
		hop = HOP_SEGMENTED;
		if (!followed->piece.waits) /* nobody knows the segments of what is forwarded */
			COUNT(missed);
	}
	at = at_hop(hop);
	at.sk = (struct sock *)followed->owned;
	at.reason = reason;
	if (hop == HOP_DROPPED && followed->piece.side == HOP_NETFILTER)
		at.where = followed->piece.where;
	hop_pass(followed, &at);
	if (hop == HOP_DROPPED && followed->piece.waits && followed->piece.direction == WAY_RECEIVED)
		waiting_delete((struct sock *)followed->sk, OF_READS, followed->piece.index);
	followed_delete(skb);
	return 0;
}

struct Qdisc;

SEC("tp_btf/net_dev_queue")
int TRACEPOINT_PROG(queue, struct sk_buff *skb)
{
	return queued(skb);
}

/* Without a lock, the queue discipline may have given the packet to another processor by now, and the skb may be gone. */
OPTIONAL("when a queue discipline has taken a packet")
SEC("tp_btf/qdisc_enqueue")
int TRACEPOINT_PROG(enqueue, struct Qdisc *qdisc, struct netdev_queue *queue, struct sk_buff *skb)
{
	struct followed *followed = followed_find(skb);
	struct at at;

	if (!followed || followed->piece.hop != HOP_QUEUE)
		return 0;
	at = at_hop(HOP_ENQUEUE);
	at.device = BPF_CORE_READ(queue, dev);
	at.sk = (struct sock *)followed->owned;
	at.queue = skb->queue_mapping;
	hop_pass(followed, &at);
	return 0;
}

/* What leaves a queue discipline at once: the next one of it. */
struct bulk {
	struct sk_buff *skb;
};

static __always_inline bool bulk_next(struct bulk *bulk, bool followed)
{
	struct sk_buff *skb = bulk->skb;

	if (!skb)
		return false;
	if (followed)
		outward(skb, skb->dev, HOP_DEQUEUE);
	else if (followed_find(skb))
		COUNT(missed);
	bulk->skb = skb->next;
	return true;
}

static long bulk_turn(__u32 index, struct bulk *bulk)
{
	return !bulk_next(bulk, true);
}

/*
 * skb is NULL if the queue is empty. Since "bpf: Teach verifier that trusted PTR_TO_BTF_ID pointers are non-NULL" (6.5) the verifier
 * deletes a test of the pointer, and skb->dev is a load that must not fail. Until "bpf: Augment raw_tp arguments with PTR_MAYBE_NULL"
 * (6.13, 6.12.6) the kernel would oops. So the address is tested as a number. Later kernels want the test of the pointer, too.
 */
static __always_inline int dequeued(const __u64 *arguments, struct sk_buff *skb, bool loops)
{
	struct bulk bulk = {.skb = skb};
	__u64 address = 0;

	barrier_var(arguments); /* the verifier refuses to load from a place that was computed, such as &ctx[3] */
	bpf_probe_read_kernel(&address, sizeof(address), &arguments[3]);
	if (!address)
		return 0;
	if (loops) {
		bpf_loop(BULK, bulk_turn, &bulk, 0);
		return 0;
	}
	for (int i = 0; i < BULK_TURNS && bulk_next(&bulk, true); i++)
		;
	for (int i = 0; i < MORE_TURNS && bulk_next(&bulk, false); i++)
		;
	return 0;
}

NEEDS("BPF_FUNC_loop")
SEC("tp_btf/qdisc_dequeue")
int TRACEPOINT_PROG(dequeue__loop, struct Qdisc *qdisc, struct netdev_queue *queue, int count, struct sk_buff *skb)
{
	return dequeued(ctx, skb, true);
}

SEC("tp_btf/qdisc_dequeue")
int TRACEPOINT_PROG(dequeue__turns, struct Qdisc *qdisc, struct netdev_queue *queue, int count, struct sk_buff *skb)
{
	return dequeued(ctx, skb, false);
}

/* Before start_xmit: programs are attached in their order, and each packet that goes to a driver is to come back. */
SEC("tp_btf/net_dev_xmit")
int TRACEPOINT_PROG(xmit, struct sk_buff *skb, int result, struct net_device *device)
{
	return driver_took(skb, device, result);
}

SEC("tp_btf/net_dev_start_xmit")
int TRACEPOINT_PROG(start_xmit, struct sk_buff *skb, struct net_device *device)
{
	return driven(skb, device);
}

SEC("tp_btf/netif_receive_skb")
int TRACEPOINT_PROG_IF(followed_find(skb) || may_be_received(skb), receive, struct sk_buff *skb)
{
	received(skb, HOP_RECEIVE);
	return 0;
}

/* For the second copy: after the first one the packet is at this hop, or followed no more. */
static __always_inline bool was_skipped(struct sk_buff *skb)
{
	struct followed *followed = followed_find(skb);

	return followed && followed->piece.hop != HOP_TCP;
}

NEEDS("BPF_FUNC_loop")
SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG(tcp__loop, struct sock *sk, struct sk_buff *skb)
{
	return handled(sk, skb, COOKIE_OF(sk), true);
}

SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG(tcp__turns, struct sock *sk, struct sk_buff *skb)
{
	return handled(sk, skb, COOKIE_OF(sk), false);
}

AGAIN
NEEDS("BPF_FUNC_loop")
SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG(tcp_again__loop, struct sock *sk, struct sk_buff *skb)
{
	return was_skipped(skb) ? handled(sk, skb, COOKIE_OF(sk), true) : 0;
}

AGAIN
SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG(tcp_again__turns, struct sock *sk, struct sk_buff *skb)
{
	return was_skipped(skb) ? handled(sk, skb, COOKIE_OF(sk), false) : 0;
}

NEEDS("BPF_FUNC_loop")
SEC("tp_btf/tcp_rcv_space_adjust")
int TRACEPOINT_PROG(read__loop, struct sock *sk)
{
	return taken(sk, true);
}

SEC("tp_btf/tcp_rcv_space_adjust")
int TRACEPOINT_PROG(read__turns, struct sock *sk)
{
	return taken(sk, false);
}

/* A second look finds nothing new. */
AGAIN
NEEDS("BPF_FUNC_loop")
SEC("tp_btf/tcp_rcv_space_adjust")
int TRACEPOINT_PROG(read_again__loop, struct sock *sk)
{
	return taken(sk, true);
}

AGAIN
SEC("tp_btf/tcp_rcv_space_adjust")
int TRACEPOINT_PROG(read_again__turns, struct sock *sk)
{
	return taken(sk, false);
}

NEEDS("BPF_FUNC_loop")
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG(state__loop, struct sock *sk, int before, int state)
{
	return state_changed(sk, state, true);
}

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG(state__turns, struct sock *sk, int before, int state)
{
	return state_changed(sk, state, false);
}

AGAIN
NEEDS("BPF_FUNC_loop")
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG(state_again__loop, struct sock *sk, int before, int state)
{
	return state_changed(sk, state, true);
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG(state_again__turns, struct sock *sk, int before, int state)
{
	return state_changed(sk, state, false);
}

SEC("tp_btf/consume_skb")
int TRACEPOINT_PROG(consume, struct sk_buff *skb)
{
	return freed(skb, HOP_CONSUMED, -1);
}

/* After the first copy the packet is followed no more. */
AGAIN
SEC("tp_btf/consume_skb")
int TRACEPOINT_PROG(consume_again, struct sk_buff *skb)
{
	return freed(skb, HOP_CONSUMED, -1);
}

SEC("tp_btf/kfree_skb")
int TRACEPOINT_PROG(discard, struct sk_buff *skb)
{
	return freed(skb, HOP_DROPPED, DROP_REASON(ctx));
}

AGAIN
SEC("tp_btf/kfree_skb")
int TRACEPOINT_PROG(discard_again, struct sk_buff *skb)
{
	return freed(skb, HOP_DROPPED, DROP_REASON(ctx));
}

#include "destroy.bpf.h"
#include "trace_gro.bpf.h"
#include "trace_functions.bpf.h"
