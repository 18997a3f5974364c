/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* A connection that was handed to a process by accept(), and the queue it waited in. */
#ifndef TCPSCOPE_ACCEPTED_BPF_H
#define TCPSCOPE_ACCEPTED_BPF_H

#include "connection.bpf.h"
#include "event.bpf.h"

struct accepted {
	struct event event;
	__u8 listener[16] KIND("address") UNKNOWN_IS("max") DOC("address that the listener is bound to");
	__u64 listener_cookie UNKNOWN_IS("zero") DOC("socket cookie of the listener");
	__u64 wait_us UNIT("us") UNKNOWN_IS("max") DOC("time in the accept queue");
	__u32 accept_queue TITLE("ACCEPTQ") UNKNOWN_IS("max")
	DOC("connections that still wait in the listener's accept queue");
	__u32 accept_limit TITLE("LIMIT") UNKNOWN_IS("max") DOC("its limit: one more than this fits");
};

const struct accepted *accepted_anchor __attribute__((unused));

const volatile bool emits_accepted;

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

#endif
