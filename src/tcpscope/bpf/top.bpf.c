// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* What each connection has sent and received since it began: at each look, and at its end. User space subtracts. */
#include "socket_event.bpf.h"
#include "visit.bpf.h"

struct top {
	struct event event;
	__s64 tx_bytes TITLE("TX_BYTES") WIDTH(10) DOC("data sent for the first time") UNIT("bytes");
	__u64 rx_bytes TITLE("RX_BYTES") WIDTH(10) DOC("data received, once and in order") UNIT("bytes");
	__u64 retrans_bytes TITLE("RETRANS") DOC("data sent again") UNIT("bytes");
	__u64 socket;    /* its address */
	__u64 opened_ns; /* 0: not seen. With the address it tells a connection from all others */
	bool ended;
	__u8 padding[7];
};
const struct top *top_anchor __attribute__((unused));

/*
 * With TCP Fast Open data is sent in SYN_SENT and read in SYN_RECV, too. bytes_received has the FIN, and tcp_fin() tells
 * only after it: so the FIN is asked for last. bytes_sent is read before bytes_retrans, which grows first.
 */
static __noinline int send_counters(struct sock *sk, int state, bool ended)
{
	__u64 received = BPF_CORE_READ((struct tcp_sock *)sk, bytes_received);
	const struct connection *connection = connection_find(sk);
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	struct top *event;

	if (!connection || state == STATE_LISTEN || state == STATE_CLOSE)
		return 0;
	event = socket_event_begin(NULL, sizeof(*event), sk, cookie_if_any(sk), sk);
	if (!event)
		return 0;
	event->tx_bytes = BPF_CORE_READ(tp, bytes_sent);
	event->retrans_bytes = BPF_CORE_READ(tp, bytes_retrans);
	event->tx_bytes -= event->retrans_bytes;
	event->socket = (__u64)sk;
	event->opened_ns = connection->opened_ns;
	event->ended = ended;
	event->rx_bytes = received - fin_received(sk);
	return event_submit(event);
}

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(new_state == STATE_CLOSE, end, struct sock *sk, int old_state, int new_state)
{
	return send_counters(sk, old_state, true);
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(new_state == STATE_CLOSE, end_again, struct sock *sk, int old_state, int new_state)
{
	return send_counters(sk, old_state, true);
}

static long look_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	return send_counters((struct sock *)*key, BPF_CORE_READ((struct sock *)*key, __sk_common.skc_state), false);
}

FOR_EACH_CONNECTION(look, look_entry)
