/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Transitions that no program saw. The connection's next transition shows this, or the end of its socket. */
#ifndef TCPSCOPE_MISSED_BPF_H
#define TCPSCOPE_MISSED_BPF_H

#include "connection.bpf.h"

#define STATE_BIT(state) (1U << STATE_##state)

/* The states that an object follows: it handles every transition out of them. */
#ifndef FOLLOWED
#define FOLLOWED (-1U)
#endif

/* Counts it, if the filter wants the connection. */
static __always_inline int missed_count(struct sock *sk, struct connection *connection)
{
	if (!connection->id.rport)
		identity_read(sk, &connection->id);
	else if (!connection->id.lport) /* an attempt */
		connection->id.lport = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	if (!ending && filter_pass(&connection->id, connection_owner(connection)))
		COUNT(missed);
	return 1;
}

/*
 * Did we miss a transition? `state` is the old state of this transition, or CLOSE at the end of the socket. Some kernels run
 * no BPF program in some tasks: if a softirq interrupts such a task, no program sees its transitions.
 */
static __noinline int missed_transition(struct sock *sk, struct connection *connection, int state)
{
	if (!connection->state || connection->state == state || !(FOLLOWED >> connection->state & 1))
		return 0;
	return missed_count(sk, connection);
}

/*
 * At the end of the socket, for an object that handles each transition to CLOSE, whatever it follows before: was that missed, in
 * a state that it does not follow?
 */
static __noinline __attribute__((unused)) int missed_close(struct sock *sk, struct connection *connection)
{
	if (!connection->state || connection->state == STATE_CLOSE || FOLLOWED >> connection->state & 1)
		return 0;
	return missed_count(sk, connection);
}

#endif
