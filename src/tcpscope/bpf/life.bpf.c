// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * A connection from birth to death: what it did, who closed it and how.
 *
 * A connection ends when it enters CLOSE. If both ends have sent a FIN, or the socket has an error, that tells how. If not,
 * somebody is closing it in this moment, and the kernel may send a RST after the transition. So the row is pending until
 * tcp_send_reset or tcp_destroy_sock, one of which follows in the same call.
 *
 *   at the transition to CLOSE                                  end
 *   the socket's error is ECONNABORTED                          KILLED
 *   a RST was received                                          RST_RECEIVED
 *   a RST was sent; also, the socket has another error          RST_SENT; KEEPALIVE
 *   both FINs, ours acknowledged                                FIN
 *   the socket has an error                                     RST (ECONNRESET, EPIPE), TIMEOUT
 *   none of these, and somebody is closing it                   pending
 *   none of these, in LAST_ACK or CLOSING                       UNKNOWN
 *   pending, then                                               end
 *   a RST is sent                                               RST_SENT
 *   destroyed in FIN_WAIT2, a timewait socket takes over        FIN_WAIT2; else RST_SENT
 *   destroyed in another state, or the run ends                 UNKNOWN
 *   connected again                                             lost, and counted
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"
#include "state.bpf.h"

enum reset {
	RESET_NONE,
	RESET_SENT,
	RESET_RECEIVED,
	RESET_SEEN, /* one of the two */
} __attribute__((packed));

struct scratch {
	__u64 established_ns; /* 0: not seen */
	__u64 closed_ns;      /* entered CLOSE, and the row is pending; 0: it is not */
	enum tcp_state closed_in;
	enum reset reset;
	bool timewait;          /* the kernel called tcp_time_wait(), with or without memory for a timewait socket */
	__u32 syn_retrans;      /* valid if established_ns is set */
	__u32 handshake_us;     /* valid if established_ns is set; all bits set: not known */
	__u32 data_segs_before; /* data_segs_in when it entered FIN_WAIT1 */
	__u32 error;            /* the error that ends it, if the kernel reported it before: error.bpf.h */
};
#define HAS_SCRATCH

#include "follow.bpf.h"
#include "accept_hooks.bpf.h"
#include "child.bpf.h"
#include "error.bpf.h"
#include "timewait.bpf.h"
#include "visit.bpf.h"

#define RCV_SHUTDOWN 1 /* include/net/sock.h */

enum end {
	END_UNKNOWN,
	END_OPEN,
	END_FIN,
	END_FIN_WAIT2,
	END_RST_RECEIVED,
	END_RST_SENT,
	END_RST,
	END_TIMEOUT,
	END_KEEPALIVE,
	END_KILLED,
} __attribute__((packed));

enum closer {
	CLOSER_UNKNOWN,
	CLOSER_LOCAL,
	CLOSER_REMOTE,
} __attribute__((packed));

struct life {
	struct event event;
	enum role role DOC("who opened it: active = this host, passive = the remote end") UNKNOWN_IS("zero");
	enum tcp_state state DOC("state in which it ended, or in which an open one is");
	enum end end UNKNOWN_IS("zero")
	DOC("how it ended. FIN: both ends closed; FIN_WAIT2: the remote end's FIN was still missing, a timewait "
	    "socket waits for it; RST: sent or received; KEEPALIVE, TIMEOUT: nobody answered; KILLED: by "
	    "another program (ss -K, bpf_sock_destroy()); OPEN: it has not ended");
	enum closer closed_by UNKNOWN_IS("zero") DOC("whose FIN or RST came first");
	__u32 errno KIND("errno") DOC("error of the socket");
	__u64 tx_bytes WIDTH(10) UNIT("bytes") DOC("data sent, retransmissions included");
	__u64 acked_bytes UNIT("bytes") UNKNOWN_IS("max") DOC("data that the remote end has acknowledged");
	__u64 rx_bytes WIDTH(10) UNIT("bytes") DOC("data received");
	__u32 tx_segs DOC("segments sent, retransmissions and those without data included");
	__u32 rx_segs DOC("segments received");
	__u32 tx_data_segs DOC("segments sent with data");
	__u32 rx_data_segs DOC("segments received with data");
	__u32 retrans DOC("retransmitted segments, those of the handshake included");
	__u32 syn_retrans UNKNOWN_IS("max") DOC("retransmissions of the SYN, or of a passive connection's SYN-ACK");
	__u32 srtt_us UNIT("us") UNKNOWN_IS("zero") DOC("smoothed round-trip time");
	__u32 min_rtt_us UNIT("us") UNKNOWN_IS("max") DOC("smallest round-trip time of the last five minutes");
	__u32 handshake_us UNIT("us") UNKNOWN_IS("max")
	DOC("from connect() to ESTABLISHED; of a passive connection from its SYN-ACK to the answer");
	__u32 padding;
	__u64 duration_us TITLE("DUR(us)") UNIT("us") UNKNOWN_IS("max")
	DOC("from connect() or, passive, the handshake's end, to the end");
	__u64 established_us UNIT("us") UNKNOWN_IS("max") DOC("from ESTABLISHED to the end");
};

const struct life *life_anchor __attribute__((unused));

struct closing {
	__u64 time_ns;
	enum tcp_state state;
	enum end end;
	__u32 errno;
};

/*
 * close() has dropped unread data: tcp_close() empties the receive queue before the transition to CLOSE, tcp_disconnect()
 * after it. The remote end's FIN may be unread, too.
 */
static __always_inline bool unread_thrown_away(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	return !BPF_CORE_READ(sk, sk_receive_queue.qlen) &&
	       (__s32)(BPF_CORE_READ(tp, rcv_nxt) - BPF_CORE_READ(tp, copied_seq)) > 1;
}

static __noinline int life_emit(struct sock *sk, const struct connection *connection, const struct identity *id,
				const struct closing *closing)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	struct life *event;

	event = event_begin(sizeof(*event), closing->time_ns, id, connection_owner(connection));
	if (!event)
		return 0;
	event->role = connection && connection->role ? connection->role : role_of_older(sk, closing->state);
	event->state = closing->state;
	event->end = closing->end;
	event->errno = closing->errno;
	event->closed_by = CLOSER_UNKNOWN;
	if (closing->state == STATE_CLOSE_WAIT || closing->state == STATE_LAST_ACK ||
	    (!after_fin(closing->state) && closing->end == END_RST_RECEIVED))
		event->closed_by = CLOSER_REMOTE;
	else if (after_fin(closing->state) || closing->end == END_RST_SENT || closing->end == END_KILLED)
		event->closed_by = CLOSER_LOCAL;

	/* bytes_received and bytes_acked count a SYN and a FIN like a byte, as sequence numbers do. */
	event->tx_bytes = BPF_CORE_READ(tp, bytes_sent);
	event->acked_bytes = event->role ? acked_before_fin(sk, closing->state) - (event->role == ROLE_ACTIVE) : -1;
	event->rx_bytes = BPF_CORE_READ(tp, bytes_received) - fin_received(sk);
	event->tx_segs = BPF_CORE_READ(tp, segs_out);
	event->rx_segs = BPF_CORE_READ(tp, segs_in);
	event->tx_data_segs = BPF_CORE_READ(tp, data_segs_out);
	event->rx_data_segs = BPF_CORE_READ(tp, data_segs_in);
	event->retrans = BPF_CORE_READ(tp, total_retrans);
	event->srtt_us = BPF_CORE_READ(tp, srtt_us) >> 3;
	event->min_rtt_us = BPF_CORE_READ(tp, rtt_min.s[0].v);
	event->syn_retrans = event->handshake_us = -1;
	event->duration_us = event->established_us = -1;
	event->padding = 0;
	if (connection) {
		if (connection->opened_ns)
			event->duration_us = (closing->time_ns - connection->opened_ns) / 1000;
		if (connection->scratch.established_ns) {
			event->established_us = (closing->time_ns - connection->scratch.established_ns) / 1000;
			event->syn_retrans = connection->scratch.syn_retrans;
			event->handshake_us = connection->scratch.handshake_us;
		}
	}
	event_submit(event);
	return 0;
}

/*
 * No process holds the socket, and no FIN has come. Either a timewait socket takes over. Or, with TCP_LINGER2 below zero, or
 * if data came together with the ACK of our FIN, tcp_v4_rcv() sends a RST when this socket is gone.
 */
static __always_inline enum end end_in_fin_wait2(struct sock *sk, const struct connection *connection)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	if (hooked_timewait)
		return connection->scratch.timewait ? END_FIN_WAIT2 : END_RST_SENT;
	if (BPF_CORE_READ(tp, linger2) < 0)
		return END_RST_SENT;
	return BPF_CORE_READ(tp, data_segs_in) == connection->scratch.data_segs_before ? END_FIN_WAIT2 : END_UNKNOWN;
}

/* Emits the row of a connection whose end is pending. */
static __always_inline void life_resolve(struct sock *sk, struct connection *connection)
{
	struct closing closing = {.time_ns = connection->scratch.closed_ns, .state = connection->scratch.closed_in};

	if (!closing.time_ns)
		return;
	connection->scratch.closed_ns = 0;
	if (connection->scratch.reset == RESET_SENT)
		closing.end = END_RST_SENT;
	else if (closing.state == STATE_FIN_WAIT2)
		closing.end = end_in_fin_wait2(sk, connection);
	life_emit(sk, connection, &connection->id, &closing);
}

/* Notes what can be read only at the end of the handshake. */
static __always_inline void life_established(struct sock *sk, struct connection *connection,
					     const struct change *change)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	connection->scratch.established_ns = change->time_ns;
	connection->scratch.syn_retrans = BPF_CORE_READ(tp, total_retrans);
	connection->scratch.handshake_us = -1;
	if (connection->role == ROLE_PASSIVE) {
		/* tcp_synack_rtt_meas(); after a retransmission it measures only the last SYN-ACK */
		if (!connection->scratch.syn_retrans && BPF_CORE_READ(tp, srtt_us))
			connection->scratch.handshake_us = BPF_CORE_READ(tp, srtt_us) >> 3;
	} else if (connection->opened_ns) {
		connection->scratch.handshake_us = (change->time_ns - connection->opened_ns) / 1000;
	}
}

/* The socket was disconnected without a RST (no memory for one), which has cleared its counters: the row is lost. */
static __always_inline void life_lost(const struct connection *connection)
{
	if (connection->scratch.closed_ns) {
		COUNT(seen);
		COUNT(lost);
	}
}

static __always_inline bool matters(int old_state, int new_state)
{
	return true;
}

/* A socket in CLOSE needs no entry, unless its end is pending: no process may have held it when the tool began. */
static __always_inline bool makes_entry(int old_state, int new_state)
{
	return new_state != STATE_CLOSE || was_established(old_state);
}

static __always_inline int state_changed(struct sock *sk, const struct change *change)
{
	struct closing closing = {.time_ns = change->time_ns, .state = change->old_state};
	struct connection *connection;
	struct followed now;
	enum reset reset;

	follow_find(&now, sk, change);
	connection = now.connection;
	if (follow_begins_anew(&now, change))
		life_lost(connection);
	follow_update(&now, sk, change);
	reset = connection ? connection->scratch.reset : RESET_NONE;
	if (connection && change->new_state == STATE_ESTABLISHED)
		life_established(sk, connection, change);
	else if (connection && change->new_state == STATE_FIN_WAIT1)
		connection->scratch.data_segs_before = BPF_CORE_READ((struct tcp_sock *)sk, data_segs_in);
	if (change->new_state != STATE_CLOSE || !had_life(connection, change->old_state))
		return 0;
	closing.errno = error_of(sk, connection);
	if (closing.errno == ECONNABORTED)
		closing.end = END_KILLED;
	else if (reset == RESET_RECEIVED)
		closing.end = END_RST_RECEIVED;
	else if (reset == RESET_SEEN)
		closing.end = END_RST;
	else if (reset == RESET_SENT)
		closing.end = closing.errno && closing.errno != ECONNRESET ? END_KEEPALIVE /* tcp_keepalive_timer() */
									   : END_RST_SENT;
	else if (fin_acked(sk, closing.state) && fin_received(sk))
		closing.end = END_FIN;
	else if (closing.errno == ECONNRESET || closing.errno == EPIPE) /* tcp_reset(), which no entry notes */
		closing.end = END_RST;
	else if (closing.errno)
		closing.end = END_TIMEOUT;
	else if (connection && !BPF_CORE_READ_BITFIELD_PROBED((struct tcp_sock *)sk, repair) &&
		 ((closing.state != STATE_LAST_ACK && closing.state != STATE_CLOSING) || unread_thrown_away(sk))) {
		connection->scratch.closed_ns = closing.time_ns;
		connection->scratch.closed_in = closing.state;
		return 0;
	}
	return life_emit(sk, connection, follow_identity(&now), &closing);
}

static __always_inline void message_reported(struct sock *sk)
{
}

static __always_inline void child_known(struct sock *child, struct connection *connection)
{
}

static __always_inline void accepted(struct sock *child, struct connection *connection, struct sock *listener)
{
}

static __always_inline void timewait(struct connection *connection, int state, bool made)
{
	connection->scratch.timewait = true;
}

SEC("tp_btf/tcp_send_reset")
int TRACEPOINT_PROG(reset_sent, struct sock *sk)
{
	struct connection *connection = sk ? connection_find(sk) : NULL;

	if (!connection)
		return 0;
	if (connection->scratch.closed_ns || was_established(BPF_CORE_READ(sk, __sk_common.skc_state)))
		connection->scratch.reset = RESET_SENT;
	life_resolve(sk, connection);
	return 0;
}

/*
 * The kernel calls the function for a received RST, and for data received after close(), which it answers with a RST. After
 * close() only the packet tells the two apart.
 */
static __always_inline void reset_received(struct sock *sk, enum reset reset)
{
	struct connection *connection = connection_find(sk);

	if (connection)
		connection->scratch.reset = reset;
}

#define TCP_FLAGS_AT 13 /* offset in the header */
#define TCP_FLAG_RST 0x04

/* tcp_reset() has the packet as argument since 5.11. */
ARGUMENTS(2)
SEC("fentry/tcp_reset")
int FUNCTION_PROG(reset_received__fentry, struct sock *sk, struct sk_buff *skb)
{
	unsigned char *header = BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, transport_header);
	__u8 flags = 0;

	bpf_probe_read_kernel(&flags, sizeof(flags), header + TCP_FLAGS_AT);
	reset_received(sk, flags & TCP_FLAG_RST ? RESET_RECEIVED : RESET_SENT);
	return 0;
}

SEC("tp_btf/tcp_receive_reset")
int TRACEPOINT_PROG(reset_received__tracepoint, struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);
	bool closed =
		(state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2) && BPF_CORE_READ(sk, sk_shutdown) & RCV_SHUTDOWN;

	reset_received(sk, closed ? RESET_SEEN : RESET_RECEIVED);
	return 0;
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
	life_resolve(sk, connection);
}

/* At the end of a run. */
static long flush_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	life_resolve((struct sock *)*key, connection);
	return 0;
}

ROLE("flushes")
FOR_EACH_CONNECTION(flush, flush_entry)

/* The connections that are open now. */
static long live_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct closing closing = {.end = END_OPEN};
	struct sock *sk = (struct sock *)*key;
	struct identity id = {};

	closing.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (!was_established(closing.state))
		return 0;
	closing.time_ns = bpf_ktime_get_ns();
	ends_read(sk, connection, &id);
	life_emit(sk, connection, &id, &closing);
	return 0;
}

FOR_EACH_CONNECTION(live, live_entry)

SEED(ANY_STATE)
