/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Events about sockets whose owner the object `owner` knows. A probe adds its event struct and its hooks. */
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
 * An event of `size` bytes about the socket `of`, as event_begin_in() makes it. Its owner is the owner of `owned`: the same
 * socket, or the listener of a request.
 */
static __always_inline void *socket_event_begin(void *room, __u64 size, struct sock *of, __u64 cookie,
						struct sock *owned)
{
	const struct connection *connection = connection_find(owned);
	struct identity id = {.cookie = cookie};

	identity_read(of, &id);
	return event_begin_in(room, size, bpf_ktime_get_ns(), &id, connection_owner(connection));
}

#endif
