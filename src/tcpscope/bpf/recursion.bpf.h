/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * With "bpf: Prevent bpf program recursion for raw tracepoint probes" (6.1) the kernel skips a program on a CPU where it
 * runs already. A softirq that interrupts the program, and passes the same tracepoint, would be lost. So such a program is
 * attached twice: the tracepoint calls the second copy after the first, and the second handles what the first was
 * skipped for. One interruption leaves it free, and softirqs do not nest.
 *
 * Whether the first copy ran is seen in what it left behind. A transition that it handled is in the table, as the
 * state of the connection's entry; at the end of a socket it has deleted the entry; and a second look at a segment
 * finds nothing new. So the second copy needs no notes. It leaves alone a socket that has no entry, unless the transition
 * makes one: the first copy handled it and forgot the socket, or the filter excludes it, or the table is full and the account
 * says so, or it is a socket older than the tool that no process holds.
 *
 * A process that is preempted within a program makes the kernel skip it on that CPU until the process runs again. Before 7.0
 * no process is preempted at a tracepoint. Since then it may be, in a few instructions at both ends of a copy
 * (processor_release). An event is lost if both copies are blocked: a missed transition, see missed.bpf.h.
 */
#ifndef TCPSCOPE_RECURSION_BPF_H
#define TCPSCOPE_RECURSION_BPF_H

#include "connection.bpf.h"

/*
 * For the second copy: was the first one skipped? `makes_entry`: the first copy leaves an entry of a socket that had none.
 */
static __always_inline bool was_skipped(struct sock *sk, int new_state, bool makes_entry)
{
	struct connection *connection = connection_find(sk);

	if (connection ? connection->state == new_state : !makes_entry || !connection_add(sk))
		return false;
	COUNT(rescued);
	return true;
}

#endif
