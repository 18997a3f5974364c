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
#include "window.bpf.h"

#define BULK 1024     /* packets that leave a queue discipline at once */
#define BULK_TURNS 16 /* the same before 5.17 */
#define MORE_TURNS 64 /* and behind them: these are only counted */

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

#include "trace_tables.bpf.h"
#include "trace_hops.bpf.h"
#include "trace_flows.bpf.h"
#include "trace_followed.bpf.h"
#include "trace_sent.bpf.h"
#include "trace_received.bpf.h"

/* Does the packet have to be cut (GSO)? */
static __always_inline bool is_large(struct sk_buff *skb)
{
	struct skb_shared_info *shared = (struct skb_shared_info *)(skb->head + skb->end);

	return BPF_CORE_READ(shared, gso_size);
}

/* Some drivers free what they have sent as if they discarded it: vmxnet3, by dev_kfree_skb_any(). */
static __always_inline bool is_sent(const struct piece *piece, __u32 reason)
{
	__u32 none = -1; /* before 5.17 there are no reasons */

	if (bpf_core_enum_value_exists(enum skb_drop_reason, SKB_DROP_REASON_NOT_SPECIFIED))
		none = bpf_core_enum_value(enum skb_drop_reason, SKB_DROP_REASON_NOT_SPECIFIED);
	return reason == none && piece->direction == WAY_SENT && piece->hop == HOP_XMIT && !piece->hidden;
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
	if (hop == HOP_DROPPED && is_sent(&followed->piece, reason)) {
		hop = HOP_CONSUMED;
		reason = -1;
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
