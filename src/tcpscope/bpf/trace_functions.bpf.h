/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The hops of `trace` at functions, where the kernel lets programs hook them.
 *
 * A packet that no tracepoint would follow is not followed here either, but for one that TCP sends: that begins at TRANSMIT, before it
 * has an IP header. The other hops here are at the side of those at tracepoints (piece.side): what may follow a hop is decided by
 * tracepoints alone, so a kernel with these hops and one without follow the same packets.
 *
 * Functions that a process may call with softirqs on have two copies (recursion.bpf.h). The others run in softirqs, or with softirqs
 * off.
 */
#ifndef TCPSCOPE_TRACE_FUNCTIONS_BPF_H
#define TCPSCOPE_TRACE_FUNCTIONS_BPF_H

#define WITHOUT_FUNCTIONS "where packets are between TCP and the devices: in IP, netfilter and the socket's backlog"

#define WITHOUT_CHAINS "which chain of nf_tables discards a packet"

#define FUNCTIONS 32 /* of --functions */

/* Values of `where`, which trace.py names. */
enum { WHERE_INET = 1, WHERE_NETDEV = 6, WHERE_BRIDGE = 8, WHERE_FUNCTION = 32 };

const volatile __u8 function_argument[FUNCTIONS]; /* which argument of the function is the skb */
const volatile bool hooked_accepted;

#define FIRST_BYTE (1ULL << 32) /* of the first write that was seen; those before it have positions, too */

/* A call of a process that writes. Positions of bytes, as DEPTH writes may be more than sequence numbers can order. */
struct write {
	__u64 began_ns;
	__u64 begin, end; /* its bytes; until it ends, 0 */
	__u64 thread;     /* its number; 0: it has ended */
};

/*
 * The last DEPTH writes of each connection, by their number. Inserted by tcp_sendmsg_locked(). Never deleted: a later one takes
 * the place of an older one, and the entry that was not used for the longest time gives way.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct place);
	__type(value, struct write);
} writes SEC(".maps");

static __always_inline struct write *write_find(struct sock *sk, __u32 number)
{
	struct place place = {.sk = (__u64)sk, .index = number & (DEPTH - 1)};

	return bpf_map_lookup_elem(&writes, &place);
}

/* A process is about to write. It holds the lock of the socket. */
static __noinline int write_begin(struct sock *sk)
{
	__u32 seq = BPF_CORE_READ((struct tcp_sock *)sk, write_seq);
	struct place place = {.sk = (__u64)sk};
	struct write new = {};
	struct flow *flow;

	if (!is_connection(sk))
		return 0;
	flow = flow_of(sk);
	if (!flow)
		return 0;
	new.began_ns = bpf_ktime_get_ns();
	new.thread = bpf_get_current_pid_tgid();
	flow->written = flow->writes ? flow->written + (seq - flow->written_seq) : FIRST_BYTE;
	flow->written_seq = seq;
	new.begin = flow->written;
	place.index = flow->writes++ & (DEPTH - 1);
	bpf_map_update_elem(&writes, &place, &new, BPF_ANY);
	return 0;
}

/* The bytes of a write that waited for room while another thread has written are nobody's: which these are is not known. */
static __noinline int write_end(struct sock *sk)
{
	__u32 seq = BPF_CORE_READ((struct tcp_sock *)sk, write_seq);
	struct flow *flow = flow_find(sk);
	struct write *write;

	if (!flow || !flow->writes)
		return 0;
	write = write_find(sk, flow->writes - 1);
	if (!write || write->thread != bpf_get_current_pid_tgid())
		return 0;
	write->end = flow->written + (seq - flow->written_seq);
	write->thread = 0;
	return 0;
}

/* When the write began that has this byte; 0: not known. The writes ascend. */
static __noinline __u64 write_of(struct flow *flow, struct sock *sk, __u32 seq)
{
	__u32 upto = flow->writes, from = upto > DEPTH ? upto - DEPTH : 0;
	__u64 began_ns = 0, at = flow->written + (__s32)(seq - flow->written_seq);

	for (int i = 0; i < 10 && from < upto; i++) { /* 2^10 > DEPTH */
		__u32 middle = from + (upto - from) / 2;
		struct write *write = write_find(sk, middle);

		if (!write)
			return 0;
		if (write->begin > at) {
			upto = middle;
		} else {
			began_ns = write->end && write->end <= at ? 0 : write->began_ns;
			from = middle + 1;
		}
	}
	return began_ns;
}

/* TCP gives a packet of a connection to IP. Bytes that are sent again were written long ago. */
static __noinline int transmitted(struct sock *sk, struct sk_buff *skb)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct followed *followed;
	struct packet packet = {};
	struct flow *flow;
	struct at at;

	if (sk->sk_protocol != IPPROTO_TCP || !is_connection(sk))
		return 0;
	flow = flow_of(sk);
	if (!flow || !transport_read(skb, &packet))
		return 0;
	followed = followed_add(skb, &packet, WAY_SENT, 0);
	if (!followed)
		return 0;
	followed->id = flow->id;
	followed->id.cookie = cookie_if_any(sk);
	followed->sk = followed->owned = (__u64)sk;
	followed->piece.bytes = 0; /* it has no IP header */
	at = at_hop(HOP_WRITE);
	at.sk = sk;
	if (packet.data && !is_after(BPF_CORE_READ(tcp, snd_nxt), packet.seq)) {
		__u64 now_ns = at.now_ns;

		at.now_ns = write_of(flow, sk, packet.seq);
		if (at.now_ns)
			hop_pass(followed, &at);
		at.now_ns = now_ns;
	}
	at.hop = HOP_TRANSMIT;
	return hop_pass(followed, &at);
}

/* For both copies: the kernel may run the one first that was attached last. */
static __always_inline bool was_transmitted(struct sk_buff *skb)
{
	struct followed *followed = followed_find(skb);

	return followed && followed->piece.hop == HOP_TRANSMIT && is_still(skb, followed) > 0;
}

/* A hop at the side. One comparison for a packet that is not followed. */
static __noinline int side_pass(struct sk_buff *skb, enum hop hop, __u8 where, bool twice)
{
	struct followed *followed = followed_find(skb);
	struct at at;

	if (!followed || (!twice && followed->piece.side == hop && followed->piece.where == where) ||
	    is_still(skb, followed) <= 0)
		return 0;
	at = at_hop(hop);
	at.sk = (struct sock *)followed->owned;
	at.where = where;
	hop_send(&followed->piece, &followed->id, &at);
	followed->piece.side = hop;
	followed->piece.where = where;
	followed->piece.last_ns = at.now_ns;
	return 0;
}

/* Which hook of netfilter; 0: none that has a name here. */
static __always_inline __u8 netfilter_hook(const struct nf_hook_state *state)
{
	__u8 family = READ_ANY_WIDTH(state, pf), hook = READ_ANY_WIDTH(state, hook);

	switch (family) {
	case NFPROTO_INET:
	case NFPROTO_IPV4:
	case NFPROTO_IPV6:
		return hook < 5 ? WHERE_INET + hook : 0;
	case NFPROTO_NETDEV:
		return hook < 2 ? WHERE_NETDEV + hook : 0;
	case NFPROTO_BRIDGE:
		return hook < 5 ? WHERE_BRIDGE + hook : 0;
	}
	return 0;
}

static __always_inline int netfilter_begin(struct sk_buff *skb, const struct nf_hook_state *state)
{
	struct followed *followed = followed_find(skb);

	if (!followed)
		return 0;
	followed->chain.name = 0;
	return side_pass(skb, HOP_NETFILTER, netfilter_hook(state), false);
}

/* Netfilter has let it pass, or kept it. If it was discarded before the next hop, another one did that. */
static __always_inline int netfilter_end(struct sk_buff *skb)
{
	struct followed *followed = followed_find(skb);

	if (followed && followed->piece.side == HOP_NETFILTER)
		followed->piece.where = 0;
	return 0;
}

/* Since "netfilter: make nftables drops visible in net dropmonitor" (6.7) a chain itself frees what it discards. */
static __always_inline int chain_begin(struct nft_pktinfo *pkt, void *priv)
{
	struct followed *followed = hooked_accepted && !ending ? followed_find(BPF_CORE_READ(pkt, skb)) : NULL;

	if (followed && followed->piece.side == HOP_NETFILTER)
		chain_read(priv, &followed->chain);
	return 0;
}

/*
 * What the chain has let pass, or given to a queue that it may do without (bypass), another one may discard. If the chain has stolen
 * the packet, the skb may be another packet's by now.
 */
static __always_inline int chain_end(struct nft_pktinfo *pkt, unsigned int verdict)
{
	unsigned int code = verdict & NF_VERDICT_MASK;
	struct followed *followed;

	if (code != NF_ACCEPT && !(code == NF_QUEUE && verdict & NF_VERDICT_FLAG_QUEUE_BYPASS))
		return 0;
	followed = followed_find(BPF_CORE_READ(pkt, skb));
	if (followed)
		followed->chain.name = 0;
	return 0;
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/tcp_sendmsg_locked")
int FUNCTION_PROG(write, struct sock *sk)
{
	return write_begin(sk);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fexit/tcp_sendmsg_locked")
int FUNCTION_PROG(written, struct sock *sk)
{
	return write_end(sk);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip_queue_xmit")
int FUNCTION_PROG(transmit4, struct sock *sk, struct sk_buff *skb)
{
	return was_transmitted(skb) ? 0 : transmitted(sk, skb);
}

AGAIN
SEC("fentry/ip_queue_xmit")
int FUNCTION_PROG(transmit4_again, struct sock *sk, struct sk_buff *skb)
{
	return flow_find(sk) && !was_transmitted(skb) ? transmitted(sk, skb) : 0;
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/inet6_csk_xmit")
int FUNCTION_PROG(transmit6, struct sock *sk, struct sk_buff *skb)
{
	return was_transmitted(skb) ? 0 : transmitted(sk, skb);
}

AGAIN
SEC("fentry/inet6_csk_xmit")
int FUNCTION_PROG(transmit6_again, struct sock *sk, struct sk_buff *skb)
{
	return flow_find(sk) && !was_transmitted(skb) ? transmitted(sk, skb) : 0;
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip_output")
int FUNCTION_PROG(ip_out4, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	return side_pass(skb, HOP_IP_OUT, 0, false);
}

AGAIN
SEC("fentry/ip_output")
int FUNCTION_PROG(ip_out4_again, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	return side_pass(skb, HOP_IP_OUT, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip6_output")
int FUNCTION_PROG(ip_out6, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	return side_pass(skb, HOP_IP_OUT, 0, false);
}

AGAIN
SEC("fentry/ip6_output")
int FUNCTION_PROG(ip_out6_again, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	return side_pass(skb, HOP_IP_OUT, 0, false);
}

/* Before netfilter, as programs are attached in their order. */
OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fexit/nf_hook_slow")
int FUNCTION_PROG(verdict, struct sk_buff *skb)
{
	return netfilter_end(skb);
}

AGAIN
SEC("fexit/nf_hook_slow")
int FUNCTION_PROG(verdict_again, struct sk_buff *skb)
{
	return netfilter_end(skb);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/nf_hook_slow")
int FUNCTION_PROG(netfilter, struct sk_buff *skb, const struct nf_hook_state *state)
{
	return netfilter_begin(skb, state);
}

AGAIN
SEC("fentry/nf_hook_slow")
int FUNCTION_PROG(netfilter_again, struct sk_buff *skb, const struct nf_hook_state *state)
{
	return netfilter_begin(skb, state);
}

/* Before chain: programs are attached in their order, and each packet whose chain is noted has to come back. */
OPTIONAL(WITHOUT_CHAINS)
IN_MODULE("nf_tables")
SEC("fexit/nft_do_chain")
int FUNCTION_PROG(accepted, struct nft_pktinfo *pkt, void *priv, unsigned int verdict)
{
	return chain_end(pkt, verdict);
}

AGAIN
IN_MODULE("nf_tables")
SEC("fexit/nft_do_chain")
int FUNCTION_PROG(accepted_again, struct nft_pktinfo *pkt, void *priv, unsigned int verdict)
{
	return chain_end(pkt, verdict);
}

OPTIONAL(WITHOUT_CHAINS)
IN_MODULE("nf_tables")
SEC("fentry/nft_do_chain")
int FUNCTION_PROG(chain, struct nft_pktinfo *pkt, void *priv)
{
	return chain_begin(pkt, priv);
}

AGAIN
IN_MODULE("nf_tables")
SEC("fentry/nft_do_chain")
int FUNCTION_PROG(chain_again, struct nft_pktinfo *pkt, void *priv)
{
	return chain_begin(pkt, priv);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip_rcv_core")
int FUNCTION_PROG(ip_in4, struct sk_buff *skb)
{
	return side_pass(skb, HOP_IP_IN, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip6_rcv_core")
int FUNCTION_PROG(ip_in6, struct sk_buff *skb)
{
	return side_pass(skb, HOP_IP_IN, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip_local_deliver")
int FUNCTION_PROG(deliver4, struct sk_buff *skb)
{
	return side_pass(skb, HOP_DELIVER, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip6_input")
int FUNCTION_PROG(deliver6, struct sk_buff *skb)
{
	return side_pass(skb, HOP_DELIVER, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip_forward")
int FUNCTION_PROG(forward4, struct sk_buff *skb)
{
	return side_pass(skb, HOP_FORWARD, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/ip6_forward")
int FUNCTION_PROG(forward6, struct sk_buff *skb)
{
	return side_pass(skb, HOP_FORWARD, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/tcp_v4_rcv")
int FUNCTION_PROG(tcp_in4, struct sk_buff *skb)
{
	return side_pass(skb, HOP_TCP_IN, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/tcp_v6_rcv")
int FUNCTION_PROG(tcp_in6, struct sk_buff *skb)
{
	return side_pass(skb, HOP_TCP_IN, 0, false);
}

OPTIONAL(WITHOUT_FUNCTIONS)
SEC("fentry/tcp_add_backlog")
int FUNCTION_PROG(backlog, struct sock *sk, struct sk_buff *skb)
{
	return side_pass(skb, HOP_BACKLOG, 0, false);
}

/* The verifier knows the constant, and so one argument: it refuses to load from a place that was computed. */
static __always_inline struct sk_buff *argument_of(unsigned long long *ctx, int number)
{
	switch (function_argument[number]) {
	case 0:
		return (struct sk_buff *)CTX_SLOT(ctx, 0);
	case 1:
		return (struct sk_buff *)CTX_SLOT(ctx, 1);
	case 2:
		return (struct sk_buff *)CTX_SLOT(ctx, 2);
	case 3:
		return (struct sk_buff *)CTX_SLOT(ctx, 3);
	case 4:
		return (struct sk_buff *)CTX_SLOT(ctx, 4);
	case 5:
		return (struct sk_buff *)CTX_SLOT(ctx, 5);
	}
	return NULL;
}

/* A function of --functions: user space says which one (Spec.aimed). A second copy of each would be loaded for a rare loss. */
#define FUNCTION_HOP(number)                                                                      \
	SEC("fentry")                                                                             \
	int function##number(unsigned long long *ctx)                                             \
	{                                                                                         \
		processor_keep(true);                                                             \
		side_pass(argument_of(ctx, number), HOP_FUNCTION, WHERE_FUNCTION + number, true); \
		processor_release(true);                                                          \
		return 0;                                                                         \
	}

FUNCTION_HOP(0)
FUNCTION_HOP(1)
FUNCTION_HOP(2)
FUNCTION_HOP(3)
FUNCTION_HOP(4)
FUNCTION_HOP(5)
FUNCTION_HOP(6)
FUNCTION_HOP(7)
FUNCTION_HOP(8)
FUNCTION_HOP(9)
FUNCTION_HOP(10)
FUNCTION_HOP(11)
FUNCTION_HOP(12)
FUNCTION_HOP(13)
FUNCTION_HOP(14)
FUNCTION_HOP(15)
FUNCTION_HOP(16)
FUNCTION_HOP(17)
FUNCTION_HOP(18)
FUNCTION_HOP(19)
FUNCTION_HOP(20)
FUNCTION_HOP(21)
FUNCTION_HOP(22)
FUNCTION_HOP(23)
FUNCTION_HOP(24)
FUNCTION_HOP(25)
FUNCTION_HOP(26)
FUNCTION_HOP(27)
FUNCTION_HOP(28)
FUNCTION_HOP(29)
FUNCTION_HOP(30)
FUNCTION_HOP(31)

#endif
