// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * A retransmitted segment: why TCP sends it again, and the state of the connection at that moment. Later, perhaps: that it was
 * not needed.
 */
#define HAS_GROUPS
#include "socket_event.bpf.h"

enum kind {
	KIND_FAST,
	KIND_SLOW_START,
	KIND_RACK_TIMEOUT,
	KIND_RTO,
	KIND_LOSS_PROBE,
	KIND_SYN,
	KIND_SYNACK,
	KIND_SPURIOUS,
} __attribute__((packed));

struct retrans {
	struct event event;
	enum kind kind
		DOC("RTO: the timer expired; SLOW_START: after that; FAST: fast recovery; RACK_TIMEOUT: the same, when "
		    "RACK's reordering timer was due; LOSS_PROBE: of the tail; SYN; SYNACK; SPURIOUS: the kernel "
		    "has found that it was not needed, and sends as fast as before");
	enum tcp_state state DOC("state of the connection");
	__u8 ca_state NAMED_BY("tcp_ca_state", "TCP_CA_") UNKNOWN_IS("max") DOC("state of congestion control");
	__u8 backoff UNKNOWN_IS("max") DOC("how often the RTO was doubled");
	__u32 segs DOC("number of segments that were sent again: TcpRetransSegs less TCPRetransFail; of SPURIOUS: "
		       "those that were sent again "
		       "since the "
		       "kernel took them for lost");
	__u32 errno KIND("errno") DOC("why it was not sent: EBUSY, the original waits in a queue of this host; "
				      "ENOBUFS, a queue of this host is full; none: it "
				      "was sent. Linux before 6.17 does not show such attempts");
	__u32 data_bytes TITLE("BYTES") UNIT("bytes") DOC("data of these segments");
	__s64 offset UNKNOWN_IS("max")
	DOC("place of the first byte in the data that this host has sent; the first of all is 0");
	__u32 cwnd UNKNOWN_IS("max") DOC("congestion window, in segments");
	__u32 ssthresh UNKNOWN_IS("max") DOC("slow start threshold, in segments; null: not known yet");
	__u32 in_flight UNKNOWN_IS("max") DOC("segments that the kernel takes to be on their way");
	__u32 lost_segs TITLE("LOST") UNKNOWN_IS("max") DOC("segments that the kernel takes for lost");
	__u32 sacked_segs TITLE("SACKED") UNKNOWN_IS("max")
	DOC("segments that arrived out of order (SACK, or duplicate ACKs)");
	__u32 srtt_us UNIT("us") UNKNOWN_IS("zero") DOC("smoothed round-trip time");
	__u32 rto_us UNIT("us") UNKNOWN_IS("zero") DOC("retransmission timeout");
	__u32 padding;
	__u64 since_us UNIT("us") UNKNOWN_IS("max")
	DOC("of SPURIOUS: since the first of these segments was sent again");
};
const struct retrans *retrans_anchor __attribute__((unused));

const volatile __u32 jiffy_ns; /* user space asks the kernel for it: kernel/loaded.py */

#define SSTHRESH_NOT_KNOWN 0x7fffffff /* TCP_INFINITE_SSTHRESH, include/net/tcp.h */

/* Retransmissions since the connection entered Recovery or Loss: the kernel may find that they were not needed. */
struct episode {
	__u64 began_ns;
	__s64 offset;
	__u32 undo_marker; /* tcp_init_undo() sets it, another one for another episode */
	__u32 segs;
};

/* Deleted when the connection leaves Recovery and Loss, and in destroyed(): another socket may get the same address. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64); /* address of the socket */
	__type(value, struct episode);
} episodes SEC(".maps");

/*
 * In Recovery the timer of a loss probe may still be pending, but no probe is sent. At an RTO no timer is pending. ACKs show
 * losses while RACK's timer is pending, too, also when it has run out and its handler has not begun: tcp_rate_gen() writes the time of
 * an ACK that has delivered something, tcp_mstamp, before tcp_ack() sends anything again.
 */
static __always_inline enum kind kind_of(struct tcp_sock *tcp, enum tcp_state state, __u8 ca_state)
{
	__u8 timer = BPF_CORE_READ(tcp, inet_conn.icsk_pending);

	if (state == STATE_SYN_SENT)
		return KIND_SYN;
	if (timer == ICSK_TIME_LOSS_PROBE && ca_state < TCP_CA_RECOVERY)
		return KIND_LOSS_PROBE;
	if (!timer)
		return KIND_RTO;
	if (ca_state == TCP_CA_LOSS)
		return KIND_SLOW_START;
	if (timer != ICSK_TIME_REO_TIMEOUT || BPF_CORE_READ(tcp, delivered_mstamp) == BPF_CORE_READ(tcp, tcp_mstamp))
		return KIND_FAST;
	return retransmit_timer_is_due(tcp) ? KIND_RACK_TIMEOUT : KIND_FAST;
}

/* bytes_acked counts from the first byte, or from the SYN of an active open. -1: not known which. */
static __always_inline __s64 offset_of(struct sock *sk, enum tcp_state state, __u32 sequence)
{
	const struct connection *connection = connection_find(sk);
	enum role role = connection && connection->role ? connection->role : role_of_older(sk, state);
	__s32 ahead = sequence - BPF_CORE_READ((struct tcp_sock *)sk, snd_una);

	if (!was_established(state) || !role)
		return -1;
	return (__s64)acked_before_fin(sk, state) - (role == ROLE_ACTIVE) + ahead;
}

static __always_inline void fill_state(struct retrans *event, struct tcp_sock *tcp)
{
	event->backoff = BPF_CORE_READ(tcp, inet_conn.icsk_backoff);
	event->cwnd = BPF_CORE_READ(tcp, snd_cwnd);
	event->ssthresh = BPF_CORE_READ(tcp, snd_ssthresh);
	if (event->ssthresh >= SSTHRESH_NOT_KNOWN)
		event->ssthresh = -1;
	event->lost_segs = BPF_CORE_READ(tcp, lost_out);
	event->sacked_segs = BPF_CORE_READ(tcp, sacked_out);
	event->in_flight = BPF_CORE_READ(tcp, packets_out) + BPF_CORE_READ(tcp, retrans_out) - event->lost_segs -
			   event->sacked_segs; /* tcp_packets_in_flight() */
	event->srtt_us = BPF_CORE_READ(tcp, srtt_us) >> 3;
	event->rto_us = BPF_CORE_READ(tcp, inet_conn.icsk_rto) * (__u64)jiffy_ns / 1000;
	event->padding = 0;
}

/* There has been one. Until then the end of a socket costs no look-up. */
volatile bool episodes_begun;

static __always_inline bool episode_forget(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return episodes_begun && table_take(&episodes, &key);
}

static __always_inline bool destroyed(struct sock *sk)
{
	return episode_forget(sk);
}

#include "destroy.bpf.h"

/* A loss probe belongs to no episode: the marker of the one before is still set, and tcp_enter_cwr() clears it. */
static __always_inline void episode_add(struct sock *sk, __u8 ca_state, __u32 segs, __s64 offset, __u64 now_ns)
{
	__u32 undo_marker = BPF_CORE_READ((struct tcp_sock *)sk, undo_marker);
	struct episode begun = {now_ns, offset, undo_marker, segs}, *episode;
	__u64 key = (__u64)sk;

	if (ca_state < TCP_CA_RECOVERY)
		return;
	episode = bpf_map_lookup_elem(&episodes, &key);
	if (!undo_marker) /* tcp_simple_retransmit(), whose reaction is not undone */
		episode_forget(sk);
	else if (episode && episode->undo_marker == undo_marker)
		episode->segs += segs;
	else if (!bpf_map_update_elem(&episodes, &key, &begun, BPF_ANY))
		episodes_begun = true;
}

SEC("tp_btf/tcp_retransmit_skb")
int TRACEPOINT_PROG(retransmit, struct sock *sk, struct sk_buff *skb)
{
	struct tcp_skb_cb *cb = (struct tcp_skb_cb *)__builtin_preserve_access_index(&skb->cb);
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	enum tcp_state state = BPF_CORE_READ(sk, __sk_common.skc_state);
	__s64 offset = offset_of(sk, state, BPF_CORE_READ(cb, seq));
	int error = RETRANSMIT_ERROR(ctx), segs = BPF_CORE_READ(cb, tcp_gso_segs);
	__u8 ca_state = BPF_CORE_READ_BITFIELD_PROBED(&tcp->inet_conn, icsk_ca_state);
	__u64 now_ns = bpf_ktime_get_ns();
	struct retrans room, *event;

	if (!error)
		episode_add(sk, ca_state, segs, offset, now_ns);
	event = socket_event_begin(&room, sizeof(room), sk, COOKIE_OF(sk), sk);
	if (!event)
		return 0;
	event->event.time_ns = now_ns;
	event->state = state;
	event->ca_state = ca_state;
	event->kind = kind_of(tcp, state, ca_state);
	event->segs = error ? 0 : segs;
	event->errno = error > 0 ? ENOBUFS : -error; /* as net_xmit_errno() says NET_XMIT_DROP */
	event->data_bytes = BPF_CORE_READ(skb, len);
	event->offset = offset;
	event->since_us = -1;
	fill_state(event, tcp);
	return event_submit(event);
}

SEC("tp_btf/tcp_retransmit_synack")
int TRACEPOINT_PROG(synack, struct sock *listener, struct sock *request)
{
	struct retrans room, *event = socket_event_begin(&room, sizeof(room), request, 0, listener);

	if (!event)
		return 0;
	__builtin_memset((void *)event + sizeof(event->event), 0xff, sizeof(*event) - sizeof(event->event));
	event->kind = KIND_SYNACK;
	event->state = STATE_SYN_RECV;
	event->segs = 1;
	event->errno = event->data_bytes = event->srtt_us = event->rto_us = 0;
	return event_submit(event);
}

/*
 * tcp_undo_cwnd_reduction() clears undo_marker, and the connection leaves Recovery or Loss at once or with the next ACK. If a
 * DSACK shows it after that (tcp_try_undo_dsack()), no state changes.
 */
OPTIONAL("that a retransmission was not needed")
SEC("tp_btf/tcp_cong_state_set")
int TRACEPOINT_PROG(undone, struct sock *sk, __u8 ca_state)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct retrans room, *event;
	struct episode *episode, was;
	__u64 key = (__u64)sk, now_ns;
	__u32 undo_marker;

	if (!episodes_begun)
		return 0;
	episode = bpf_map_lookup_elem(&episodes, &key);
	if (!episode)
		return 0;
	undo_marker = BPF_CORE_READ(tcp, undo_marker);
	if (ca_state >= TCP_CA_RECOVERY && undo_marker)
		return 0;
	now_ns = bpf_ktime_get_ns();
	was = *episode;
	episode_forget(sk);
	if (ca_state >= TCP_CA_RECOVERY || undo_marker) /* it enters Loss in tcp_simple_retransmit(), or was right */
		return 0;
	event = socket_event_begin(&room, sizeof(room), sk, COOKIE_OF(sk), sk);
	if (!event)
		return 0;
	event->event.time_ns = now_ns;
	event->kind = KIND_SPURIOUS;
	event->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	event->ca_state = ca_state;
	event->segs = was.segs;
	event->errno = event->data_bytes = 0;
	event->offset = was.offset;
	event->since_us = (now_ns - was.began_ns) / 1000;
	fill_state(event, tcp);
	return event_submit(event);
}
