// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* accept() returned a connection to a process: how long it waited in the accept queue, and the queue's length. */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"

struct scratch {
	bool emitted; /* its event was sent in SYN_RECV: accepted before it was ESTABLISHED */
};
#define HAS_SCRATCH

#define FOLLOWED (STATE_BIT(SYN_SENT) | STATE_BIT(SYN_RECV) | STATE_BIT(LISTEN) | STATE_BIT(CLOSE))
#include "follow.bpf.h"
#define ACCEPTED_FROM
#include "accept_hooks.bpf.h"
#include "child.bpf.h"

struct accepted {
	struct event event;
	__u8 listener[16] KIND("address") UNKNOWN_IS("max") DOC("address that the listener is bound to");
	__u64 listener_cookie UNKNOWN_IS("zero") DOC("socket cookie of the listener");
	__u64 wait_us UNIT("us") UNKNOWN_IS("max") DOC("time that it waited in the accept queue");
	__u32 accept_queue TITLE("ACCEPTQ") UNKNOWN_IS("max") DOC("connections left in the listener's accept queue");
	__u32 accept_limit TITLE("LIMIT") UNKNOWN_IS("max")
	DOC("limit of the accept queue, which holds one connection more");
};

const struct accepted *accepted_anchor __attribute__((unused));

/* `listener` may be NULL. */
static __noinline int accepted_emit(const struct identity *id, const struct owner *owner, __u64 queued_ns,
				    struct sock *listener)
{
	__u64 now = bpf_ktime_get_ns();
	struct accepted *event;

	event = event_begin(sizeof(*event), now, id, owner);
	if (!event)
		return 0;
	event->wait_us = queued_ns ? (now - queued_ns) / 1000 : -1;
	if (listener) {
		struct identity bound = {};

		identity_read(listener, &bound);
		__builtin_memcpy(event->listener, bound.laddr, 16);
		event->listener_cookie = cookie_if_any(listener);
		event->accept_queue = BPF_CORE_READ(listener, sk_ack_backlog);
		event->accept_limit = BPF_CORE_READ(listener, sk_max_ack_backlog);
	} else {
		__builtin_memset(event->listener, 0xff, 16);
		event->listener_cookie = 0;
		event->accept_queue = event->accept_limit = -1;
	}
	event_submit(event);
	return 0;
}

static __always_inline bool matters(int old_state, int new_state)
{
	return new_state == STATE_LISTEN || old_state == STATE_LISTEN || old_state == STATE_SYN_RECV;
}

/* A socket that leaves SYN_RECV has an entry, unless it was accepted and its entry deleted. */
static __always_inline bool makes_entry(int old_state, int new_state)
{
	return new_state == STATE_LISTEN || is_birth(old_state, new_state);
}

static __always_inline int state_changed(struct sock *sk, const struct change *change)
{
	struct followed now;

	follow_find(&now, sk, change);
	if (!now.connection) {
		if (is_birth(change->old_state, change->new_state))
			connection_born(sk, NULL);
		return 0;
	}
	follow_update(&now, sk, change);
	if (now.connection->scratch.emitted)
		connection_forget(sk);
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

	accepted_emit(&id, owner, connection ? connection->opened_ns : 0, listener);
	/* An entry is needed only until accept(). In SYN_RECV it stays: the next transition would add a new one. */
	if (BPF_CORE_READ(child, __sk_common.skc_state) != STATE_SYN_RECV)
		connection_forget(child);
	else if (connection)
		connection->scratch.emitted = true;
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
}

SEED(STATE_LISTEN)
