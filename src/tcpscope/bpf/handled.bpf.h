/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * What a socket discards without a tracepoint. Before 5.17 tcp_drop() counts the packet in sk_drops and calls __kfree_skb(). All its
 * callers run within tcp_rcv_established() or tcp_rcv_state_process(). So programs remember which packet a socket handles, and look at
 * its sk_drops at each packet that is freed meanwhile: if it has grown, the socket has discarded this one.
 *
 * A softirq handles a packet while no process owns the socket, and softirqs do not nest. What has come while a process owned it,
 * the process handles when it releases the socket; a softirq may interrupt it there.
 */
#ifndef TCPSCOPE_HANDLED_BPF_H
#define TCPSCOPE_HANDLED_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"
#include "processor.bpf.h"
#include "window.bpf.h"

#define WATCHED 8

/* Of the stack at the entry of __kfree_skb(): the program, its trampoline, the function itself, and who has called it. */
#define FRAMES 4
#define CALLER 3

/* A counter of the kernel that tells why a socket has discarded a packet. */
struct watched {
	__u32 number; /* in its array; 0: unused */
	__u8 kind;
	__u8 counter;
	bool of_tcp; /* in tcp_statistics, not in net_statistics */
	__u8 padding;
};

const volatile struct watched watched[WATCHED];

struct handled {
	struct sock *sk; /* NULL: none */
	struct sk_buff *skb;
	__u64 counters[WATCHED]; /* of this CPU, at the last look, as is sk_drops */
	__u64 softirqs;          /* of struct processor, at the last look */
	__u32 cpu;
	__u32 drops;
	__u32 grown; /* which of them had grown at the last look; WATCHED: none, or it is not known */
	__u8 state;  /* of the socket at the entry */
	bool of_process;
	__u8 padding[2];
	__u64 frames[FRAMES];
};

struct processor {
	struct handled in_softirq;
	__u64 softirqs; /* packets that softirqs have handled on this CPU */
	__u64 offset;   /* from a per-CPU pointer; 0: not computed yet */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct processor);
} processors SEC(".maps");

/* By thread. Inserted when it begins to handle a packet, deleted when it has handled it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct handled);
} in_process SEC(".maps");

static __always_inline struct processor *processor_here(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&processors, &zero);
}

static __always_inline void watched_read(struct processor *here, struct sock *sk, struct handled *handled)
{
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	const char *general, *of_tcp;
	__u64 now;

	if (!here->offset)
		here->offset = cpu_offset(&processors, here);
	general = (const char *)BPF_CORE_READ(net, mib.net_statistics) + here->offset;
	of_tcp = (const char *)BPF_CORE_READ(net, mib.tcp_statistics) + here->offset;
	handled->grown = WATCHED;
#pragma unroll
	for (int i = WATCHED - 1; i >= 0; i--) {
		if (!watched[i].number)
			continue;
		bpf_probe_read_kernel(&now, 8, (watched[i].of_tcp ? of_tcp : general) + watched[i].number * 8);
		if (now != handled->counters[i])
			handled->grown = i;
		handled->counters[i] = now;
	}
}

/* A listener is not locked, and only a softirq handles its packets. */
static __always_inline int handled_begin(struct sock *sk, struct sk_buff *skb)
{
	struct processor *here = processor_here();
	struct handled new = {
		.sk = sk,
		.skb = skb,
		.cpu = bpf_get_smp_processor_id(),
		.drops = sk->sk_drops.counter,
		.state = sk->__sk_common.skc_state,
	};
	__u32 thread = bpf_get_current_pid_tgid();

	if (!here)
		return 0;
	new.of_process = sk->sk_lock.owned &&new.state != STATE_LISTEN;
	watched_read(here, sk, &new);
	if (!new.of_process) {
		new.softirqs = ++here->softirqs;
		here->in_softirq = new;
		return 0;
	}
	new.softirqs = here->softirqs;
	if (bpf_map_update_elem(&in_process, &thread, &new, BPF_ANY))
		COUNT(missed);
	return 0;
}

static __always_inline int handled_end(struct sock *sk)
{
	struct processor *here = processor_here();
	__u32 thread = bpf_get_current_pid_tgid();

	if (here && here->in_softirq.sk == sk)
		here->in_softirq.sk = NULL;
	else
		bpf_map_delete_elem(&in_process, &thread);
	return 0;
}

/* What is handled here and now: a softirq may have interrupted the thread. */
static __always_inline struct handled *handled_now(void)
{
	struct processor *here = processor_here();
	__u32 thread = bpf_get_current_pid_tgid();

	return here && here->in_softirq.sk ? &here->in_softirq : bpf_map_lookup_elem(&in_process, &thread);
}

/*
 * Has the socket just discarded this packet, which it has received? Its sk_drops is that of all CPUs. But those of a listener, which
 * refuses handshakes on several at once, are not needed: it discards a packet without ACK that is no proper SYN.
 */
static __noinline bool has_discarded(struct handled *handled, struct sk_buff *skb)
{
	struct sock *sk = handled->sk;
	__u32 drops = BPF_CORE_READ(sk, sk_drops.counter);
	bool grown = drops != handled->drops;
	__u8 flags = 0;

	handled->drops = drops;
	if (handled->state == STATE_LISTEN) {
		bpf_probe_read_kernel(&flags, 1, BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, transport_header) + 13);
		return skb == handled->skb && !(flags & TCP_ACK) && (flags & (TCP_SYN | TCP_FIN | TCP_RST)) != TCP_SYN;
	}
	return grown && (BPF_CORE_READ(skb, skb_iif) || BPF_CORE_READ(skb, sk) == sk);
}

/*
 * Which watched counter has grown since the last look? If a softirq has interrupted the process, or another CPU runs it now, that is
 * not known.
 */
static __noinline int handled_look(struct handled *handled)
{
	struct processor *here = processor_here();
	bool same = true;

	if (!here)
		return 0;
	if (handled->of_process) {
		same = handled->cpu == bpf_get_smp_processor_id() && handled->softirqs == here->softirqs;
		handled->cpu = bpf_get_smp_processor_id();
		handled->softirqs = here->softirqs;
	}
	watched_read(here, handled->sk, handled);
	if (!same)
		handled->grown = WATCHED;
	return 0;
}

/* Another CPU may discard a packet for a socket that a process owns: its backlog is full (sk_rcvqueues_full()). */
static __always_inline bool backlog_is_full(struct sock *sk)
{
	return BPF_CORE_READ(sk, sk_backlog.len) + BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter) >
	       BPF_CORE_READ(sk, sk_rcvbuf) + BPF_CORE_READ(sk, sk_sndbuf) + (64 << 10);
}

static __always_inline bool is_synchronized(__u8 state)
{
	return state != STATE_SYN_SENT && state != STATE_CLOSE && state != STATE_LISTEN;
}

#endif
