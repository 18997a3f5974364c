/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What every event begins with. event_begin() counts each event, filters it and reserves its room. */
#ifndef TCPSCOPE_EVENT_BPF_H
#define TCPSCOPE_EVENT_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"
#include "identity.bpf.h"
#include "filter.bpf.h"

struct event {
	__u64 time_ns KIND("time") UNIT("ns") DOC("when it happened");
	struct identity id;
	struct owner owner;
};

/*
 * Reserves an event of `size` bytes, and fills its `struct event`. NULL if the filter excludes it or the ring is full.
 * `owner` may be NULL.
 */
static __always_inline void *event_begin(__u64 size, __u64 time_ns, const struct identity *id,
					 const struct owner *owner)
{
	struct event *event;

	COUNT(seen);
	if (!filter_pass(id, owner)) {
		COUNT(filtered);
		return NULL;
	}
	event = event_reserve(size);
	if (!event)
		return NULL;
	event->time_ns = time_ns;
	event->id = *id;
	if (owner)
		event->owner = *owner;
	else
		__builtin_memset(&event->owner, 0, sizeof(event->owner));
	if (!event->owner.pid)
		event->owner.uid = -1;
	return event;
}

#endif
