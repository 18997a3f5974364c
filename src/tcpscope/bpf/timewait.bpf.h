/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * What follows CLOSE: a timewait socket, or nothing. An object that includes this defines timewait(). The hooks call it
 * before the transition to CLOSE.
 */
#ifndef TCPSCOPE_TIMEWAIT_BPF_H
#define TCPSCOPE_TIMEWAIT_BPF_H

#include "connection.bpf.h"

const volatile bool hooked_timewait;

/* The kernel wants a timewait socket in `state`; `made`: it had memory for one. */
static __always_inline void timewait(struct connection *connection, int state, bool made);

static __always_inline void timewait_called(struct sock *sk, int state, bool made)
{
	struct connection *connection = connection_find(sk);

	if (connection)
		timewait(connection, state, made);
}

OPTIONAL("what follows CLOSE")
SEC("fexit/inet_twsk_alloc")
int FUNCTION_PROG(timewait__fexit, struct sock *sk, void *death_row, int state, void *timewait_sock)
{
	timewait_called(sk, state, timewait_sock);
	return 0;
}

SEC("kprobe/tcp_time_wait")
int BPF_KPROBE(timewait__kprobe, struct sock *sk, int state)
{
	timewait_called(sk, state, true);
	return 0;
}

#endif
