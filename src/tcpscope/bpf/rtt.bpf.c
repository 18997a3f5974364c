// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Round-trip times: one sample per ACK of new data.
 *
 * tcp_probe fires for each segment that an established connection receives, before the kernel processes the segment. Then
 * the socket still has what the kernel measured at the segment before: rack.rtt_us, the time from the last transmission of
 * the newest delivered packet (rack.mstamp, rack.end_seq) to its ACK. If that packet is not the one of the last look, the
 * program takes a sample. So a receiver of data gives no samples. Packets that were sent together have the same time stamp:
 * hence rack.end_seq too. A packet is what TCP hands to the device, up to 64 KB with segmentation offload. Without SACK the
 * kernel keeps no such record, and only the handshake gives a sample.
 *
 * The handshake gives its sample when the connection is established; only the smoothed RTT has it then. Each transition is
 * one more look. The segments of a connection that one side has closed do not pass tcp_probe. Where functions can be
 * hooked, the program looks at them in tcp_rcv_state_process().
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "files.bpf.h"
#define CONNECTIONS_ARE SHARED("owner")
#include "connection.bpf.h"
#include "recursion.bpf.h"
#include "distribution.bpf.h"

struct rtt_key {
	__u64 cookie;
	__u8 laddr[16];
	__u8 raddr[16];
	__u32 pid;
	__u16 lport;
	__u16 rport;
	__u8 family;
	__u8 padding[7];
	char comm[16];
};

struct rtt_value {
	struct distribution us;
	__u32 owner_pid; /* by connection: the last owner, because accept() may change it */
	char owner_comm[16];
	__u32 padding;
};

AGGREGATE(rtts, rtt_key, rtt_value, 4096)

/* The newest delivered packet. */
struct delivered {
	__u64 mstamp;
	__u64 end_seq;
};

/* The cookie of the first look is kept: on 5.10 a socket may get one later, and its key must not change. */
struct last_look {
	struct delivered newest;
	__u64 cookie;
	__u64 established; /* the handshake has given its sample, and the state is still ESTABLISHED */
};

/* Inserted when a connection is first seen, deleted at tcp_destroy_sock. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct last_look);
} last_seen SEC(".maps");

/* Filled by user space before loading. */
const volatile bool by_laddr, by_raddr, by_lport, by_rport, by_pid, by_connection;
const volatile bool want_owner;
const volatile bool smoothed;

static __noinline int record(struct sock *sk, const struct identity *id, const struct owner *owner, __u32 us)
{
	struct rtt_key key = {};
	struct rtt_value *value;

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
	if (by_pid && owner) {
		key.pid = owner->pid;
		__builtin_memcpy(key.comm, owner->comm, 16);
	}
	value = rtts_at(&key);
	if (!value)
		return 0;
	if (by_connection && owner && owner->pid) {
		value->owner_pid = owner->pid;
		__builtin_memcpy(value->owner_comm, owner->comm, 16);
	}
	distribution_add(&value->us, us);
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

static __always_inline struct delivered delivered_read(struct tcp_sock *tcp)
{
	struct delivered newest = {.mstamp = BPF_CORE_READ(tcp, rack.mstamp),
				   .end_seq = BPF_CORE_READ(tcp, rack.end_seq)};

	return newest;
}

static __always_inline void look(struct sock *sk, __u64 cookie)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct last_look now = {.newest = delivered_read(tcp), .cookie = cookie};
	__u64 key = (__u64)sk;
	struct last_look *seen = bpf_map_lookup_elem(&last_seen, &key);

	if (!seen) {
		/* Older than the tool: what the kernel measured before is no sample. */
		if (filter_may_want(sk) && table_put(&last_seen, &key, &now, BPF_ANY))
			COUNT(table_full);
		return;
	}
	if (seen->newest.mstamp == now.newest.mstamp && seen->newest.end_seq == now.newest.end_seq)
		return;
	seen->newest = now.newest;
	sample(sk, seen->cookie, smoothed ? BPF_CORE_READ(tcp, srtt_us) >> 3 : BPF_CORE_READ(tcp, rack.rtt_us));
}

/*
 * The sample of a child's handshake. Where only the listener's wake-up names the listener (child.bpf.h), the sample waits
 * for it, in the same softirq: then the child has an owner.
 */
struct awaiting {
	struct sock *sk; /* NULL: none */
	__u64 cookie;
	__u32 us;
	__u32 padding;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct awaiting);
} awaiting_owner SEC(".maps");

const volatile bool hooked_woken;

static __noinline int awaited(struct awaiting *sample_of)
{
	struct awaiting waits = *sample_of;

	sample_of->sk = NULL;
	return waits.sk ? sample(waits.sk, waits.cookie, waits.us) : 0;
}

static __always_inline int sample_awaiting(void)
{
	__u32 zero = 0;
	struct awaiting *place = bpf_map_lookup_elem(&awaiting_owner, &zero);

	return place ? awaited(place) : 0;
}

static __always_inline void sample_handshake(struct sock *sk, __u64 cookie, __u32 us)
{
	struct connection *connection = want_owner && hooked_woken ? connection_find(sk) : NULL;
	__u32 zero = 0;
	struct awaiting *place = bpf_map_lookup_elem(&awaiting_owner, &zero);

	if (place && connection && connection->role == ROLE_PASSIVE && !connection->opener.pid &&
	    !connection->accepted) {
		awaited(place);
		place->sk = sk;
		place->cookie = cookie;
		place->us = us;
	} else {
		sample(sk, cookie, us);
	}
}

/* Where functions cannot be hooked. The program of the object `owner` runs first: it was attached before. */
UNLESS("half_closed__fentry half_closed__kprobe")
OPTIONAL("the owner of a connection at the end of its handshake")
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_tcp_listener(listener), woken, struct sock *listener)
{
	return sample_awaiting();
}

/* The first copy leaves no sample. */
UNLESS("half_closed__fentry half_closed__kprobe")
AGAIN
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_tcp_listener(listener), woken_again, struct sock *listener)
{
	return sample_awaiting();
}

/*
 * `again`: this is the second copy of the program (recursion.bpf.h). If the first one ran, there is an entry, or the table is
 * full.
 */
static __always_inline void look_at_handshake(struct sock *sk, __u64 cookie, bool again)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct last_look now = {.newest = delivered_read(tcp), .cookie = cookie, .established = 1};
	__u32 us = BPF_CORE_READ(tcp, srtt_us) >> 3;
	__u64 key = (__u64)sk;
	struct last_look *seen = again ? bpf_map_lookup_elem(&last_seen, &key) : NULL;
	bool full;

	if (!filter_may_want(sk) || (seen && seen->established) || (again && had_no_place(sk, STATE_ESTABLISHED)))
		return;
	full = table_put(&last_seen, &key, &now, BPF_ANY);
	if (again && full) {
		COUNT(missed);
		return;
	}
	if (again)
		COUNT(rescued);
	if (full) {
		note_no_place(sk, STATE_ESTABLISHED);
		COUNT(table_full);
	}
	/* 0: the SYN or SYN-ACK was retransmitted, and the kernel does not know which one was answered. */
	if (us)
		sample_handshake(sk, cookie, us);
}

/* Only connections: the function also handles segments of handshakes and of listeners. */
static __always_inline bool half_closed_state(__u8 state)
{
	return state == STATE_CLOSE_WAIT || state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2 ||
	       state == STATE_CLOSING || state == STATE_LAST_ACK;
}

struct last_segment {
	__u64 sk, skb;
};

/* The segment that this CPU looked at last, so that the second copy does not look at it again. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct last_segment);
} looked_at SEC(".maps");

/*
 * A softirq may interrupt this program while a process handles the segments that came while it held the socket. Two looks
 * at one segment find one sample. So `looked_at` may be wrong; it only saves the second look.
 */
SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG(segment, struct sock *sk, struct sk_buff *skb)
{
	__u32 zero = 0;
	struct last_segment *last = bpf_map_lookup_elem(&looked_at, &zero);

	if (last) {
		last->sk = (__u64)sk;
		last->skb = (__u64)skb;
	}
	look(sk, COOKIE_OF(sk));
	return 0;
}

AGAIN
SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG(segment_again, struct sock *sk, struct sk_buff *skb)
{
	__u32 zero = 0;
	struct last_segment *last = bpf_map_lookup_elem(&looked_at, &zero);
	bool seen = last && last->sk == (__u64)sk && last->skb == (__u64)skb;

	if (last)
		last->skb = 0; /* the next packet may lie at the same address */
	if (!seen)
		look(sk, COOKIE_OF(sk));
	return 0;
}

OPTIONAL("samples of connections that one side has closed, except one at each transition")
SEC("fentry/tcp_rcv_state_process")
int FUNCTION_PROG(half_closed__fentry, struct sock *sk)
{
	if (half_closed_state(sk->__sk_common.skc_state))
		look(sk, COOKIE_OF(sk));
	return 0;
}

AGAIN
SEC("fentry/tcp_rcv_state_process")
int FUNCTION_PROG(half_closed_again__fentry, struct sock *sk)
{
	if (half_closed_state(sk->__sk_common.skc_state))
		look(sk, COOKIE_OF(sk));
	return 0;
}

SEC("kprobe/tcp_rcv_state_process")
int BPF_KPROBE(half_closed__kprobe, struct sock *sk)
{
	if (half_closed_state(BPF_CORE_READ(sk, __sk_common.skc_state)))
		look(sk, cookie_if_any(sk));
	return 0;
}

static __noinline int state_changed(struct sock *sk, int old_state, int new_state, __u64 cookie, bool again)
{
	__u64 key = (__u64)sk;
	struct last_look *seen;

	if (new_state == STATE_ESTABLISHED) {
		look_at_handshake(sk, cookie, again);
	} else {
		look(sk, cookie);
		seen = bpf_map_lookup_elem(&last_seen, &key);
		if (seen)
			seen->established = 0;
	}
	return 0;
}

static __always_inline bool matters(int old_state, int new_state)
{
	return new_state == STATE_ESTABLISHED || old_state == STATE_ESTABLISHED || half_closed_state(old_state);
}

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(matters(old_state, new_state), state, struct sock *sk, int old_state, int new_state)
{
	if (sk->sk_protocol == IPPROTO_TCP)
		state_changed(sk, old_state, new_state, COOKIE_OF(sk), false);
	return 0;
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(matters(old_state, new_state), state_again, struct sock *sk, int old_state, int new_state)
{
	if (sk->sk_protocol == IPPROTO_TCP)
		state_changed(sk, old_state, new_state, COOKIE_OF(sk), true);
	return 0;
}

/* 1 if there was an entry to delete. */
static __noinline int destroyed(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return !bpf_map_delete_elem(&last_seen, &key);
}

#include "destroy.bpf.h"
