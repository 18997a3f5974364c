// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Visits to the states of congestion control. Each change of the state ends a visit, and so does the end of the connection.
 * A look shows the visits that go on.
 *
 * The tracepoint is in tcp_set_ca_state(), the only function that sets the state since "tcp: Add tracepoint for
 * tcp_set_ca_state" (5.19). It fires before the kernel sets the state. Before 5.19 that function is inline.
 */
#include "socket_event.bpf.h"
#include "recursion.bpf.h"
#include "visit.bpf.h"

#define SSTHRESH_NOT_KNOWN 0x7fffffff /* TCP_INFINITE_SSTHRESH, include/net/tcp.h */

struct congestion {
	struct event event;
	__u8 ca_state TITLE("OLD STATE") NAMED_BY("tcp_ca_state", "TCP_CA_") WIDTH(9) DOC("state that it left");
	__u8 next_state TITLE("NEW STATE") NAMED_BY("tcp_ca_state", "TCP_CA_") UNKNOWN_IS("max") WIDTH(9)
	DOC("state that it entered; null: the connection has ended");
	enum tcp_state state TITLE("TCP STATE") DOC("state of the connection");
	__u8 padding;
	__u32 cwnd DOC("congestion window at that moment, in segments");
	__u32 ssthresh UNKNOWN_IS("max") DOC("slow start threshold at that moment, in segments; null: not known yet");
	__u32 padding2;
	__u64 visit_us TITLE("IN STATE(us)") UNIT("us") UNKNOWN_IS("max") DOC("how long it was in the old state");
	__u64 socket;    /* its address */
	__u64 opened_ns; /* 0: not seen. With the address it tells a connection from all others */
	__u64 since_ns;  /* when the visit began, or the tool; the time itself: not known */
};
const struct congestion *congestion_anchor __attribute__((unused));

const volatile bool want_all;      /* connections too that have always been in Open */
const volatile bool only_followed; /* only connections in the table of owners, which a look finds */

/* When the tool began: user space sets it when everything is attached. Until then nothing is noted. */
volatile __u64 begun_ns;

/* The state in the lowest bits and the time when the socket entered it: one word, so no reader sees half of a change. */
#define STATE_BITS 3
#define ENDED 7 /* in place of a state: the connection has ended */
#define VISIT(since_ns, ca_state) ((since_ns) << STATE_BITS | (ca_state))
#define VISIT_STATE(visit) ((visit) & ((1 << STATE_BITS) - 1))
#define VISIT_SINCE(visit) ((visit) >> STATE_BITS)

/* Of each socket that has changed its state. Inserted at the first change, deleted at tcp_destroy_sock. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct sock */
	__type(value, __u64);
} visits SEC(".maps");

static __always_inline __u8 ca_state_of(struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD_PROBED((struct inet_connection_sock *)sk, icsk_ca_state);
}

static __always_inline bool may_have_visits(int state)
{
	return state != STATE_CLOSE && state != STATE_LISTEN;
}

/* A visit that ends, or that a look sees. */
struct visit {
	__u64 now_ns;
	__u64 since_ns;
	__u64 cookie;
	__u8 ca_state;
	__u8 next_state;
	enum tcp_state state;
	bool known;  /* the socket has an entry, so `since_ns` is when it entered the state */
	bool ended;  /* the entry says that the connection has ended */
	bool missed; /* a change was missed */
};

/*
 * Reads the state before the entry. A change adds the entry before the kernel sets the state. So if there is no entry, the
 * socket was in the state that was read.
 */
static __always_inline void visit_read(struct visit *visit, struct sock *sk, const struct connection *connection)
{
	__u64 opened_ns = connection ? connection->opened_ns : 0, key = (__u64)sk, *entry, value;

	visit->ca_state = ca_state_of(sk);
	barrier();
	entry = bpf_map_lookup_elem(&visits, &key);
	value = entry ? *(volatile __u64 *)entry : 0;
	/* An older entry is that of the connection before: a socket may be disconnected and connected again. */
	if (entry && VISIT_SINCE(value) >= opened_ns) {
		visit->ended = VISIT_STATE(value) == ENDED;
		visit->known = !visit->ended;
	}
	if (visit->known) {
		visit->missed = VISIT_STATE(value) != visit->ca_state;
		visit->ca_state = VISIT_STATE(value);
		visit->since_ns = VISIT_SINCE(value);
		return;
	}
	visit->since_ns = opened_ns > begun_ns ? opened_ns : begun_ns;
}

static __noinline int visit_send(struct sock *sk, const struct connection *connection, const struct visit *visit)
{
	struct identity id = {.cookie = visit->cookie};
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct congestion *event;

	identity_read(sk, &id);
	event = event_begin(sizeof(*event), visit->now_ns, &id, connection_owner(connection));
	if (!event)
		return 0;
	if (visit->missed && !ending)
		COUNT(missed);
	event->ca_state = visit->ca_state;
	event->next_state = visit->next_state;
	event->state = visit->state;
	event->cwnd = BPF_CORE_READ(tcp, snd_cwnd);
	event->ssthresh = BPF_CORE_READ(tcp, snd_ssthresh);
	if (event->ssthresh >= SSTHRESH_NOT_KNOWN)
		event->ssthresh = -1;
	event->padding = event->padding2 = 0;
	event->socket = (__u64)sk;
	event->opened_ns = connection ? connection->opened_ns : 0;
	event->since_ns = visit->since_ns;
	/* Microseconds of both times, so that visits which follow one another add up. */
	event->visit_us = visit->now_ns / 1000 - visit->since_ns / 1000;
	if (visit->missed || (!visit->known && event->opened_ns <= begun_ns))
		event->visit_us = -1;
	return event_submit(event);
}

/* Notes what the socket does from now on. False if there is no room. */
static __always_inline bool visit_note(struct sock *sk, __u64 now_ns, __u64 ca_state)
{
	__u64 key = (__u64)sk, value = VISIT(now_ns, ca_state);

	return !table_put(&visits, &key, &value, BPF_ANY);
}

/* The visit ends. `noted`: what the entry says from now on. */
static __always_inline int visit_end(struct sock *sk, const struct connection *connection, struct visit *visit,
				     __u64 noted, bool again)
{
	if (!filter_may_want(sk) || (again && had_no_place(sk, noted)))
		return 0;
	if (!visit_note(sk, visit->now_ns, noted)) {
		COUNT(table_full);
		note_no_place(sk, noted);
		return 0;
	}
	if (again)
		COUNT(rescued);
	if (visit->missed) {
		visit->ca_state = ca_state_of(sk);
		visit->since_ns = visit->now_ns;
	}
	if (only_followed && !connection)
		return 0;
	return visit_send(sk, connection, visit);
}

/* `again`: this is the second copy of the program (recursion.bpf.h). If the first one ran, the entry has the new state. */
static __noinline int changed_to(struct sock *sk, __u64 cookie, __u8 ca_state, bool again)
{
	const struct connection *connection = connection_find(sk);
	struct visit visit = {.now_ns = bpf_ktime_get_ns(), .cookie = cookie, .next_state = ca_state};

	visit.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	visit_read(&visit, sk, connection);
	if (again && visit.known && visit.ca_state == ca_state)
		return 0;
	return visit_end(sk, connection, &visit, ca_state, again);
}

static __always_inline bool is_change(struct sock *sk, __u8 ca_state)
{
	return begun_ns && may_have_visits(sk->__sk_common.skc_state) && ca_state_of(sk) != ca_state;
}

SEC("tp_btf/tcp_cong_state_set")
int TRACEPOINT_PROG_IF(is_change(sk, ca_state), change, struct sock *sk, __u8 ca_state)
{
	return changed_to(sk, COOKIE_OF(sk), ca_state, false);
}

AGAIN
SEC("tp_btf/tcp_cong_state_set")
int TRACEPOINT_PROG_IF(is_change(sk, ca_state), change_again, struct sock *sk, __u8 ca_state)
{
	return changed_to(sk, COOKIE_OF(sk), ca_state, true);
}

/* The connection has entered CLOSE. */
static __noinline int has_ended(struct sock *sk, __u64 cookie, int old_state, bool again)
{
	const struct connection *connection = connection_find(sk);
	struct visit visit = {.now_ns = bpf_ktime_get_ns(), .cookie = cookie, .next_state = -1, .state = old_state};

	visit_read(&visit, sk, connection);
	if (visit.ended || (!visit.known && !want_all && !visit.ca_state))
		return 0;
	return visit_end(sk, connection, &visit, ENDED, again);
}

static __always_inline bool is_end(int old_state, int new_state)
{
	return begun_ns && new_state == STATE_CLOSE && may_have_visits(old_state);
}

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(is_end(old_state, new_state), end, struct sock *sk, int old_state, int new_state)
{
	return sk->sk_protocol == IPPROTO_TCP ? has_ended(sk, COOKIE_OF(sk), old_state, false) : 0;
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(is_end(old_state, new_state), end_again, struct sock *sk, int old_state, int new_state)
{
	return sk->sk_protocol == IPPROTO_TCP ? has_ended(sk, COOKIE_OF(sk), old_state, true) : 0;
}

/* If the state has changed since the look began, the event of the change tells what the socket did until then. */
static long look_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct sock *sk = (struct sock *)*key;
	struct visit visit = {.now_ns = bpf_ktime_get_ns()};

	visit.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (!may_have_visits(visit.state))
		return 0;
	visit_read(&visit, sk, connection);
	if (visit.ended || visit.since_ns > visit.now_ns || (!visit.known && !want_all && !visit.ca_state))
		return 0;
	visit.missed = false;
	visit.next_state = visit.ca_state;
	visit.cookie = cookie_if_any(sk);
	return visit_send(sk, connection, &visit);
}

FOR_EACH_CONNECTION(look, look_entry)

static __noinline int destroyed(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return !bpf_map_delete_elem(&visits, &key);
}

#include "destroy.bpf.h"
