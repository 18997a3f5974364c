// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * How long received data waited for the application: from the arrival of the first byte that a read takes until that read.
 *
 * A segment's bytes arrive when TCP puts them into the receive queue. tcp_probe fires right before, for each segment of an
 * established connection. Only a segment at rcv_nxt makes data readable: its own, and what waited behind the hole that it
 * fills. So a mark says from which sequence number on bytes became readable, and when. The bytes of a mark end where the next
 * mark begins.
 *
 * When tcp_rcv_space_adjust fires, a read has moved copied_seq already. MSG_PEEK does not move it. The socket's lock is held at
 * both tracepoints, so nobody else changes the marks of a connection meanwhile.
 *
 * The process of an event is the one that reads, which is known at that moment. So this object needs no owners.
 */
#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#define OWNER_IS "process that took the data"
#include "identity.bpf.h"
#include "filter.bpf.h"
#include "owner.bpf.h"
#include "state.bpf.h"
#define HAS_GROUPS
#define GROUPS_ARE_DISTRIBUTIONS
#include "event.bpf.h"

#define MARKS 16 /* a power of two */

struct wait {
	struct event event;
	__u64 wait_us TITLE("WAIT(us)") UNIT("us") UNKNOWN_IS("max")
	DOC("from the arrival of the first byte that was taken until the read");
	__u32 taken_bytes TITLE("TAKEN") UNIT("bytes") DOC("data that was taken");
	__u32 left_bytes TITLE("LEFT") UNIT("bytes") DOC("data left to read");
	__u32 tid WIDTH(7) UNKNOWN_IS("zero") DOC("thread that took it");
	__u32 padding;
	char thread[16] KIND("comm") UNKNOWN_IS("zero") DOC("name of that thread");
};
const struct wait *wait_anchor __attribute__((unused));

const volatile __u64 wait_min_us; /* shorter waits are filtered */

/*
 * The unread data of a connection. Inserted at the end of the handshake, of an older connection at the first data that arrives or
 * is read; deleted at tcp_destroy_sock.
 */
struct unread {
	__u64 since_ns[MARKS]; /* when the bytes of a mark became readable; 0: not known */
	__u32 begins[MARKS];   /* its first sequence number */
	__u32 copied;          /* copied_seq at the last look */
	__u32 first, count;    /* the marks in use, a ring */
	__u32 padding;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct unread);
} unreads SEC(".maps");

static const struct unread nothing_unread;

#define AT(unread, number) (((unread)->first + (number)) & (MARKS - 1))

static __always_inline bool is_after(__u32 sequence, __u32 other)
{
	return (__s32)(sequence - other) > 0;
}

/*
 * Makes room for a mark: the bytes of one count as those before it, so their wait is too long by the time between the two. It is the
 * mark with the shortest time from the one before to the one after, which is at most a seventh of the time from first to last.
 */
static __noinline int marks_merge(struct unread *unread)
{
	__u64 shortest = -1;
	__u32 which = 1;

	for (__u32 i = 1; i < MARKS - 1; i++) {
		__u64 between = unread->since_ns[AT(unread, i + 1)] - unread->since_ns[AT(unread, i - 1)];

		if (between < shortest) {
			shortest = between;
			which = i;
		}
	}
	for (__u32 i = 1; i < MARKS - 1; i++) {
		if (i < which)
			continue;
		unread->since_ns[AT(unread, i)] = unread->since_ns[AT(unread, i + 1)];
		unread->begins[AT(unread, i)] = unread->begins[AT(unread, i + 1)];
	}
	unread->count = MARKS - 1;
	return 0;
}

/* From this sequence number on, bytes become readable now. Nothing came of an earlier mark there: the segment was refused. */
static __always_inline void mark_add(struct unread *unread, __u32 begins, __u64 since_ns, bool again)
{
	__u32 last = AT(unread, unread->count - 1);

	if (unread->count && unread->begins[last] == begins) {
		if (!again || !unread->since_ns[last])
			unread->since_ns[last] = since_ns;
		return;
	}
	if (unread->count >= MARKS)
		marks_merge(unread);
	last = AT(unread, unread->count);
	unread->begins[last] = begins;
	unread->since_ns[last] = since_ns;
	unread->count++;
}

/* Drops the marks of the bytes before `sequence`. Returns when the byte there became readable; 0: not known. */
static __always_inline __u64 marks_pass(struct unread *unread, __u32 sequence)
{
	for (int i = 0; i < MARKS; i++) {
		if (unread->count < 2 || is_after(unread->begins[AT(unread, 1)], sequence))
			break;
		unread->first++;
		unread->count--;
	}
	if (!unread->count || is_after(unread->begins[AT(unread, 0)], sequence))
		return 0;
	return unread->since_ns[AT(unread, 0)];
}

static __always_inline struct unread *unread_find(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&unreads, &key);
}

/*
 * Adds an entry, with the mark of what arrives from now on. Does nothing if it has no place, or the socket is not wanted.
 * `counts`: no place counts as table_full. Once at the handshake; and at a read, which then has no row.
 */
static __always_inline void unread_add(struct sock *sk, __u64 flags, __u64 since_ns, bool counts)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct unread *unread;
	__u64 key = (__u64)sk;

	if (!filter_may_want(sk))
		return;
	table_put(&unreads, &key, &nothing_unread, flags);
	unread = bpf_map_lookup_elem(&unreads, &key);
	if (!unread) {
		if (counts)
			COUNT(table_full);
		return;
	}
	unread->copied = BPF_CORE_READ(tcp, copied_seq);
	mark_add(unread, BPF_CORE_READ(tcp, rcv_nxt), since_ns, false);
}

/* A segment with these sequence numbers, which TCP has not processed yet. */
static __noinline int arrives(struct sock *sk, __u32 seq, __u32 end_seq, bool again)
{
	__u32 next = BPF_CORE_READ((struct tcp_sock *)sk, rcv_nxt);
	__u64 now_ns = bpf_ktime_get_ns();
	struct unread *unread;

	/* Behind a hole, or old. */
	if (is_after(seq, next) || !is_after(end_seq, next))
		return 0;
	unread = unread_find(sk);
	if (unread)
		mark_add(unread, next, now_ns, again);
	else
		unread_add(sk, BPF_NOEXIST, now_ns, false);
	return 0;
}

static __noinline int wait_send(struct sock *sk, __u64 since_ns, __u64 now_ns, __u32 bytes)
{
	__u64 wait_us = since_ns ? (now_ns - since_ns) / 1000 : -1;
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct identity id = {.cookie = COOKIE_OF(sk)};
	struct wait room, *event;
	struct owner reader = {};

	/* A process that reads holds the lock. A softirq that reads, such as that of kTLS before 6.0, does not. */
	bool by_process = BPF_CORE_READ(sk, sk_lock.owned);

	identity_read(sk, &id);
	if (by_process)
		owner_of_current(&reader);
	event = event_begin_in(&room, sizeof(room), now_ns, &id, &reader);
	if (!event)
		return 0;
	event->wait_us = wait_us;
	event->taken_bytes = bytes;
	event->left_bytes = BPF_CORE_READ(tcp, rcv_nxt) - BPF_CORE_READ(tcp, copied_seq);
	if (event->left_bytes && fin_received(sk))
		event->left_bytes--;
	event->tid = by_process ? bpf_get_current_pid_tgid() : 0;
	event->padding = 0;
	if (by_process)
		bpf_get_current_comm(event->thread, sizeof(event->thread));
	else
		__builtin_memset(event->thread, 0, sizeof(event->thread));
	return event_submit(event);
}

static __always_inline bool is_too_short(__u64 since_ns, __u64 now_ns)
{
	return wait_min_us && (!since_ns || (now_ns - since_ns) / 1000 < wait_min_us);
}

/* A read has moved copied_seq, or not. What an older connection had received is not known to be taken: it may be MSG_PEEK. */
static __noinline int taken(struct sock *sk)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct unread *unread = unread_find(sk);
	__u64 since_ns, now_ns;
	__u32 copied, bytes;

	if (!unread) {
		unread_add(sk, BPF_NOEXIST, 0, true);
		return 0;
	}
	copied = BPF_CORE_READ(tcp, copied_seq);
	if (copied == unread->copied)
		return 0;
	bytes = copied - unread->copied;
	since_ns = marks_pass(unread, unread->copied);
	unread->copied = copied;
	marks_pass(unread, copied);
	/* tcp_read_sock() takes the FIN, too, which has a sequence number like a byte. */
	if (copied == (__u32)BPF_CORE_READ(tcp, rcv_nxt) && fin_received(sk))
		bytes--;
	if (!bytes)
		return 0;
	now_ns = bpf_ktime_get_ns();
	if (is_too_short(since_ns, now_ns)) {
		COUNT(seen);
		COUNT(filtered);
		return 0;
	}
	return wait_send(sk, since_ns, now_ns, bytes);
}

/*
 * The segment or the reading socket that this CPU looked at last, so that the second copy does not look again. A second look
 * finds nothing new; a softirq between the two copies makes one.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} looked_at SEC(".maps");

static __always_inline void note_look(const void *at)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&looked_at, &zero);

	if (last)
		*last = (__u64)at;
}

static __always_inline bool has_looked(const void *at)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&looked_at, &zero);
	bool looked = last && *last == (__u64)at;

	if (last)
		*last = 0; /* the next packet may lie at the same address */
	return looked;
}

#define TCP_SKB_CB(skb) ((const struct tcp_skb_cb *)__builtin_preserve_access_index(&(skb)->cb))

#define HAS_DATA(skb) (TCP_SKB_CB(skb)->seq != TCP_SKB_CB(skb)->end_seq) /* or a FIN */

SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG_IF(HAS_DATA(skb), segment, struct sock *sk, struct sk_buff *skb)
{
	note_look(skb);
	return arrives(sk, TCP_SKB_CB(skb)->seq, TCP_SKB_CB(skb)->end_seq, false);
}

AGAIN
SEC("tp_btf/tcp_probe")
int TRACEPOINT_PROG_IF(HAS_DATA(skb), segment_again, struct sock *sk, struct sk_buff *skb)
{
	return has_looked(skb) ? 0 : arrives(sk, TCP_SKB_CB(skb)->seq, TCP_SKB_CB(skb)->end_seq, true);
}

/* After our FIN segments do not pass tcp_probe. */
static __always_inline bool still_receives(__u8 state)
{
	return state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2;
}

OPTIONAL("how long data waited that came after this end's shutdown()")
SEC("fentry/tcp_rcv_state_process")
int FUNCTION_PROG(half_closed__fentry, struct sock *sk, struct sk_buff *skb)
{
	if (still_receives(sk->__sk_common.skc_state))
		arrives(sk, TCP_SKB_CB(skb)->seq, TCP_SKB_CB(skb)->end_seq, false);
	return 0;
}

AGAIN
SEC("fentry/tcp_rcv_state_process")
int FUNCTION_PROG(half_closed_again__fentry, struct sock *sk, struct sk_buff *skb)
{
	if (still_receives(sk->__sk_common.skc_state))
		arrives(sk, TCP_SKB_CB(skb)->seq, TCP_SKB_CB(skb)->end_seq, true);
	return 0;
}

SEC("kprobe/tcp_rcv_state_process")
int BPF_KPROBE(half_closed__kprobe, struct sock *sk, struct sk_buff *skb)
{
	struct tcp_skb_cb *cb = (struct tcp_skb_cb *)__builtin_preserve_access_index(&skb->cb);

	if (still_receives(BPF_CORE_READ(sk, __sk_common.skc_state)))
		arrives(sk, BPF_CORE_READ(cb, seq), BPF_CORE_READ(cb, end_seq), false);
	return 0;
}

/*
 * Where functions cannot be hooked: the wake-up of the reader, after the data came. The last mark is open: it says where that
 * data begins, but not when it came.
 */
static __noinline int has_arrived(struct sock *sk)
{
	__u32 next = BPF_CORE_READ((struct tcp_sock *)sk, rcv_nxt), last;
	struct unread *unread = unread_find(sk);

	if (!unread || !unread->count)
		return 0;
	last = AT(unread, unread->count - 1);
	if (unread->since_ns[last] || unread->begins[last] == next)
		return 0;
	unread->since_ns[last] = bpf_ktime_get_ns();
	mark_add(unread, next, 0, false);
	return 0;
}

static __always_inline bool is_half_closed(struct sock *sk)
{
	return still_receives(sk->__sk_common.skc_state) && sk->sk_protocol == IPPROTO_TCP;
}

UNLESS("half_closed__fentry half_closed__kprobe")
OPTIONAL("how long data waited that came after this end's shutdown()")
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_half_closed(sk), woken, struct sock *sk)
{
	return has_arrived(sk);
}

UNLESS("half_closed__fentry half_closed__kprobe")
AGAIN
SEC("tp_btf/sk_data_ready")
int TRACEPOINT_PROG_IF(is_half_closed(sk), woken_again, struct sock *sk)
{
	return has_arrived(sk);
}

SEC("tp_btf/tcp_rcv_space_adjust")
int TRACEPOINT_PROG(read, struct sock *sk)
{
	note_look(sk);
	return taken(sk);
}

AGAIN
SEC("tp_btf/tcp_rcv_space_adjust")
int TRACEPOINT_PROG(read_again, struct sock *sk)
{
	return has_looked(sk) ? 0 : taken(sk);
}

/*
 * The handshake ends: the data of its last packet arrives now, and the next segment's takes the place of that mark. Or this end
 * has called shutdown(): an open mark.
 */
static __noinline int state_changed(struct sock *sk, int new_state, bool again)
{
	struct unread *unread = unread_find(sk);
	__u32 next = BPF_CORE_READ((struct tcp_sock *)sk, rcv_nxt);

	if (new_state == STATE_ESTABLISHED) {
		/* The entry may be that of the connection before: a socket may be disconnected and connected again. */
		if (!again || !unread || unread->begins[AT(unread, 0)] != next)
			unread_add(sk, BPF_ANY, bpf_ktime_get_ns(), !again);
	} else if (!(BPF_CORE_READ(sk, sk_shutdown) & RCV_SHUTDOWN)) {
		if (unread)
			mark_add(unread, next, 0, false);
		else
			unread_add(sk, BPF_NOEXIST, 0, false);
	}
	return 0;
}

static __always_inline bool matters(int old_state, int new_state)
{
	return new_state == STATE_ESTABLISHED || (new_state == STATE_FIN_WAIT1 && old_state == STATE_ESTABLISHED);
}

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(matters(old_state, new_state), state, struct sock *sk, int old_state, int new_state)
{
	return sk->sk_protocol == IPPROTO_TCP ? state_changed(sk, new_state, false) : 0;
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(matters(old_state, new_state), state_again, struct sock *sk, int old_state, int new_state)
{
	return sk->sk_protocol == IPPROTO_TCP ? state_changed(sk, new_state, true) : 0;
}

/* 1 if there was an entry to delete. */
static __noinline int destroyed(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return !bpf_map_delete_elem(&unreads, &key);
}

#include "destroy.bpf.h"
