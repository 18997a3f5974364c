/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Why a connection ends: the error of its socket. An object that includes this has `error` in its scratch. */
#ifndef TCPSCOPE_ERROR_BPF_H
#define TCPSCOPE_ERROR_BPF_H

#include "connection.bpf.h"

/*
 * Does this error of the socket end the connection? In an active open any does. Later it comes from a RST, from
 * another program (`ss -K`, bpf_sock_destroy()), or from a timer that gives up, and then it is the soft error where there is
 * one. What ICMP said to a socket with IP_RECVERR ends nothing.
 */
static __always_inline bool error_ends(struct sock *sk, const struct connection *connection, __u32 error)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	return state == STATE_SYN_SENT || (state == STATE_SYN_RECV && connection && connection->role == ROLE_ACTIVE) ||
	       error == ECONNRESET || error == EPIPE || error == ECONNABORTED || error == ETIMEDOUT ||
	       error == (__u32)BPF_CORE_READ(sk, sk_err_soft);
}

/* The owner is told of an error. */
static __always_inline void error_reported(struct sock *sk)
{
	__u32 error = BPF_CORE_READ(sk, sk_err);
	struct connection *connection = error ? connection_find(sk) : NULL;

	if (connection && error_ends(sk, connection, error))
		connection->scratch.error = error;
}

/* Why it is being closed: the error that is in the socket, or was; 0: none. */
static __always_inline __u32 error_of(struct sock *sk, const struct connection *connection)
{
	__u32 error = BPF_CORE_READ(sk, sk_err);

	if (error && error_ends(sk, connection, error))
		return error;
	return connection ? connection->scratch.error : 0;
}

/*
 * The socket's error is told to its owner. Before "tcp: fix race in tcp_write_err()" (6.10) that comes before the change
 * of state, and the owner, on another processor, may have fetched and so erased it by then. This function wakes the owner
 * up; the tracepoint comes after it.
 */
OPTIONAL("an error that was fetched just before its socket was closed")
SEC("fentry/sock_def_error_report")
int FUNCTION_PROG(error__fentry, struct sock *sk)
{
	error_reported(sk);
	return 0;
}

SEC("kprobe/sock_def_error_report")
int BPF_KPROBE(error__kprobe, struct sock *sk)
{
	error_reported(sk);
	return 0;
}

SEC("tp_btf/inet_sk_error_report")
int TRACEPOINT_PROG(error__tracepoint, struct sock *sk)
{
	error_reported(sk);
	return 0;
}

#endif
