/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Why the kernel sends a RST: from the segment that it answers, and from the state of the socket. */
#ifndef TCPSCOPE_RESETS_CAUSE_BPF_H
#define TCPSCOPE_RESETS_CAUSE_BPF_H

/* The header of TCP: include/uapi/linux/tcp.h */
#define HEADER_BYTES 20
#define LENGTH_AT 12
#define FLAGS_AT 13
#define FLAG_SYN 0x02
#define FLAG_RST 0x04
#define FLAG_ACK 0x10
#define OPTION_END 0
#define OPTION_NOP 1
#define OPTION_MPTCP 30
#define MPTCP_JOIN 1 /* its subtype, RFC 8684 */
#define MAX_OPTIONS 40

/* A segment that the kernel answers with a RST. Its destination is the local end. */
struct segment {
	struct net *net;
	struct dst_entry *dst;
	unsigned char *tcp; /* its header */
	__u8 flags;
	__u8 version;
};

static __always_inline void segment_read(struct sock *sk, struct sk_buff *skb, struct segment *segment,
					 struct identity *id)
{
	unsigned char *head = BPF_CORE_READ(skb, head);
	unsigned char *ip = head + BPF_CORE_READ(skb, network_header);
	unsigned char *tcp = head + BPF_CORE_READ(skb, transport_header);
	struct dst_entry *dst = (struct dst_entry *)(BPF_CORE_READ(skb, _skb_refdst) & ~SKB_DST_NOREF);
	struct net *net = sk ? BPF_CORE_READ(sk, __sk_common.skc_net.net) : BPF_CORE_READ(dst, dev, nd_net.net);
	__be16 ports[2] = {};
	__be32 v4[2] = {};
	__u8 version = 0;

	bpf_probe_read_kernel(&version, sizeof(version), ip);
	bpf_probe_read_kernel(ports, sizeof(ports), tcp);
	bpf_probe_read_kernel(&segment->flags, sizeof(segment->flags), tcp + FLAGS_AT);
	segment->version = version >> 4;
	segment->net = net;
	segment->dst = dst;
	segment->tcp = tcp;
	id->netns = BPF_CORE_READ(net, ns.inum);
	id->rport = bpf_ntohs(ports[0]);
	id->lport = bpf_ntohs(ports[1]);
	if (segment->version == 6) {
		id->family = 6;
		bpf_probe_read_kernel(id->raddr, sizeof(id->raddr), ip + 8);
		bpf_probe_read_kernel(id->laddr, sizeof(id->laddr), ip + 24);
	} else {
		id->family = 4;
		bpf_probe_read_kernel(v4, sizeof(v4), ip + 12);
		map_v4(id->raddr, v4[0]);
		map_v4(id->laddr, v4[1]);
	}
}

static __always_inline bool accept_queue_is_full(struct sock *sk)
{
	return BPF_CORE_READ(sk, sk_ack_backlog) > BPF_CORE_READ(sk, sk_max_ack_backlog);
}

/*
 * A listener answers the final ACK of a handshake if its accept queue is full and tcp_abort_on_overflow is set:
 * tcp_check_req(). It answers each other ACK that belongs to no handshake: tcp_rcv_state_process(). Since 6.10 the two have
 * different reasons.
 */
static __always_inline bool aborts_on_overflow(struct sock *sk, const struct segment *segment, __u8 reason)
{
	struct net *net = segment->net;
	struct netns_ipv4 *ipv4 = __builtin_preserve_access_index(&net->ipv4);

	if (segment->flags & FLAG_SYN || !READ_ANY_WIDTH(ipv4, sysctl_tcp_abort_on_overflow))
		return false;
	if (bpf_core_enum_value_exists(enum sk_rst_reason, SK_RST_REASON_INVALID_SYN) &&
	    reason != bpf_core_enum_value(enum sk_rst_reason, SK_RST_REASON_INVALID_SYN))
		return false;
	return accept_queue_is_full(sk);
}

/* Does the segment ask an MPTCP connection for a further subflow, or complete such a handshake? */
static __noinline bool joins(const unsigned char *tcp)
{
	__u8 length = 0, option[3] = {};
	int at = HEADER_BYTES;

	bpf_probe_read_kernel(&length, sizeof(length), tcp + LENGTH_AT);
	length = (length >> 4) * 4;
	for (int i = 0; i < MAX_OPTIONS && at + 2 < length; i++) {
		bpf_probe_read_kernel(option, sizeof(option), tcp + at);
		if (option[0] == OPTION_END || (option[0] != OPTION_NOP && option[1] < 2))
			return false;
		if (option[0] == OPTION_MPTCP && option[2] >> 4 == MPTCP_JOIN)
			return true;
		at += option[0] == OPTION_NOP ? 1 : option[1];
	}
	return false;
}

/*
 * Why the kernel answers a segment with a RST: tcp_v4_rcv(), tcp_timewait_state_process(), tcp_check_req(),
 * tcp_rcv_state_process(). `was` is the state before CLOSE, 0 if it is not known; `data`: tcp_reset() was called for it.
 */
static __always_inline enum cause cause_of_answer(struct sock *sk, const struct segment *segment, int state, int was,
						  bool data, __u8 reason)
{
	if (!sk)
		return (segment->flags & (FLAG_SYN | FLAG_ACK)) == FLAG_SYN ? CAUSE_NO_LISTENER : CAUSE_NO_CONNECTION;
	if (state == STATE_TIME_WAIT)
		return segment->flags & FLAG_SYN ? CAUSE_BAD_SEGMENT : CAUSE_DATA_AFTER_CLOSE;
	if (is_mptcp(sk) && state != STATE_LISTEN)
		return CAUSE_UNKNOWN;
	if (is_mptcp(sk) && joins(segment->tcp)) /* subflow_v4_route_req(), subflow_syn_recv_sock() */
		return CAUSE_MPTCP;
	if (state == STATE_LISTEN && !(segment->flags & FLAG_ACK))
		return CAUSE_BAD_SEGMENT; /* a second SYN of a handshake */
	if (state == STATE_LISTEN)
		return aborts_on_overflow(sk, segment, reason) ? CAUSE_ABORT_ON_OVERFLOW : CAUSE_NO_CONNECTION;
	if (state != STATE_CLOSE)
		return CAUSE_BAD_SEGMENT;
	if (!was)
		return CAUSE_UNKNOWN;
	if (data || !was_established(was))
		return data ? CAUSE_DATA_AFTER_CLOSE : CAUSE_BAD_SEGMENT;
	return BPF_CORE_READ((struct tcp_sock *)sk, linger2) < 0 ? CAUSE_LINGER2 : CAUSE_DATA_AFTER_CLOSE;
}

/* As __tcp_close() asks before it empties the queue. The peer's FIN has a sequence number, like a byte. */
static __always_inline bool has_unread_data(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	return (int)(BPF_CORE_READ(tp, rcv_nxt) - fin_received(sk) - BPF_CORE_READ(tp, copied_seq)) > 0;
}

/*
 * Why the kernel sends a RST on its own account, by the callers of tcp_send_active_reset(). __tcp_close() and
 * tcp_disconnect() call it in CLOSE, all others before. tcp_abort() has locked the socket for a process, a timer has not. A
 * process that closes the socket may run a timer that was due meanwhile (tcp_release_cb()): then it is not known.
 */
static __always_inline enum cause cause_of_active(struct sock *sk, int state, int was, __u8 reason)
{
	bool dead = SOCK_FLAG(sk, SOCK_DEAD);

	if (is_mptcp(sk))
		return ended_by_mptcp(sk, reason) ? CAUSE_MPTCP : CAUSE_UNKNOWN;
	if (state != STATE_CLOSE) {
		bool owned = BPF_CORE_READ(sk, sk_lock.owned);

		if (!dead)
			return owned ? CAUSE_KILLED : CAUSE_KEEPALIVE;
		return owned || state == STATE_FIN_WAIT2 ? CAUSE_UNKNOWN : CAUSE_NO_MEMORY;
	}
	if (dead && !was)
		return CAUSE_UNKNOWN;
	if (dead)
		return was == STATE_FIN_WAIT2 && BPF_CORE_READ((struct tcp_sock *)sk, linger2) < 0 ? CAUSE_LINGER2
												   : CAUSE_NO_MEMORY;
	if (!BPF_CORE_READ(sk, sk_socket)) /* accept() has not returned it: inet_child_forget() */
		return CAUSE_LISTENER_CLOSED;
	if (BPF_CORE_READ(sk, sk_shutdown) != SHUTDOWN_MASK)
		return CAUSE_DISCONNECT;
	if (has_unread_data(sk))
		return CAUSE_UNREAD_DATA;
	return SOCK_FLAG(sk, SOCK_LINGER) && !BPF_CORE_READ(sk, sk_lingertime) ? CAUSE_LINGER : CAUSE_DISCONNECT;
}

#endif
