/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * What became of the SYN of an attempt: an ICMP message that answered it, and whether this host dropped it. An object that
 * includes this has in its scratch the stage of the attempt, `stale_soft_error` and `message_error`.
 */
#ifndef TCPSCOPE_SYN_BPF_H
#define TCPSCOPE_SYN_BPF_H

#include "connection.bpf.h"

#define DROPPED_UNKNOWN ((__u8) - 1)

#define SO_EE_ORIGIN_ICMP 2
#define SO_EE_ORIGIN_ICMP6 3

/*
 * tcp_v4_err() queues each message before it looks whether a process uses the socket ("tcp: allow traceroute -Mtcp for unpriv
 * users"). That wakes the application, which fetches the soft error, and erases it. tcp_v6_err() queues it with IPV6_RECVERR.
 */
static __always_inline void message_reported(struct sock *sk)
{
	struct connection *connection = connection_find(sk);
	struct sock_exterr_skb *message;
	struct sk_buff *skb;
	__u8 origin;

	if (!connection || connection->scratch.stage != STAGE_OPEN || !BPF_CORE_READ(sk, sk_error_queue.qlen))
		return;
	skb = BPF_CORE_READ(sk, sk_error_queue.prev);
	message = (struct sock_exterr_skb *)__builtin_preserve_access_index(&skb->cb);
	origin = BPF_CORE_READ(message, ee.ee_origin);
	if (origin == SO_EE_ORIGIN_ICMP || origin == SO_EE_ORIGIN_ICMP6)
		connection->scratch.message_error = BPF_CORE_READ(message, ee.ee_errno);
}

/* The soft error of this attempt: the present one, or one that the application has fetched; 0: none. */
static __always_inline __u32 soft_error_of(struct sock *sk, const struct connection *connection)
{
	__u32 error = BPF_CORE_READ(sk, sk_err_soft);

	/* The kernel does not clear it when the socket is connected again. */
	return error && error != connection->scratch.stale_soft_error ? error : connection->scratch.message_error;
}

/*
 * tcp_transmit_skb() moves a packet that the lower layers have taken into tsorted_sent_queue (tcp_update_skb_after_send()).
 * A retransmission that they have taken is in retrans_out; the timer clears that before the next one (tcp_enter_loss()).
 * tcp_write_queue_purge() empties the queue and clears packets_out: a RST and a timer that gives up call it before the
 * transition.
 */
static __always_inline __u8 last_syn_dropped(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	if (!BPF_CORE_READ(tp, segs_out))
		return DROPPED_UNKNOWN;
	if (BPF_CORE_READ(tp, total_retrans))
		return !BPF_CORE_READ(tp, retrans_out);
	if (BPF_CORE_READ(tp, tsorted_sent_queue.next) != &tp->tsorted_sent_queue)
		return false;
	return BPF_CORE_READ(tp, packets_out) ? true : DROPPED_UNKNOWN;
}

#endif
