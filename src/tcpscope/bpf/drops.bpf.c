// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* A packet of TCP that the kernel discards: why, where, and whose it is. A SYN that a listener refuses is one, too. */
#define HAS_GROUPS
#define COUNTED_BYTES(size) 144 /* of struct drop, without the stack */
#include "socket_event.bpf.h"
#include "packet.bpf.h"
#include "handled.bpf.h"
#include "handshake.bpf.h"

#define STACK_DEPTH 24
#define REASONS 256
#define PLACES 16

enum discard_kind { KIND_UNKNOWN, KIND_LOST, KIND_REFUSED, KIND_HARMLESS } __attribute__((packed));
enum passage { DIRECTION_UNKNOWN, DIRECTION_RECEIVED, DIRECTION_SENT } __attribute__((packed));

/* Counters of the kernel that count a discarded packet. drop_facts.py says which reason is counted in which. */
enum counter {
	COUNTER_NONE,
	COUNTER_IpExtInCsumErrors,
	COUNTER_IpExtInNoRoutes,
	COUNTER_IpInAddrErrors,
	COUNTER_IpInHdrErrors,
	COUNTER_IpOutNoRoutes,
	COUNTER_TcpExtBeyondWindow,
	COUNTER_TcpExtDelayedACKLost,
	COUNTER_TcpExtIPReversePathFilter,
	COUNTER_TcpExtListenDrops,
	COUNTER_TcpExtListenOverflows,
	COUNTER_TcpExtPAWSEstab,
	COUNTER_TcpExtPAWSOldAck,
	COUNTER_TcpExtPAWSTimewait,
	COUNTER_TcpExtTCPAOBad,
	COUNTER_TcpExtTCPAOKeyNotFound,
	COUNTER_TcpExtTCPAORequired,
	COUNTER_TcpExtTCPAbortOnData,
	COUNTER_TcpExtTCPBacklogDrop,
	COUNTER_TcpExtTCPDeferAcceptDrop,
	COUNTER_TcpExtTCPMD5Failure,
	COUNTER_TcpExtTCPMD5NotFound,
	COUNTER_TcpExtTCPMD5Unexpected,
	COUNTER_TcpExtTCPMinTTLDrop,
	COUNTER_TcpExtTCPOFODrop,
	COUNTER_TcpExtTCPOFOMerge,
	COUNTER_TcpExtTCPRcvQDrop,
	COUNTER_TcpExtTCPReqQFullDrop,
	COUNTER_TcpExtTCPSYNChallenge,
	COUNTER_TcpExtTCPZeroWindowDrop,
	COUNTER_TcpExtTSEcrRejected,
	COUNTER_TcpInCsumErrors,
} __attribute__((packed));

/*
 * Why a listener refuses a SYN. The kernel has no reason for it, so these are ours: their upper half is the number of no subsystem.
 */
#define DERIVED 0x7fff0000

enum derived_reason {
	DERIVED_ACCEPT_QUEUE_FULL = DERIVED + CAUSE_ACCEPT_QUEUE_FULL,
	DERIVED_SYN_QUEUE_FULL = DERIVED + CAUSE_SYN_QUEUE_FULL,
	DERIVED_SYN_QUEUE_RESERVED = DERIVED + CAUSE_SYN_QUEUE_RESERVED,
	DERIVED_SYN_REFUSED = DERIVED + CAUSE_OTHER,
};
const enum derived_reason derived_reasons __attribute__((unused)); /* or the BTF would not have it */

struct drop {
	struct event event MAY_LACK("netns");
	__u64 location WIDTH(24) KIND("function") UNKNOWN_IS("zero")
	DOC("kernel function that discarded it, and the offset in it");
	__u32 reason WIDTH(19) NAMED_BY("skb_drop_reason", "SKB_DROP_REASON_") AND_BY("qdisc_drop_reason", "")
		SUBSYSTEMS("skb_drop_reason_subsys", "SKB_DROP_REASON_SUBSYS_") DERIVED_BY("derived_reason")
			UNKNOWN_IS("max")
			DOC("why, in the kernel's words, since Linux 5.17; DERIVED: the kernel gives no reason");
	__u32 packet_bytes TITLE("LEN") WIDTH(5) UNIT("bytes") UNKNOWN_IS("zero") DOC("length of the IP packet");
	__u16 flags KIND("tcp_flags") WIDTH(7) UNKNOWN_IS("max") DOC("TCP flags");
	enum discard_kind kind UNKNOWN_IS("zero")
	DOC("LOST; REFUSED by a listener, or by a port without one; HARMLESS");
	enum counter counter UNKNOWN_IS("zero") WIDTH(23) DOC("SNMP counter in which the kernel counted it");
	enum tcp_state state UNKNOWN_IS("zero") DOC("state of the socket");
	enum passage direction TITLE("DIR") UNKNOWN_IS("zero") DOC("RECEIVED, also to be forwarded; SENT by this host");
	__u8 padding[2];
	char device[16] KIND("comm") WIDTH(8) UNKNOWN_IS("zero") DOC("network device");
	__u64 stack[STACK_DEPTH] KIND("stack") NOT_COUNTED UNKNOWN_IS("zero") DOC("kernel stack, innermost first");
};
const struct drop *drop_anchor __attribute__((unused));
_Static_assert(offsetof(struct drop, stack) == COUNTED_BYTES(0), "the room of an event that is only counted");

/* What else decides about a packet that is discarded for a reason. */
enum rule {
	RULE_NONE,
	RULE_RECEIVER,  /* the receiver, or the place in the kernel: the reason says nothing */
	RULE_NO_SOCKET, /* the flags */
	RULE_OVERFLOW,  /* the accept queue */
	RULE_STATE,     /* not counted so in SYN_SENT */
	RULE_ORDER,     /* whether it is the next segment */
	RULE_NOT_RST,   /* not counted so of a RST */
};

struct fact {
	__u8 kind;
	__u8 counter;
	__u8 rule;
	__u8 no_device; /* the packet was in a queue of the socket: skb->dev was overwritten */
	__u8 of_tcp;    /* no other packet is discarded for this reason */
};

/* A function of the kernel, by address, where a discard without a reason is harmless. */
struct place {
	__u64 begin, end;
	__u8 only; /* enum only */
	__u8 padding[7];
};

/* Of which packets. */
enum only { ONLY_ANY, ONLY_RECEIVED, ONLY_AFTER_FIN };

enum wanted_reasons { REASONS_ALL, REASONS_ONLY, REASONS_WITHOUT };

const volatile bool send_stacks;
const volatile bool want_harmless;
const volatile bool want_packet;         /* its headers, or the socket: a flood that is only counted may do without */
const volatile bool want_owner;          /* owner, namespace or device: a flood that is only counted may do without */
const volatile bool overflow_has_reason; /* "tcp: add four drop reasons to tcp_check_req()" (6.15) */
const volatile __u32 wanted_reasons;     /* enum wanted_reasons */
const volatile struct fact facts[2][REASONS]; /* of IPv4, IPv6 */
const volatile struct place places[PLACES];

/* Those that --reason names. User space fills it before it attaches a program. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u8);
} reasons SEC(".maps");

/*
 * Before 6.15 kfree_skb does not tell apart what a listener does with a packet, and before 6.11 not who was to receive it.
 * Since 7.1 a queue discipline tells its reason just before. So what knows leaves a note, which is for the next discard of that
 * packet on this CPU. Softirqs do not nest, and a queue discipline runs with softirqs off. A connection takes most packets, and
 * another one may get the address of such a packet: so both ends must be those of the connection. A softirq may interrupt a
 * process that handles a connection's packet, and leave a note of its own: then the receiver is not known.
 */
struct note {
	struct sk_buff *skb;
	struct sock *sk;
	__u32 reason;    /* of a queue discipline */
	bool deferred;   /* TCP_DEFER_ACCEPT */
	bool in_window;  /* of the request */
	bool connection; /* it handles the packet */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct note);
} notes SEC(".maps");

static __always_inline void note(const struct note *new)
{
	__u32 zero = 0;
	struct note *mine = bpf_map_lookup_elem(&notes, &zero);

	if (mine)
		*mine = *new;
}

/* A discarded packet, and what is known about it. */
struct discard {
	struct packet packet;
	struct identity id;
	struct sock *sk; /* whose it is; NULL: not known */
	__u32 reason;
	enum tcp_state state;
	enum passage direction;
	enum discard_kind kind;
	enum counter counter;
	bool noted, deferred, in_window;
};

static __always_inline bool reason_wanted(__u32 reason)
{
	return wanted_reasons == REASONS_ALL ||
	       !bpf_map_lookup_elem(&reasons, &reason) == (wanted_reasons == REASONS_WITHOUT);
}

/* A reason of a subsystem has the subsystem's number in its upper half. Without reasons it is -1. */
static __always_inline struct fact fact_of(__u32 reason, bool ipv6)
{
	const volatile struct fact *fact;

	if (reason == (__u32)-1)
		reason = 0;
	if (reason >= REASONS)
		return (struct fact){.kind = KIND_LOST};
	fact = &facts[ipv6][reason];
	return (struct fact){fact->kind, fact->counter, fact->rule, fact->no_device, fact->of_tcp};
}

/* Then nobody has to look at the packet. */
static __always_inline bool says_all(const struct fact *fact)
{
	return !want_packet && fact->of_tcp && !fact->rule;
}

/* tcp_rcv_state_process() takes an ACK that follows the peer's FIN, and then discards it as any other. */
static __always_inline bool is_after_fin(const struct discard *discard)
{
	return (discard->packet.flags & (TCP_ACK | TCP_SYN)) == TCP_ACK &&
	       (!discard->state || discard->state == STATE_CLOSE_WAIT || discard->state == STATE_LAST_ACK ||
		discard->state == STATE_CLOSING);
}

static __always_inline bool in_harmless_place(const struct discard *discard, __u64 location)
{
	for (int i = 0; i < PLACES && places[i].end; i++)
		if (location >= places[i].begin && location < places[i].end)
			return places[i].only == ONLY_RECEIVED    ? discard->direction != DIRECTION_SENT
			       : places[i].only == ONLY_AFTER_FIN ? is_after_fin(discard)
								  : true;
	return false;
}

/* The kernel refuses a final ACK because the accept queue is full, or because it cannot make the child. */
static __always_inline void refused_by_listener(struct discard *discard)
{
	struct sock *sk = discard->sk; /* outside of BPF_CORE_READ, which would look for our struct in the kernel */
	bool full = BPF_CORE_READ(sk, sk_ack_backlog) > BPF_CORE_READ(sk, sk_max_ack_backlog);

	discard->kind = KIND_REFUSED;
	discard->counter = full ? COUNTER_TcpExtListenOverflows : COUNTER_TcpExtListenDrops;
}

/* A packet for a listener that is discarded without a reason: tcp_check_req(), tcp_v4_do_rcv(), tcp_v6_do_rcv(). */
static __always_inline void judge_at_listener(struct discard *discard)
{
	struct inet_connection_sock *listener = (struct inet_connection_sock *)discard->sk;
	const struct packet *packet = &discard->packet;
	bool deferred = discard->deferred;

	if (packet->flags == NO_FLAGS)
		return;
	if (packet->flags & (TCP_SYN | TCP_RST)) {
		discard->kind = KIND_HARMLESS; /* a SYN that is answered once more; a peer that gives up */
		return;
	}
	if (overflow_has_reason)
		deferred = !packet->data && !(packet->flags & TCP_FIN) &&
			   BPF_CORE_READ(listener, icsk_accept_queue.rskq_defer_accept);
	if (deferred) {
		discard->kind = KIND_HARMLESS;
		discard->counter = COUNTER_TcpExtTCPDeferAcceptDrop;
	} else if (!(packet->flags & TCP_ACK) || (discard->noted && !discard->in_window)) {
		discard->kind = KIND_LOST;
	} else if (discard->noted && !overflow_has_reason) {
		refused_by_listener(discard);
	} else {
		discard->kind = KIND_REFUSED;
	}
}

static __always_inline void judge_without_reason(struct discard *discard, __u64 location)
{
	if (discard->state == STATE_TIME_WAIT || in_harmless_place(discard, location))
		discard->kind = KIND_HARMLESS;
	else if (discard->state == STATE_LISTEN)
		judge_at_listener(discard);
	else if (discard->direction == DIRECTION_SENT)
		discard->kind = KIND_LOST;
}

/* A SYN to a port without a listener is refused. A RST for a connection that is gone needs no answer. */
static __always_inline void judge_no_socket(struct discard *discard)
{
	__u16 flags = discard->packet.flags;

	if (flags == NO_FLAGS)
		return;
	discard->kind = flags & TCP_RST                                                              ? KIND_HARMLESS
			: discard->state == STATE_LISTEN || (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN ? KIND_REFUSED
												     : KIND_LOST;
}

/* tcp_data_queue() counts the next segment in one counter, tcp_data_queue_ofo() a later one in the other. */
static __always_inline enum counter counter_by_order(const struct discard *discard)
{
	const struct tcp_sock *tcp = (const struct tcp_sock *)discard->sk;

	if (!discard->sk || !discard->state || discard->packet.flags == NO_FLAGS)
		return COUNTER_NONE;
	return (__s32)(discard->packet.seq - BPF_CORE_READ(tcp, rcv_nxt)) > 0 ? COUNTER_TcpExtTCPOFODrop
									      : COUNTER_TcpExtTCPRcvQDrop;
}

static __noinline int judge(struct discard *discard, __u32 rule, __u64 location)
{
	switch (rule) {
	case RULE_RECEIVER:
		judge_without_reason(discard, location);
		break;
	case RULE_NO_SOCKET:
		judge_no_socket(discard);
		break;
	case RULE_OVERFLOW:
		if (discard->state == STATE_LISTEN)
			refused_by_listener(discard);
		break;
	case RULE_STATE:
		if (!discard->state || discard->state == STATE_SYN_SENT)
			discard->counter = COUNTER_NONE;
		break;
	case RULE_ORDER:
		discard->counter = counter_by_order(discard);
		break;
	case RULE_NOT_RST:
		if (discard->packet.flags & TCP_RST) /* or it is not known */
			discard->counter = COUNTER_NONE;
		break;
	}
	return 0;
}

/* Of a segment that came too early and waited: is it in another one that has come meanwhile, or was there no room for it? */
static __always_inline enum discard_kind kind_of_early(struct sock *sk, const struct tcp_skb_cb *segment)
{
	__s32 ahead = BPF_CORE_READ(segment, end_seq) - BPF_CORE_READ((struct tcp_sock *)sk, rcv_nxt);

	return ahead > 0 ? KIND_LOST : KIND_HARMLESS;
}

/* Of a segment in the window: what tcp_ack() or tcp_rcv_state_process() has against it. */
static __always_inline enum discard_kind kind_in_window(const struct discard *discard, const struct tcp_skb_cb *segment)
{
	struct tcp_sock *tcp = (struct tcp_sock *)discard->sk;
	bool closing = discard->state == STATE_CLOSE_WAIT || discard->state == STATE_LAST_ACK ||
		       discard->state == STATE_CLOSING;

	if (discard->packet.flags & TCP_RST)
		return KIND_HARMLESS;
	if (!(discard->packet.flags & TCP_ACK))
		return KIND_LOST;
	if (closing && BPF_CORE_READ(segment, seq) == BPF_CORE_READ(segment, end_seq))
		return KIND_HARMLESS; /* a bare ACK: tcp_ack() has handled it */
	return discard->state != STATE_ESTABLISHED && is_synchronized(discard->state) &&
			       (__s32)(BPF_CORE_READ(segment, ack_seq) - BPF_CORE_READ(tcp, snd_una)) < 0
		       ? KIND_HARMLESS
		       : KIND_LOST;
}

/*
 * What a socket has discarded without a tracepoint. False if that is not certain: another CPU may have discarded another packet
 * for this socket meanwhile, and this one could be taken.
 */
static __noinline bool judge_handled(struct discard *discard, struct handled *handled, struct sk_buff *skb)
{
	const struct tcp_skb_cb *segment = (struct tcp_skb_cb *)__builtin_preserve_access_index(&skb->cb);
	struct sock *sk = handled->sk;
	__u32 grown = handled->grown;
	bool early = skb != handled->skb;
	enum window where = is_synchronized(handled->state) ? window_of(sk, segment) : WINDOW_IN;

	if (grown < WATCHED) {
		discard->kind = watched[grown].kind;
		discard->counter = watched[grown].counter;
	} else if ((early || where == WINDOW_IN) && handled->of_process && backlog_is_full(sk)) {
		return false;
	} else if (early) {
		discard->kind = kind_of_early(sk, segment);
	} else if (handled->state != discard->state) {
		discard->kind = KIND_HARMLESS; /* it has changed the state */
	} else {
		discard->kind = where == WINDOW_BEFORE   ? KIND_HARMLESS
				: where == WINDOW_BEYOND ? KIND_LOST
							 : kind_in_window(discard, segment);
	}
	return true;
}

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

static __always_inline void ends_read(const struct packet *packet, bool out, struct identity *id)
{
	id->family = packet->family;
	id->lport = out ? packet->sport : packet->dport;
	id->rport = out ? packet->dport : packet->sport;
	__builtin_memcpy(id->laddr, out ? packet->saddr : packet->daddr, 16);
	__builtin_memcpy(id->raddr, out ? packet->daddr : packet->saddr, 16);
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

static __always_inline int discard_send(void *ctx, const struct discard *discard, __u64 location,
					struct net_device *device)
{
	__u8 room[COUNTED_BYTES(0)] __attribute__((aligned(8)));
	struct drop *event;

	event = event_begin_in(room, sizeof(*event), IS_GROUPING ? 0 : bpf_ktime_get_ns(), &discard->id,
			       want_owner ? owner_of(discard) : NULL);
	if (!event)
		return 0;
	event->location = location;
	event->reason = discard->reason;
	event->packet_bytes = discard->packet.bytes;
	event->flags = discard->packet.flags;
	event->kind = discard->kind;
	event->counter = discard->counter;
	event->state = discard->state;
	event->direction = discard->direction;
	__builtin_memset(event->padding, 0, sizeof(event->padding));
	__builtin_memset(event->device, 0, sizeof(event->device));
	if (device)
		BPF_CORE_READ_STR_INTO(&event->device, device, name);
	if (!IS_GROUPING) {
		__builtin_memset(event->stack, 0, sizeof(event->stack));
		if (send_stacks)
			bpf_get_stack(ctx, event->stack, sizeof(event->stack), 0);
	}
	return event_submit(event);
}

/* Is it a full socket? Others get no cookie. */
static __always_inline bool is_full(struct sock *sk)
{
	__u8 state = sk->__sk_common.skc_state;

	return state != STATE_TIME_WAIT && state != STATE_NEW_SYN_RECV;
}

/*
 * `receiver` is the socket that was to receive the packet, or NULL; `cookie` is its, or that of skb->sk: who sent the packet, or
 * in whose queue it was. `handled`: the receiver has discarded it without a reason.
 */
static __always_inline int discarded(void *ctx, struct sk_buff *skb, __u64 location, __u32 reason,
				     struct sock *receiver, __u64 cookie, const struct note *note,
				     struct handled *handled)
{
	__u16 protocol = skb->protocol;
	struct fact fact = fact_of(reason, protocol == bpf_htons(ETH_P_IPV6));
	struct discard discard = {.reason = reason, .kind = fact.kind, .counter = fact.counter};
	struct net_device *device = NULL;
	struct sock *owner = skb->sk;

	if (!reason_wanted(reason) || (fact.kind == KIND_HARMLESS && !want_harmless))
		return 0;
	if (says_all(&fact))
		discard.packet.flags = NO_FLAGS;
	else if (protocol == bpf_htons(ETH_P_IP) || protocol == bpf_htons(ETH_P_IPV6)) {
		enum of_tcp answer = packet_read(skb, &discard.packet);

		if (answer == OF_TCP_UNKNOWN && (!filter.family || filter.family == 6))
			COUNT(missed);
		if (answer != OF_TCP)
			return 0;
	} else if (protocol || !owner || owner->sk_protocol != IPPROTO_TCP) {
		return 0;
	} else {
		discard.packet.flags = NO_FLAGS;
	}
	if (note && note->connection && !is_for(receiver, &discard.packet))
		receiver = NULL;
	discard.direction = skb->skb_iif || receiver ? DIRECTION_RECEIVED : owner ? DIRECTION_SENT : DIRECTION_UNKNOWN;
	if (note) {
		discard.noted = true;
		discard.deferred = note->deferred;
		discard.in_window = note->in_window;
	}
	if (owner && !receiver && sent_elsewhere(skb, &fact, owner))
		owner = NULL;
	if (!says_all(&fact))
		identify(&discard, receiver, owner);
	if (handled)
		handled_look(handled);
	if (!handled) {
		if (fact.rule)
			judge(&discard, fact.rule, location);
	} else if (!judge_handled(&discard, handled, skb)) {
		COUNT(missed);
		return 0;
	}
	if (discard.kind == KIND_HARMLESS && !want_harmless)
		return 0;
	if (want_owner) {
		device = handled ? NULL : device_of(skb, &fact);
		discard.id.netns = netns_of(skb, receiver ?: owner, device);
		discard.id.cookie = discard.sk ? cookie : 0;
	}
	return discard_send(ctx, &discard, location, device);
}

static __always_inline enum counter counter_of_refusal(int cause)
{
	return cause == CAUSE_ACCEPT_QUEUE_FULL ? COUNTER_TcpExtListenOverflows
	       : cause == CAUSE_SYN_QUEUE_FULL  ? COUNTER_TcpExtTCPReqQFullDrop
						: COUNTER_TcpExtListenDrops;
}

/*
 * A listener refuses a SYN: the kernel counts it, and consumes the packet as one that is answered. kfree_skb shows a final ACK that
 * is refused. A cookie is an answer, and so is the SYN-ACK that follows if TCP Fast Open fails.
 */
static __noinline int refusal(void *ctx, struct sk_buff *skb, int step, int cause)
{
	struct discard discard = {
		.reason = DERIVED + cause,
		.kind = KIND_REFUSED,
		.counter = counter_of_refusal(cause),
		.state = STATE_LISTEN,
		.direction = DIRECTION_RECEIVED,
	};
	__u32 zero = 0;
	struct in_hand *hand = bpf_map_lookup_elem(&in_hand, &zero);

	if (!hand || step != STEP_SYN || cause == CAUSE_COOKIE_SENT || hand->fast_open ||
	    !reason_wanted(discard.reason))
		return 0;
	if (packet_read(skb, &discard.packet) != OF_TCP) {
		COUNT(missed);
		return 0;
	}
	ends_read(&discard.packet, false, &discard.id);
	discard.sk = hand->unnamed ? NULL : hand->sk;
	if (want_owner) {
		discard.id.netns = netns_of(skb, hand->sk, NULL);
		discard.id.cookie = discard.sk ? cookie_if_any(discard.sk) : 0;
	}
	return discard_send(ctx, &discard, 0, NULL);
}

/* Only `queue` counts at each of them. */
static __always_inline void refused_perhaps(struct sock *sk, __u64 cause)
{
}

#define WITHOUT_REFUSALS "SYNs that a listener refuses"

UNLESS("syn_exit__consume")
OPTIONAL(WITHOUT_REFUSALS)
SEC("fentry/tcp_conn_request")
int FUNCTION_PROG(syn_enter__fentry, void *rsk_ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	handshake_enter(FUNCTION_SYN, sk, skb, NULL);
	return 0;
}

OPTIONAL(WITHOUT_REFUSALS)
SEC("fexit/tcp_conn_request")
int FUNCTION_PROG(syn_exit__fexit, void *rsk_ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	int cause = handshake_cause(FUNCTION_SYN);

	if (!cause)
		return 0;
	COOKIE_OF(sk);
	return refusal(ctx, skb, STEP_SYN, cause);
}

#include "refused.bpf.h"

/*
 * By tracepoints alone: a listener discards a packet. If it has refused a final ACK, the counters have grown by that, and the next
 * SYN is not to be taken for refused. The program is no second one at kfree_skb, which a flood passes.
 */
static __noinline int discarded_at_listener(struct sock *listener)
{
	struct net *net = BPF_CORE_READ(listener, __sk_common.skc_net.net);
	__u64 cookie = BPF_CORE_READ(net, net_cookie), drops;
	__u32 zero = 0;
	struct in_hand *mine = bpf_map_lookup_elem(&in_hand, &zero);
	struct look *last = bpf_map_lookup_elem(&looks, &cookie);
	bool begun;

	listening_explain(listener);
	if (!mine || !last)
		return 0;
	drops = last->mib.drops;
	begun = last->begun;
	look_read(net, cpu_offset(&in_hand, mine), last);
	if (begun)
		count_missed(last->mib.drops - drops);
	return 0;
}

const volatile bool hooked_begins;

static __always_inline bool is_listener(struct sock *sk)
{
	return hooked_begins && sk && BPF_CORE_READ(sk, __sk_common.skc_state) == STATE_LISTEN;
}

struct Qdisc;
struct netdev_queue;

const volatile bool hooked_queued;

/* What the queue discipline has said of it, or the kernel's reason. */
static __always_inline __u32 detailed(struct sk_buff *skb, __u32 reason)
{
	__u32 zero = 0;
	struct note *note = hooked_queued ? bpf_map_lookup_elem(&notes, &zero) : NULL;

	if (!note || note->skb != skb)
		return reason;
	note->skb = NULL;
	return note->reason;
}

SEC("tp_btf/kfree_skb")
NEEDS("SKB_DROP_REASON_TCP_LISTEN_OVERFLOW")
int TRACEPOINT_PROG(drop__reason, struct sk_buff *skb, void *location, __u32 reason, struct sock *receiver)
{
	struct sock *owner = skb->sk;
	__u64 cookie = 0;

	if (is_listener(receiver))
		discarded_at_listener(receiver);
	if (!receiver)
		cookie = owner ? cookie_if_any(owner) : 0;
	else if (is_full(receiver))
		cookie = COOKIE_OF(receiver);
	return discarded(ctx, skb, (__u64)location, detailed(skb, reason), receiver, cookie, NULL, NULL);
}

OPTIONAL("")
SEC("tp_btf/qdisc_drop")
int TRACEPOINT_PROG(queued, struct Qdisc *qdisc, struct netdev_queue *queue, struct net_device *device,
		    struct sk_buff *skb, __u32 reason)
{
	note(&(struct note){.skb = skb, .reason = reason});
	return 0;
}

/* `receiver`, unless a note tells another one. `handled`, if its socket has discarded the packet. */
static __always_inline int discarded_with_note(void *ctx, struct sk_buff *skb, __u64 location, __u32 reason,
					       struct sock *receiver, struct handled *handled)
{
	struct sock *owner = skb->sk;
	__u32 zero = 0;
	struct note *note = bpf_map_lookup_elem(&notes, &zero);

	if (note && note->skb == skb) {
		note->skb = NULL;
		receiver = note->sk;
	} else {
		note = NULL;
	}
	return discarded(ctx, skb, location, reason, receiver,
			 receiver ? cookie_if_any(receiver)
			 : owner  ? cookie_if_any(owner)
				  : 0,
			 note, handled);
}

SEC("tp_btf/kfree_skb")
NEEDS("sk_skb_reason_drop")
int TRACEPOINT_PROG(drop__receiver, struct sk_buff *skb, void *location)
{
	struct sock *receiver = DROP_RECEIVER(ctx);

	if (is_listener(receiver))
		discarded_at_listener(receiver);
	return discarded_with_note(ctx, skb, (__u64)location, DROP_REASON(ctx), receiver, NULL);
}

/* The same before 6.11: without the receiver, unless a program has noted it. */
SEC("tp_btf/kfree_skb")
NEEDS("SKB_DROP_REASON_NOT_SPECIFIED")
int TRACEPOINT_PROG(drop__note, struct sk_buff *skb, void *location)
{
	return discarded_with_note(ctx, skb, (__u64)location, DROP_REASON(ctx), DROP_RECEIVER(ctx), NULL);
}

/* Without reasons (before 5.17). tcp_drop() calls kfree_skb() in some kernels, in others a function without a tracepoint. */
SEC("tp_btf/kfree_skb")
int TRACEPOINT_PROG(drop__handled, struct sk_buff *skb, void *location)
{
	struct handled *handled = handled_now();

	if (handled && !has_discarded(handled, skb))
		handled = NULL;
	return discarded_with_note(ctx, skb, (__u64)location, -1, handled ? handled->sk : NULL, handled);
}

#define WITHOUT_IT "what a connection discards itself: out of the window, no room in the receive buffer"
#define UNLESS_REASONS UNLESS("drop__reason drop__receiver drop__note")

/* The ends first, so that no packet is taken for handled still while the programs are attached one after the other. */
OPTIONAL(WITHOUT_IT)
UNLESS_REASONS
SEC("fexit/tcp_rcv_established")
int FUNCTION_PROG(established_end__fexit, struct sock *sk)
{
	return handled_end(sk);
}

OPTIONAL(WITHOUT_IT)
UNLESS_REASONS
SEC("fexit/tcp_rcv_state_process")
int FUNCTION_PROG(other_state_end__fexit, struct sock *sk)
{
	return handled_end(sk);
}

OPTIONAL(WITHOUT_IT)
UNLESS_REASONS
SEC("fentry/tcp_rcv_established")
int FUNCTION_PROG(established_begin__fentry, struct sock *sk, struct sk_buff *skb)
{
	return handled_begin(sk, skb);
}

OPTIONAL(WITHOUT_IT)
UNLESS_REASONS
SEC("fentry/tcp_rcv_state_process")
int FUNCTION_PROG(other_state_begin__fentry, struct sock *sk, struct sk_buff *skb)
{
	return handled_begin(sk, skb);
}

OPTIONAL(WITHOUT_IT)
UNLESS_REASONS
SEC("fentry/__kfree_skb")
int FUNCTION_PROG(freed__fentry, struct sk_buff *skb)
{
	struct handled *handled = handled_now();

	if (!handled || !has_discarded(handled, skb))
		return 0;
	bpf_get_stack(ctx, handled->frames, sizeof(handled->frames), 0);
	return discarded(ctx, skb, handled->frames[CALLER], -1, handled->sk, cookie_if_any(handled->sk), NULL, handled);
}

#define UNLESS_RECEIVER UNLESS("drop__reason drop__receiver drop__handled")

/* A listener's packets are noted by tcp_check_req(). */
static __always_inline int note_connection(struct sock *sk, struct sk_buff *skb)
{
	if (sk->__sk_common.skc_state != STATE_LISTEN)
		note(&(struct note){.skb = skb, .sk = sk, .connection = true});
	return 0;
}

OPTIONAL("from 5.17 to 6.10: whose a packet is that a connection discards")
UNLESS_RECEIVER
SEC("fentry/tcp_rcv_established")
int FUNCTION_PROG(established__fentry, struct sock *sk, struct sk_buff *skb)
{
	return note_connection(sk, skb);
}

OPTIONAL("from 5.17 to 6.10: whose a packet is that a connection discards")
UNLESS_RECEIVER
SEC("fentry/tcp_rcv_state_process")
int FUNCTION_PROG(other_state__fentry, struct sock *sk, struct sk_buff *skb)
{
	return note_connection(sk, skb);
}

OPTIONAL("before 6.15: what happens to packets in TIME_WAIT")
UNLESS("drop__reason")
SEC("fentry/tcp_timewait_state_process")
int FUNCTION_PROG(timewait__fentry, struct sock *sk, struct sk_buff *skb)
{
	note(&(struct note){.skb = skb, .sk = sk});
	return 0;
}

/* Does it begin in the window of the request? What the peer sends first comes with the final ACK, or follows it. */
static __always_inline bool in_window(const struct packet *packet, struct request_sock *req)
{
	struct tcp_request_sock *request = (struct tcp_request_sock *)req;

	return packet->seq - BPF_CORE_READ(request, rcv_nxt) <= BPF_CORE_READ(req, __req_common.skc_rcv_wnd);
}

/*
 * `child` is NULL if the packet is discarded, or if another processor has just made the child. Then the packet goes to the
 * child, and the note waits in vain. The function has five arguments where this program is attached.
 */
OPTIONAL("before 6.15: what a listener does with the packets of a handshake")
UNLESS("drop__reason")
SEC("fexit/tcp_check_req")
int FUNCTION_PROG(request__fexit, struct sock *sk, struct sk_buff *skb, struct request_sock *req, bool fastopen,
		  bool *stolen, struct sock *child)
{
	struct inet_connection_sock *listener = (struct inet_connection_sock *)sk;
	struct packet packet = {};
	struct note new = {.skb = skb, .sk = sk};

	if (child || packet_read(skb, &packet) != OF_TCP)
		return 0;
	new.deferred = !packet.data && !(packet.flags & TCP_FIN) &&
		       BPF_CORE_READ_BITFIELD_PROBED(req, num_timeout) <
			       BPF_CORE_READ(listener, icsk_accept_queue.rskq_defer_accept);
	new.in_window = in_window(&packet, req);
	note(&new);
	return 0;
}
