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

enum wanted_reasons { REASONS_ALL, REASONS_ONLY, REASONS_WITHOUT };

const volatile bool send_stacks;
const volatile bool want_harmless;
const volatile bool want_packet;         /* its headers, or the socket: a flood that is only counted may do without */
const volatile bool want_owner;          /* owner, namespace or device: a flood that is only counted may do without */
const volatile bool overflow_has_reason; /* "tcp: add four drop reasons to tcp_check_req()" (6.15) */
const volatile __u32 wanted_reasons;     /* enum wanted_reasons */

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

#include "drops_judge.bpf.h"
#include "drops_whose.bpf.h"

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
