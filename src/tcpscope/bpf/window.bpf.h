/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Whether a segment is in the receive window. */
#ifndef TCPSCOPE_WINDOW_BPF_H
#define TCPSCOPE_WINDOW_BPF_H

#include "kernel.bpf.h"

/* Where a segment is: tcp_sequence(). */
enum window { WINDOW_BEFORE, WINDOW_IN, WINDOW_BEYOND };

static __always_inline enum window window_of(struct sock *sk, const struct tcp_skb_cb *segment)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	__u32 offered = BPF_CORE_READ(tcp, rcv_wup), next = BPF_CORE_READ(tcp, rcv_nxt);
	__u32 end = offered + BPF_CORE_READ(tcp, rcv_wnd);

	if ((__s32)(end - next) < 0)
		end = next;
	if ((__s32)(BPF_CORE_READ(segment, end_seq) - offered) < 0)
		return WINDOW_BEFORE;
	return (__s32)(BPF_CORE_READ(segment, seq) - end) > 0 ? WINDOW_BEYOND : WINDOW_IN;
}

#endif
