/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The kernel's own counters on this CPU. Programs read them before and after a function call. */
#ifndef TCPSCOPE_MIB_BPF_H
#define TCPSCOPE_MIB_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"
#include "processor.bpf.h"

/* Numbers of the counters. User space sets them before loading: their enum is anonymous, so CO-RE cannot name it. */
const volatile __u32 mib_listen_overflows;
const volatile __u32 mib_listen_drops;
const volatile __u32 mib_reqq_full_cookies;
const volatile __u32 mib_reqq_full_drop;
const volatile __u32 mib_cookies_sent;
const volatile __u32 mib_embryonic_rsts;
const volatile __u32 mib_fast_open_fails;

struct mib {
	__u64 overflows, drops, cookies, full, fast_open_fails;
};

/* The functions that refuse a handshake. Each may call those below it, for the same packet. */
enum function {
	FUNCTION_NONE,
	FUNCTION_SYN,  /* tcp_conn_request: TCP Fast Open makes the child within it (tcp_fastopen_create_child) */
	FUNCTION_ACK6, /* tcp_v6_syn_recv_sock: calls the next one for a v4-mapped handshake */
	FUNCTION_ACK4, /* tcp_v4_syn_recv_sock */
};

/*
 * The packet that this CPU handles, and the outermost function that handles it. Softirqs do not nest, so one place per CPU
 * is enough.
 */
struct in_hand {
	struct sock *sk;
	struct sk_buff *skb;
	struct request_sock *req;
	struct mib before;
	__u32 function;
	bool fast_open; /* TCP Fast Open has failed to make the child at the SYN */
	bool reset;     /* the kernel has sent a RST; only where tracepoints alone show refusals */
	__u64 consumed; /* address of the packet at which the first copy has looked, for the second (refused.bpf.h) */
	bool unnamed;   /* `sk` is one of several listeners of the address, and it is not known which has refused */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct in_hand);
} in_hand SEC(".maps");

static __always_inline void mib_read_at(const char *counters, struct mib *mib)
{
	bpf_probe_read_kernel(&mib->overflows, 8, counters + mib_listen_overflows * 8);
	bpf_probe_read_kernel(&mib->drops, 8, counters + mib_listen_drops * 8);
	bpf_probe_read_kernel(&mib->cookies, 8, counters + mib_reqq_full_cookies * 8);
	bpf_probe_read_kernel(&mib->full, 8, counters + mib_reqq_full_drop * 8);
	bpf_probe_read_kernel(&mib->fast_open_fails, 8, counters + mib_fast_open_fails * 8);
}

static __noinline int mib_read(struct in_hand *mine, struct mib *mib)
{
	struct sock *sk = mine->sk;

	mib_read_at((char *)BPF_CORE_READ(sk, __sk_common.skc_net.net, mib.net_statistics) + cpu_offset(&in_hand, mine),
		    mib);
	return 0;
}

#endif
