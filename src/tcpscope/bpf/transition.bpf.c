// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * A transition, with the time spent in the old state.
 *
 * At a connection's first transition its local port or its remote end is not set yet. So its event is pending until the SYN
 * leaves, or until the next transition. Where only the wake-up of a child's listener names the listener, the second
 * transition is pending until then, too.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"
#include "state.bpf.h"

struct scratch {
	__u64 state_since_ns;     /* when it entered the state; 0: not seen */
	struct change pending[2]; /* the older one first */
	enum tcp_state followed_by;
};
#define HAS_SCRATCH

#include "follow.bpf.h"
#include "accept_hooks.bpf.h"
#include "child.bpf.h"
#include "timewait.bpf.h"
#include "visit.bpf.h"

enum followed_by {
	FOLLOWED_BY_UNKNOWN,
	FOLLOWED_BY_NOTHING,
	FOLLOWED_BY_TIME_WAIT,
	FOLLOWED_BY_FIN_WAIT2,
} __attribute__((packed));

struct transition {
	struct event event;
	enum role role DOC("who opened it: active = this host, passive = the remote end") UNKNOWN_IS("zero");
	enum tcp_state old_state WIDTH(11) DOC("state before the transition");
	enum tcp_state new_state WIDTH(11) DOC("state after the transition");
	enum followed_by followed_by UNKNOWN_IS("zero")
	DOC("what the kernel keeps after CLOSE: a timewait socket in TIME_WAIT or timed FIN_WAIT2, or nothing");
	__u32 padding;
	__u64 in_state_us UNIT("us") UNKNOWN_IS("max") DOC("time spent in the old state");
};

const struct transition *transition_anchor __attribute__((unused));

static __always_inline enum followed_by followed_by(const struct connection *connection)
{
	switch (connection->scratch.followed_by) {
	case STATE_TIME_WAIT:
		return FOLLOWED_BY_TIME_WAIT;
	case STATE_FIN_WAIT2:
		return FOLLOWED_BY_FIN_WAIT2;
	default:
		return FOLLOWED_BY_NOTHING;
	}
}

/* `connection` may be NULL. */
static __noinline int transition_emit(const struct connection *connection, const struct identity *id,
				      const struct change *change)
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
		if (connection->scratch.state_since_ns)
			event->in_state_us = (change->time_ns - connection->scratch.state_since_ns) / 1000;
		if (change->new_state == STATE_CLOSE && hooked_timewait)
			event->followed_by = followed_by(connection);
	}
	event_submit(event);
	return 0;
}

/* Emits all that is pending. */
static __noinline int transition_release(struct connection *connection)
{
	for (int i = 0; i < 2; i++) {
		struct change change = connection->scratch.pending[i];

		if (!change.time_ns)
			continue;
		connection->scratch.pending[i].time_ns = 0;
		transition_emit(connection, &connection->id, &change);
		connection->scratch.state_since_ns = change.time_ns;
	}
	return 0;
}

/* Is this the second transition of a child whose listener the kernel wakes next? */
static __always_inline bool listener_will_tell(const struct connection *connection, const struct change *change)
{
	return hooked_child_woken && connection->role == ROLE_PASSIVE && !connection->listener &&
	       connection->scratch.pending[0].time_ns && !connection->accepted && change->old_state == STATE_SYN_RECV &&
	       change->new_state == STATE_ESTABLISHED;
}

static __always_inline bool matters(int old_state, int new_state)
{
	return true;
}

static __always_inline bool makes_entry(int old_state, int new_state)
{
	return new_state != STATE_CLOSE;
}

static __always_inline int state_changed(struct sock *sk, const struct change *change)
{
	struct connection *connection;
	struct followed now;

	follow_find(&now, sk, change);
	follow_update(&now, sk, change);
	connection = now.connection;
	if (!connection)
		return transition_emit(NULL, &now.unlisted, change);
	if (listener_will_tell(connection, change)) {
		connection->scratch.pending[1] = *change;
		return 0;
	}
	transition_release(connection);
	if (now.after_miss)
		connection->scratch.state_since_ns = 0;
	if (change->new_state == STATE_SYN_SENT || is_birth(change->old_state, change->new_state)) {
		connection->scratch.pending[0] = *change;
		return 0;
	}
	transition_emit(connection, &connection->id, change);
	connection->scratch.state_since_ns = change->time_ns;
	return 0;
}

static __always_inline void child_known(struct sock *child, struct connection *connection)
{
	if (connection && connection->scratch.pending[1].time_ns)
		transition_release(connection);
}

/* The SYN is about to leave: the local port is set. If functions cannot be hooked, its first retransmission tells. */
static __always_inline void syn_sent(struct sock *sk)
{
	struct connection *connection = connection_find(sk);

	if (!connection || !connection->scratch.pending[0].time_ns)
		return;
	identity_read(sk, &connection->id);
	transition_release(connection);
}

SEC("fentry/tcp_connect")
int FUNCTION_PROG(connect__fentry, struct sock *sk)
{
	syn_sent(sk);
	return 0;
}

SEC("kprobe/tcp_connect")
int BPF_KPROBE(connect__kprobe, struct sock *sk)
{
	syn_sent(sk);
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int TRACEPOINT_PROG(connect__retransmit, struct sock *sk)
{
	syn_sent(sk);
	return 0;
}

static __always_inline void timewait(struct connection *connection, int state, bool made)
{
	if (made)
		connection->scratch.followed_by = state;
}

static __always_inline void accepted(struct sock *child, struct connection *connection, struct sock *listener)
{
	child_known(child, connection);
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
}

/* At the end of a run. */
static long flush_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	syn_sent((struct sock *)*key);
	return 0;
}

ROLE("flushes")
FOR_EACH_CONNECTION(flush, flush_entry)

SEED(ANY_STATE)
