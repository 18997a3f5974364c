/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The connections that `trace` follows. */
#ifndef TCPSCOPE_TRACE_FLOWS_BPF_H
#define TCPSCOPE_TRACE_FLOWS_BPF_H

static __always_inline struct flow *flow_find(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&flows, &key);
}

static __always_inline void ends_of(const struct identity *id, struct ends *ends)
{
	__builtin_memcpy(ends->laddr, id->laddr, 16);
	__builtin_memcpy(ends->raddr, id->raddr, 16);
	ends->lport = id->lport;
	ends->rport = id->rport;
	ends->netns = id->netns;
}

/* Without a test in the loop, of which the verifier would follow each turn apart. */
static __always_inline void waiting_clear(struct flow *flow, struct sock *sk, __u32 queue)
{
	__u32 first = flow->first[queue];
	const struct waiting *oldest = waiting_find(sk, queue, first);

	if (first == flow->next[queue])
		return;
	/* Before 5.17 it may have been read or acknowledged together with too many others, and have waited for its turn. */
	if (oldest && !is_after(oldest->piece.end_seq, flow->taken[queue]))
		COUNT_MANY(missed, flow->next[queue] - first);
	for (int i = 0; i < DEPTH; i++)
		waiting_delete(sk, queue, first + i);
}

/* 1 if there was an entry to delete. */
static __noinline int destroyed(struct sock *sk)
{
	struct flow *flow = flow_find(sk);
	__u64 key = (__u64)sk, *known;
	struct ends ends;

	if (!flow)
		return 0;
	waiting_clear(flow, sk, OF_READS);
	waiting_clear(flow, sk, OF_ACKS);
	ends_of(&flow->id, &ends);
	known = bpf_map_lookup_elem(&sockets, &ends);
	if (known && *known == key)
		bpf_map_delete_elem(&sockets, &ends);
	bpf_map_delete_elem(&flows, &key);
	return 1;
}

static __noinline struct flow *flow_add(struct sock *sk, const struct identity *id)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	__u64 key = (__u64)sk;
	struct flow *flow;
	struct ends ends;

	table_put(&flows, &key, &new_flow, BPF_NOEXIST);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow) {
		COUNT(table_full);
		return NULL;
	}
	flow->sk = key;
	flow->id = *id;
	flow->taken[OF_ACKS] = BPF_CORE_READ(tcp, snd_una);
	flow->taken[OF_READS] = BPF_CORE_READ(tcp, copied_seq);
	flow->ends[OF_READS] = BPF_CORE_READ(tcp, rcv_nxt);
	ends_of(id, &ends);
	if (bpf_map_update_elem(&sockets, &ends, &key, BPF_ANY))
		COUNT(table_full);
	return flow;
}

/* Is it a connection's own socket? That of the kernel, which sends RSTs and the ACKs of TIME_WAIT, is in CLOSE. */
static __always_inline bool is_of_connection(__u8 state)
{
	return state != STATE_TIME_WAIT && state != STATE_NEW_SYN_RECV && state != STATE_LISTEN && state != STATE_CLOSE;
}

static __always_inline bool is_connection(struct sock *sk)
{
	return is_of_connection(BPF_CORE_READ(sk, __sk_common.skc_state));
}

static __always_inline bool are_ports_chosen(__u16 lport, __u16 rport)
{
	if (filter.has_port && !PORT_IN(filter_port, lport) && !PORT_IN(filter_port, rport))
		return false;
	return (!filter.has_lport || PORT_IN(filter_lport, lport)) &&
	       (!filter.has_rport || PORT_IN(filter_rport, rport));
}

/* What is cheap to ask of a connection, before all else is read of it. Its local port is 0 when it has ended. */
static __always_inline bool may_be_chosen(struct sock *sk)
{
	__u16 lport = sk->__sk_common.skc_num;

	return !lport || are_ports_chosen(lport, bpf_ntohs(sk->__sk_common.skc_dport));
}

static __always_inline bool is_other(struct sock *sk)
{
	return sk && is_of_connection(sk->__sk_common.skc_state) && !may_be_chosen(sk);
}

/* Has something passed that no program has seen? `begins` is where what was seen has to end, or later. */
static __always_inline void follow_on(struct flow *flow, int which, __u32 begins, __u32 end_seq)
{
	if (flow->ends[which] && is_after(begins, flow->ends[which]))
		COUNT(missed);
	if (!flow->ends[which] || is_after(end_seq, flow->ends[which]))
		flow->ends[which] = end_seq;
}

#endif
