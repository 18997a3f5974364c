/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The listener of a child. The child's address does not tell it: SO_REUSEPORT, sk_lookup programs, TPROXY and migration
 * choose a listener by something else. The function that makes the child has the listener as argument. Where functions
 * cannot be hooked, the listener's wake-up tells: the kernel wakes it in the same softirq, right after the child's second
 * transition (tcp_child_process()) or, with TCP Fast Open, after its first (tcp_conn_request()).
 *
 * An object that includes this defines child_known(). The hook of the wake-up calls it when it has found the listener.
 */
#ifndef TCPSCOPE_CHILD_BPF_H
#define TCPSCOPE_CHILD_BPF_H

#include "connection.bpf.h"

const volatile bool hooked_child_woken;

static __always_inline void child_known(struct sock *child, struct connection *connection);

static __always_inline void at_birth_note(struct sock *sk)
{
	__u32 zero = 0;
	__u64 *place = bpf_map_lookup_elem(&at_birth, &zero);

	if (place)
		*place = (__u64)sk;
}

OPTIONAL("the listener of a connection at its birth")
SEC("fentry/tcp_v4_syn_recv_sock")
int FUNCTION_PROG(child4__fentry, struct sock *listener)
{
	at_birth_note(listener);
	return 0;
}

SEC("kprobe/tcp_v4_syn_recv_sock")
int BPF_KPROBE(child4__kprobe, struct sock *listener)
{
	at_birth_note(listener);
	return 0;
}

OPTIONAL("the listener of a connection at its birth")
SEC("fentry/tcp_v6_syn_recv_sock")
int FUNCTION_PROG(child6__fentry, struct sock *listener)
{
	at_birth_note(listener);
	return 0;
}

SEC("kprobe/tcp_v6_syn_recv_sock")
int BPF_KPROBE(child6__kprobe, struct sock *listener)
{
	at_birth_note(listener);
	return 0;
}

/* The child of this CPU, not the last one in the accept queue: other CPUs may add children of the same listener. */
static __always_inline int listener_woken(struct sock *listener)
{
	__u32 zero = 0;
	__u64 *place = bpf_map_lookup_elem(&at_birth, &zero);
	struct sock *child = place ? (struct sock *)*place : NULL;
	struct connection *connection = child ? connection_find(child) : NULL;

	if (place)
		*place = 0;
	if (connection && connection->role == ROLE_PASSIVE && !connection->listener) {
		connection_of_listener(connection, listener);
		child_known(child, connection);
	}
	return 0;
}

UNLESS("child4__fentry child4__kprobe")
OPTIONAL("the listener of a connection before accept()")
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_tcp_listener(listener), child_woken, struct sock *listener)
{
	return listener_woken(listener);
}

/* The first copy leaves no child at its place. */
UNLESS("child4__fentry child4__kprobe")
AGAIN
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_tcp_listener(listener), child_woken_again, struct sock *listener)
{
	return listener_woken(listener);
}

#endif
