// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* What happens to a connection: connected, accepted, closed. */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"
#include "follow.bpf.h"
#include "accept_hooks.bpf.h"
#include "child.bpf.h"

enum action_kind {
	ACTION_CONNECT,
	ACTION_ACCEPT,
	ACTION_CLOSE,
} __attribute__((packed));

struct action {
	struct event event;
	enum action_kind action
		DOC("CONNECT: an active open succeeded; ACCEPT: accept() returned the connection; CLOSE: it ended");
	__u8 padding[7];
};

const struct action *action_anchor __attribute__((unused));

static __noinline int action_emit(__u64 time_ns, const struct identity *id, const struct owner *owner,
				  enum action_kind kind)
{
	struct action *event = event_begin(sizeof(*event), time_ns, id, owner);

	if (!event)
		return 0;
	event->action = kind;
	__builtin_memset(event->padding, 0, sizeof(event->padding));
	event_submit(event);
	return 0;
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
	const struct connection *connection;
	const struct owner *owner;
	struct followed now;

	follow_find(&now, sk, change);
	follow_update(&now, sk, change);
	connection = now.connection;
	owner = connection_owner(connection);
	if (change->new_state == STATE_ESTABLISHED &&
	    (change->old_state == STATE_SYN_SENT || (connection && connection->role == ROLE_ACTIVE)))
		action_emit(change->time_ns, follow_identity(&now), owner, ACTION_CONNECT);
	else if (change->new_state == STATE_CLOSE && had_life(connection, change->old_state))
		action_emit(change->time_ns, follow_identity(&now), owner, ACTION_CLOSE);
	return 0;
}

static __always_inline void child_known(struct sock *child, struct connection *connection)
{
}

static __always_inline void accepted(struct sock *child, struct connection *connection, struct sock *listener)
{
	struct identity id = {};
	struct owner unlisted = {};
	const struct owner *owner = accepted_by(child, connection, &id, &unlisted);

	action_emit(bpf_ktime_get_ns(), &id, owner, ACTION_ACCEPT);
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
}

SEED(ANY_STATE)
