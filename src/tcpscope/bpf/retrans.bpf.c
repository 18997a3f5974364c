// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* A retransmitted segment: why TCP sends it again, and the state of the connection at that moment. */
#define HAS_GROUPS
#include "socket_event.bpf.h"

enum kind { KIND_FAST, KIND_SLOW_START, KIND_RTO, KIND_LOSS_PROBE, KIND_SYN, KIND_SYNACK } __attribute__((packed));

struct retrans {
	struct event event;
	enum kind kind DOC("RTO: the timer expired; SLOW_START: after that; FAST: fast recovery; LOSS_PROBE: of the "
			   "tail; SYN; SYNACK");
	enum tcp_state state DOC("state of the connection");
	__u8 ca_state NAMED_BY("tcp_ca_state", "TCP_CA_") UNKNOWN_IS("max") DOC("state of congestion control");
	__u16 segs DOC("number of segments, as TcpRetransSegs counts them");
	__u32 errno KIND("errno") DOC("why it was not sent; Linux before 6.17 does not show such attempts");
	__u32 data_bytes TITLE("BYTES") UNIT("bytes") DOC("data of these segments");
	__u32 srtt_us UNIT("us") UNKNOWN_IS("zero") DOC("smoothed round-trip time");
};
const struct retrans *retrans_anchor __attribute__((unused));

/* In Recovery the timer of a loss probe may still be pending, but no probe is sent. At an RTO no timer is pending. */
static __always_inline enum kind kind_of(struct tcp_sock *tcp, enum tcp_state state, __u8 ca_state)
{
	__u8 timer = BPF_CORE_READ(tcp, inet_conn.icsk_pending);

	if (state == STATE_SYN_SENT)
		return KIND_SYN;
	if (timer == ICSK_TIME_LOSS_PROBE && ca_state < TCP_CA_RECOVERY)
		return KIND_LOSS_PROBE;
	return !timer ? KIND_RTO : ca_state == TCP_CA_LOSS ? KIND_SLOW_START : KIND_FAST;
}

SEC("tp_btf/tcp_retransmit_skb")
int TRACEPOINT_PROG(retransmit, struct sock *sk, struct sk_buff *skb)
{
	struct tcp_skb_cb *cb = (struct tcp_skb_cb *)__builtin_preserve_access_index(&skb->cb);
	struct retrans room, *event = socket_event_begin(&room, sizeof(room), sk, COOKIE_OF(sk), sk);
	struct tcp_sock *tcp = (struct tcp_sock *)sk;

	if (!event)
		return 0;
	event->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	event->ca_state = BPF_CORE_READ_BITFIELD_PROBED(&tcp->inet_conn, icsk_ca_state);
	event->kind = kind_of(tcp, event->state, event->ca_state);
	event->segs = BPF_CORE_READ(cb, tcp_gso_segs);
	event->errno = -RETRANSMIT_ERROR(ctx);
	event->data_bytes = BPF_CORE_READ(skb, len);
	event->srtt_us = BPF_CORE_READ(tcp, srtt_us) >> 3;
	return event_submit(event);
}

SEC("tp_btf/tcp_retransmit_synack")
int TRACEPOINT_PROG(synack, struct sock *listener, struct sock *request)
{
	struct retrans room, *event = socket_event_begin(&room, sizeof(room), request, 0, listener);

	if (!event)
		return 0;
	*event = (struct retrans){event->event, KIND_SYNACK, STATE_SYN_RECV, .ca_state = -1, .segs = 1};
	return event_submit(event);
}
