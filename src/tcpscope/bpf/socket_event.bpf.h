/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* An event of a socket whose owner the object `owner` knows: with this, a probe is its hook and its event struct. */
#ifndef TCPSCOPE_SOCKET_EVENT_BPF_H
#define TCPSCOPE_SOCKET_EVENT_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"
#include "state.bpf.h"
#define CONNECTIONS_ARE SHARED("owner")
#include "connection.bpf.h"

/*
 * Room for an event of `size` bytes about the socket `of`, begun; NULL if it is not asked for or there is no room. Its owner
 * is that of `owned`: the same socket, or for a request its listener.
 */
static __always_inline void *socket_event_begin(__u64 size, struct sock *of, __u64 cookie, struct sock *owned)
{
	const struct connection *connection = connection_find(owned);
	struct identity id = {.cookie = cookie};

	identity_read(of, &id);
	return event_begin(size, bpf_ktime_get_ns(), &id, connection_owner(connection));
}

#endif
