/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* A change of state, with the time spent in the old one. */
#ifndef TCPSCOPE_TRANSITION_BPF_H
#define TCPSCOPE_TRANSITION_BPF_H

#include "connection.bpf.h"
#include "event.bpf.h"

enum followed_by {
	FOLLOWED_BY_UNKNOWN,
	FOLLOWED_BY_NOTHING,
	FOLLOWED_BY_TIME_WAIT,
	FOLLOWED_BY_FIN_WAIT2,
} __attribute__((packed));

struct transition {
	struct event event;
	enum role role DOC("who opened it: active = this host, passive = the remote end") UNKNOWN_IS("zero");
	enum tcp_state old_state DOC("state before");
	enum tcp_state new_state DOC("state after");
	enum followed_by followed_by UNKNOWN_IS("zero")
	DOC("what the kernel keeps after CLOSE: a timewait socket in TIME_WAIT or timed FIN_WAIT2, or nothing");
	__u32 padding;
	__u64 in_state_us UNIT("us") UNKNOWN_IS("max") DOC("time spent in the old state");
};

const struct transition *transition_anchor __attribute__((unused));

const volatile bool emits_transition;
const volatile bool hooked_timewait;

/* `connection` may be NULL. */
static __noinline int transition_emit(const struct connection *connection, const struct identity *id,
				      const struct held *change)
{
	struct transition *event;

	event = event_begin(sizeof(*event), change->time_ns, id, connection_owner(connection));
	if (!event)
		return 0;
	event->old_state = change->old_state;
	event->new_state = change->new_state;
	event->role = ROLE_UNKNOWN;
	event->followed_by = FOLLOWED_BY_UNKNOWN;
	event->padding = 0;
	event->in_state_us = -1;
	if (connection) {
		event->role = connection->role;
		if (connection->state_since_ns)
			event->in_state_us = (change->time_ns - connection->state_since_ns) / 1000;
		if (change->new_state == STATE_CLOSE && hooked_timewait)
			event->followed_by = connection->followed_by == STATE_TIME_WAIT   ? FOLLOWED_BY_TIME_WAIT
					     : connection->followed_by == STATE_FIN_WAIT2 ? FOLLOWED_BY_FIN_WAIT2
											  : FOLLOWED_BY_NOTHING;
	}
	event_submit(event);
	return 0;
}

/* The first transition of a connection happens before its ports or its remote end are set: it waits for them. */
static __always_inline void transition_release(struct connection *connection)
{
	struct held held = connection->held;

	if (!held.time_ns)
		return;
	connection->held.time_ns = 0;
	transition_emit(connection, &connection->id, &held);
	connection->state_since_ns = held.time_ns;
}

/* `id` is the connection's, if there is one. `after_gap`: when it entered the old state is not known. */
static __always_inline void transition_changed(struct connection *connection, const struct identity *id,
					       const struct held *change, bool after_gap)
{
	if (!emits_transition)
		return;
	if (!connection) {
		transition_emit(NULL, id, change);
		return;
	}
	transition_release(connection);
	if (after_gap)
		connection->state_since_ns = 0;
	if (change->new_state == STATE_SYN_SENT ||
	    (change->new_state == STATE_SYN_RECV && change->old_state == STATE_LISTEN)) {
		connection->held = *change;
		return;
	}
	transition_emit(connection, id, change);
	connection->state_since_ns = change->time_ns;
}

/* The SYN is about to leave: the local port is chosen. Without functions to hook, its first retransmission tells. */
static __always_inline void transition_syn_sent(struct sock *sk)
{
	struct connection *connection = connection_find(sk);

	if (!connection || !connection->held.time_ns)
		return;
	identity_read(sk, &connection->id);
	transition_release(connection);
}

#endif
