// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* The three steps of a connection that an application knows: connected, accepted, closed. */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"
#include "follow.bpf.h"
#include "accept.bpf.h"
#include "child.bpf.h"

enum step_kind {
	STEP_CONNECT,
	STEP_ACCEPT,
	STEP_CLOSE,
} __attribute__((packed));

struct step {
	struct event event;
	enum step_kind step DOC("CONNECT: an active open succeeded; ACCEPT: accept() returned it; CLOSE: it ended");
	__u8 padding[7];
};

const struct step *step_anchor __attribute__((unused));

static __noinline int step_emit(__u64 time_ns, const struct identity *id, const struct owner *owner,
				enum step_kind kind)
{
	struct step *event = event_begin(sizeof(*event), time_ns, id, owner);

	if (!event)
		return 0;
	event->step = kind;
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

static __always_inline int state_changed(struct sock *sk, const struct change *change, __u64 cookie)
{
	const struct connection *connection;
	const struct owner *owner;
	struct followed now;

	follow_find(&now, sk, change);
	follow_update(&now, sk, change, cookie);
	connection = now.connection;
	owner = connection_owner(connection);
	if (change->new_state == STATE_ESTABLISHED &&
	    (change->old_state == STATE_SYN_SENT || (connection && connection->role == ROLE_ACTIVE)))
		step_emit(change->time_ns, follow_identity(&now), owner, STEP_CONNECT);
	else if (change->new_state == STATE_CLOSE && had_life(connection, change->old_state))
		step_emit(change->time_ns, follow_identity(&now), owner, STEP_CLOSE);
	return 0;
}

static __always_inline void child_known(struct sock *child, struct connection *connection)
{
}

static __always_inline void accepted(struct sock *child, struct connection *connection, struct sock *listener)
{
	struct identity id = {};
	struct owner owner = {};

	identity_read(child, &id);
	id.cookie = connection && connection->id.cookie ? connection->id.cookie : cookie_if_any(child);
	if (!connection)
		owner_of_current(&owner);
	step_emit(bpf_ktime_get_ns(), &id, connection ? &connection->accepter : &owner, STEP_ACCEPT);
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
}

SEED(ANY_STATE)
