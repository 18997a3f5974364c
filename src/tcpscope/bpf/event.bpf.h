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

#ifdef HAS_GROUPS
#include "groups.bpf.h"
#define IS_GROUPING grouping
#else
#define IS_GROUPING false
#define group_add(event)
#endif

/* How much of an event is only counted: an object may leave out the end, which is no column to group by. */
#ifndef COUNTED_BYTES
#define COUNTED_BYTES(size) (size)
#endif

const volatile __u32 rate_per_s; /* at most so many events in a second; 0: no limit */

struct {
	__u64 second; /* of the kernel's clock */
	__u64 events; /* submitted in it; processors may count at once and lose some, so there can be a few events more */
} rate;

static __always_inline bool over_rate(__u64 now_ns)
{
	if (rate.second != now_ns / 1000000000) {
		rate.second = now_ns / 1000000000;
		rate.events = 0;
	}
	return rate.events++ >= rate_per_s;
}

/*
 * An event of `size` bytes, with its `struct event` filled. NULL if the filter excludes it, --rate does, or the ring is full.
 * `owner` may be NULL. `room` is memory of the caller, of that size, for an event that is only counted: for objects with
 * HAS_GROUPS.
 */
static __always_inline void *event_begin_in(void *room, __u64 size, __u64 time_ns, const struct identity *id,
					    const struct owner *owner)
{
	struct event *event;

	COUNT(seen);
	if (!filter_pass(id, owner)) {
		COUNT(filtered);
		return NULL;
	}
	if (IS_GROUPING) {
		__builtin_memset(room, 0, COUNTED_BYTES(size));
		event = room;
	} else {
		if (rate_per_s && over_rate(bpf_ktime_get_ns())) {
			COUNT(limited);
			return NULL;
		}
		event = event_reserve(size);
		if (!event)
			return NULL;
	}
	barrier_var(event); /* the compiler would move address calculations before the test */
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

static __always_inline void *event_begin(__u64 size, __u64 time_ns, const struct identity *id,
					 const struct owner *owner)
{
	return event_begin_in(NULL, size, time_ns, id, owner);
}

/* Counts an event, or sends it. 0, for a program to return. */
#define event_submit(event)                                  \
	({                                                   \
		if (IS_GROUPING)                             \
			group_add((__u64 *)(event));         \
		else                                         \
			event_send(event, sizeof(*(event))); \
		0;                                           \
	})

#endif
