/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Changes of a connection's state that no program was given: seen afterwards, at whatever comes next. */
#ifndef TCPSCOPE_GAP_BPF_H
#define TCPSCOPE_GAP_BPF_H

#include "connection.bpf.h"
#include "attempt.bpf.h"  /* emits_attempt */
#include "accepted.bpf.h" /* emits_accepted */

/* Does every change matter that leads out of this state? */
static __always_inline bool is_followed(int state)
{
	if (emits_attempt || emits_accepted)
		return state == STATE_SYN_SENT || state == STATE_SYN_RECV || state == STATE_LISTEN ||
		       state == STATE_CLOSE;
	return true;
}

/*
 * Has no program been given what happened to it since the last change that was seen? `state` is where it is now, or comes
 * from. A kernel may have tasks in which it runs no BPF: what a softirq does that interrupts one of them is not seen.
 */
static __noinline int gap(struct sock *sk, struct connection *connection, int state)
{
	if (!connection->state || connection->state == state)
		return 0;
	if (!connection->id.rport)
		identity_read(sk, &connection->id);
	else if (!connection->id.lport) /* an attempt */
		connection->id.lport = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	if (filter_pass(&connection->id, connection_owner(connection)))
		COUNT(unseen);
	return 1;
}

/*
 * Before the end of a run, while changes are still seen. The programs come just before the change itself, so one of this
 * moment is no gap: the last one must be over for a second, and nothing may change while this looks.
 */
static long gap_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct sock *sk = (struct sock *)*key;
	enum tcp_state seen = connection->state, state = BPF_CORE_READ(sk, __sk_common.skc_state);
	__u64 changed_ns = *(volatile __u64 *)&connection->changed_ns;

	if (!seen || seen == state || (emits_attempt && state == STATE_LISTEN)) /* of attempts that is not followed */
		return 0;
	if (!changed_ns || (__s64)(bpf_ktime_get_ns() - changed_ns) < NSEC_PER_SEC)
		return 0;
	if (BPF_CORE_READ(sk, __sk_common.skc_state) == state)
		gap(sk, connection, state);
	return 0;
}

#endif
