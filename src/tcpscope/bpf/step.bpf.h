/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The three steps of a connection that an application knows: connected, accepted, closed. */
#ifndef TCPSCOPE_STEP_BPF_H
#define TCPSCOPE_STEP_BPF_H

#include "connection.bpf.h"
#include "event.bpf.h"

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

const volatile bool emits_step;

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

/* `id` is the connection's, if there is one. */
static __always_inline void step_changed(const struct connection *connection, const struct identity *id,
					 const struct held *change)
{
	const struct owner *owner = connection_owner(connection);

	if (!emits_step)
		return;
	if (change->new_state == STATE_ESTABLISHED &&
	    (change->old_state == STATE_SYN_SENT || (connection && connection->role == ROLE_ACTIVE)))
		step_emit(change->time_ns, id, owner, STEP_CONNECT);
	else if (change->new_state == STATE_CLOSE && had_life(connection, change->old_state))
		step_emit(change->time_ns, id, owner, STEP_CLOSE);
}

#endif
