/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Why a connection ends: the error of its socket. An object that includes this has a field `error` in its scratch, and defines
 * message_reported(sk), for a message in the error queue of a socket without an error.
 */
#ifndef TCPSCOPE_ERROR_BPF_H
#define TCPSCOPE_ERROR_BPF_H

#include "connection.bpf.h"

/*
 * Does this error of the socket end the connection? Any error ends an active open. Later the cause is a RST, another program
 * (`ss -K`, bpf_sock_destroy()), or a timer that gives up: its error is the soft error if there is one. An ICMP error that
 * the kernel reports to a socket with IP_RECVERR ends nothing.
 */
static __always_inline bool error_ends(struct sock *sk, const struct connection *connection, __u32 error)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	return state == STATE_SYN_SENT || (state == STATE_SYN_RECV && connection && connection->role == ROLE_ACTIVE) ||
	       error == ECONNRESET || error == EPIPE || error == ECONNABORTED || error == ETIMEDOUT ||
	       error == (__u32)BPF_CORE_READ(sk, sk_err_soft);
}

static __always_inline void message_reported(struct sock *sk);

/* The kernel reports to the socket's owner that it has an error, or a message in its error queue. */
static __always_inline void error_reported(struct sock *sk)
{
	__u32 error = BPF_CORE_READ(sk, sk_err);
	struct connection *connection = error ? connection_find(sk) : NULL;

	if (!error)
		message_reported(sk);
	else if (connection && error_ends(sk, connection, error))
		connection->scratch.error = error;
}

/* The error that closes the socket: the present one, or one that its owner has fetched; 0: none. */
static __always_inline __u32 error_of(struct sock *sk, const struct connection *connection)
{
	__u32 error = BPF_CORE_READ(sk, sk_err);

	if (error && error_ends(sk, connection, error))
		return error;
	return connection ? connection->scratch.error : 0;
}

/*
 * The kernel reports the socket's error to its owner. Before "tcp: fix race in tcp_write_err()" (6.10) it does so before the
 * transition to CLOSE. By then the owner, on another processor, may have fetched the error, which erases it. This function
 * wakes the owner; the tracepoint comes after that.
 */
OPTIONAL("an error that the application fetched before the socket was closed")
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
