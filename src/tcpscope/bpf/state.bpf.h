/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What the state of a connection, and the numbers in its socket, say about it. */
#ifndef TCPSCOPE_STATE_BPF_H
#define TCPSCOPE_STATE_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"

enum role {
	ROLE_UNKNOWN,
	ROLE_ACTIVE,
	ROLE_PASSIVE,
	ROLE_LISTENER,
} __attribute__((packed));

/* A transition of a socket. */
struct change {
	__u64 time_ns; /* 0: none */
	enum tcp_state old_state;
	enum tcp_state new_state;
};

/* The birth of a child, still within the packet of its final ACK (with TCP Fast Open, of its SYN). */
static __always_inline bool is_birth(int old_state, int new_state)
{
	return old_state == STATE_LISTEN && new_state == STATE_SYN_RECV;
}

/* For a socket that the verifier knows as one. Other protocols have a state of this number, too. */
static __always_inline bool is_tcp_listener(struct sock *sk)
{
	return sk->__sk_common.skc_state == STATE_LISTEN && sk->sk_protocol == IPPROTO_TCP;
}

static __always_inline bool was_established(int state)
{
	return state == STATE_ESTABLISHED || state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2 ||
	       state == STATE_CLOSE_WAIT || state == STATE_LAST_ACK || state == STATE_CLOSING;
}

/* In these states our FIN is queued or sent: nothing follows it. */
static __always_inline bool after_fin(int state)
{
	return was_established(state) && state != STATE_ESTABLISHED && state != STATE_CLOSE_WAIT;
}

/* The remote end has acknowledged our FIN, which has a sequence number like a byte. */
static __always_inline bool fin_acked(struct sock *sk, int state)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	return after_fin(state) && BPF_CORE_READ(tp, snd_una) == BPF_CORE_READ(tp, write_seq);
}

/* The kernel has received the remote end's FIN, and all data before it: tcp_fin(). */
static __always_inline bool fin_received(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_flags) >> bpf_core_enum_value(enum sock_flags, SOCK_DONE) & 1;
}

/* Bytes that the remote end has acknowledged, with the SYN of an active open, but without the FIN. */
static __always_inline __u64 acked_before_fin(struct sock *sk, int state)
{
	return BPF_CORE_READ((struct tcp_sock *)sk, bytes_acked) - fin_acked(sk, state);
}

/*
 * Who opened a connection that is older than the tool. The acknowledged bytes of an active open include its SYN. Their data
 * is what was sent for the first time, less what is in flight. What this host itself
 * dropped counts as sent and not as retransmitted: then the role is not known.
 */
static __noinline __attribute__((unused)) enum role role_of_older(struct sock *sk, int state)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	__u32 nxt = BPF_CORE_READ(tp, snd_nxt);
	__u32 on_its_way = nxt - BPF_CORE_READ(tp, snd_una);
	__u64 syn;

	if (!was_established(state))
		return ROLE_UNKNOWN;
	if (on_its_way && after_fin(state) && nxt == BPF_CORE_READ(tp, write_seq))
		on_its_way--;
	syn = acked_before_fin(sk, state) + on_its_way + BPF_CORE_READ(tp, bytes_retrans) -
	      BPF_CORE_READ(tp, bytes_sent);
	return syn == 1 ? ROLE_ACTIVE : syn == 0 ? ROLE_PASSIVE : ROLE_UNKNOWN;
}

#endif
