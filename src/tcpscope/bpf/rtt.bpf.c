// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Round-trip times, one sample for each acknowledgement that moved its connection forward.
 *
 * tcp_probe fires for each segment that an established connection receives, before the segment is processed. What the
 * kernel measured from the segment before stands in the socket then: rack.rtt_us, the time from the last transmission
 * of the newest delivered packet (rack.mstamp) until its acknowledgement. A sample is taken when that packet is another
 * one than at the last look: a receiver of data gives none, however many segments it gets. The handshake's sample is
 * taken when the connection is established (nothing but the smoothed RTT holds it then), the last one at its end.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "connection.bpf.h"

/*
 * Buckets: exact below 8 us, then 8 per power of two, so a value is known to 1/8 of itself; the last of them begins far
 * above 2^32 us.
 * output/histogram.py has the same formula.
 */
#define SUB_BITS 3
#define BUCKETS 256 /* a power of two, so that a mask bounds the index */
#define MAX_SHARDS 16

struct rtt_key {
	__u64 cookie;
	__u8 laddr[16];
	__u8 raddr[16];
	__u32 pid;
	__u16 lport;
	__u16 rport;
	__u32 epoch; /* changes with the interval, so that one can be read while the next is filled */
	__u8 family;
	__u8 padding[3];
	char comm[16];
};

struct rtt_value {
	__u64 sum_us;
	__u32 max_us[MAX_SHARDS]; /* by CPU: 5.10 has no compare-and-exchange */
	__u32 min_us[MAX_SHARDS]; /* 0: none yet; stored plus one */
	__u32 buckets[BUCKETS];
};

const struct rtt_key *rtt_key_anchor __attribute__((unused));
const struct rtt_value *rtt_value_anchor __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct rtt_key);
	__type(value, struct rtt_value);
} rtts SEC(".maps");

/* Inserted when a connection is first seen, deleted at tcp_destroy_sock. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64); /* address of the struct sock */
	__type(value, __u64); /* rack.mstamp at the last look */
} last_seen SEC(".maps");

/* Filled by user space before loading. */
const volatile bool by_laddr, by_raddr, by_lport, by_rport, by_pid, by_connection;
const volatile bool want_owner;
const volatile bool smoothed;

__u32 epoch;

static const struct rtt_value new_value;

static __always_inline __u32 bucket_of(__u32 us)
{
	__u32 log2 = 0, value = us;

	if (us < (1 << SUB_BITS))
		return us;
	if (value >> 16) {
		value >>= 16;
		log2 += 16;
	}
	if (value >> 8) {
		value >>= 8;
		log2 += 8;
	}
	if (value >> 4) {
		value >>= 4;
		log2 += 4;
	}
	if (value >> 2) {
		value >>= 2;
		log2 += 2;
	}
	log2 += value >> 1;
	return ((log2 - SUB_BITS + 1) << SUB_BITS) + ((us >> (log2 - SUB_BITS)) & ((1 << SUB_BITS) - 1));
}

static __noinline int record(struct sock *sk, const struct identity *id, const struct owner *owner, __u32 us)
{
	struct rtt_key key = {.epoch = epoch};
	struct rtt_value *value;
	__u32 shard = bpf_get_smp_processor_id() & (MAX_SHARDS - 1);
	__u32 bucket = bucket_of(us);

	if (by_laddr || by_connection)
		__builtin_memcpy(key.laddr, id->laddr, 16);
	if (by_raddr || by_connection)
		__builtin_memcpy(key.raddr, id->raddr, 16);
	if (by_lport || by_connection)
		key.lport = id->lport;
	if (by_rport || by_connection)
		key.rport = id->rport;
	if (by_laddr || by_raddr || by_connection)
		key.family = id->family;
	if (by_connection)
		key.cookie = id->cookie;
	if ((by_pid || by_connection) && owner) {
		key.pid = owner->pid;
		__builtin_memcpy(key.comm, owner->comm, 16);
	}
	value = bpf_map_lookup_elem(&rtts, &key);
	if (!value) {
		bpf_map_update_elem(&rtts, &key, &new_value, BPF_NOEXIST);
		value = bpf_map_lookup_elem(&rtts, &key);
	}
	if (!value) {
		COUNT(lost);
		return 0;
	}
	__sync_fetch_and_add(&value->buckets[bucket & (BUCKETS - 1)], 1);
	__sync_fetch_and_add(&value->sum_us, us);
	if (us > value->max_us[shard])
		value->max_us[shard] = us;
	if (!value->min_us[shard] || us + 1 < value->min_us[shard])
		value->min_us[shard] = us + 1;
	return 0;
}

static __noinline int sample(struct sock *sk, __u64 cookie, __u32 us)
{
	const struct owner *owner = NULL;
	struct identity id = {};

	COUNT(seen);
	identity_read(sk, &id);
	id.cookie = cookie;
	if (want_owner)
		owner = connection_owner(connection_find(sk));
	if (!filter_pass(&id, owner)) {
		COUNT(filtered);
		return 0;
	}
	return record(sk, &id, owner, us);
}

static __always_inline void look(struct sock *sk, __u64 cookie)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	__u64 mstamp = BPF_CORE_READ(tcp, rack.mstamp);
	__u64 key = (__u64)sk;
	__u64 *seen = bpf_map_lookup_elem(&last_seen, &key);

	if (!seen) {
		/* Older than the tool: what was measured before it was seen is not counted. */
		if (bpf_map_update_elem(&last_seen, &key, &mstamp, BPF_ANY))
			COUNT(table_full);
		return;
	}
	if (*seen == mstamp)
		return;
	*seen = mstamp;
	sample(sk, cookie, smoothed ? BPF_CORE_READ(tcp, srtt_us) >> 3 : BPF_CORE_READ(tcp, rack.rtt_us));
}

/* 0: the SYN or SYN-ACK was retransmitted, and nobody knows which one was answered. */
static __always_inline void look_at_handshake(struct sock *sk, __u64 cookie)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	__u64 mstamp = BPF_CORE_READ(tcp, rack.mstamp);
	__u32 us = BPF_CORE_READ(tcp, srtt_us) >> 3;
	__u64 key = (__u64)sk;

	if (bpf_map_update_elem(&last_seen, &key, &mstamp, BPF_ANY))
		COUNT(table_full);
	if (us)
		sample(sk, cookie, us);
}

SEC("tp_btf/tcp_probe")
int BPF_PROG(segment, struct sock *sk)
{
	look(sk, COOKIE_OF(sk));
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state, struct sock *sk, int old_state, int new_state)
{
	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (want_owner)
		connection_transition(sk, old_state, new_state);
	if (new_state == STATE_ESTABLISHED)
		look_at_handshake(sk, COOKIE_OF(sk));
	else if (new_state == STATE_CLOSE && old_state != STATE_LISTEN && old_state != STATE_SYN_SENT)
		look(sk, COOKIE_OF(sk));
	return 0;
}

SEC("fexit/inet_csk_accept")
int accept__fexit(__u64 *ctx)
{
	connection_accepted(ACCEPTED_CHILD(ctx));
	return 0;
}

SEC("kretprobe/inet_csk_accept")
int BPF_KRETPROBE(accept__kretprobe, struct sock *child)
{
	connection_accepted(child);
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(accept__syscall, struct pt_regs *regs, long fd)
{
	connection_accepted(sock_of_accept(regs, fd));
	return 0;
}

SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(destroy, struct sock *sk)
{
	__u64 key = (__u64)sk;

	bpf_map_delete_elem(&last_seen, &key);
	if (want_owner)
		connection_forget(sk);
	return 0;
}

SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (task && file)
		connection_seed(task, file, 0);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
