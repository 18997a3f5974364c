/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The end of a socket. The object that includes this has defined destroyed(), which deletes the socket's entries and says
 * whether there were any. After the first copy there are none, so the second copy needs no other sign (recursion.bpf.h).
 */
#ifndef TCPSCOPE_DESTROY_BPF_H
#define TCPSCOPE_DESTROY_BPF_H

#include "compat.bpf.h"
#include "output.bpf.h"

ROLE("forgets")
SEC("tp_btf/tcp_destroy_sock")
int TRACEPOINT_PROG(destroy, struct sock *sk)
{
	destroyed(sk);
	return 0;
}

AGAIN
ROLE("forgets")
SEC("tp_btf/tcp_destroy_sock")
int TRACEPOINT_PROG(destroy_again, struct sock *sk)
{
	if (destroyed(sk))
		COUNT(rescued);
	return 0;
}

#endif
