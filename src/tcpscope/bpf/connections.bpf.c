// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* Birth, life and death of connections: every change of state, with its owner and the time spent in the old state. */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "connection.bpf.h"

enum followed_by {
	FOLLOWED_BY_UNKNOWN,
	FOLLOWED_BY_NOTHING,
	FOLLOWED_BY_TIME_WAIT,
	FOLLOWED_BY_FIN_WAIT2,
} __attribute__((packed));

/* What user space reads: one change of state. */
struct transition {
	__u64 time_ns KIND("time") UNIT("ns") DOC("when it happened");
	struct identity id;
	struct owner owner;
	enum role role DOC("who opened it: active = this host, passive = the remote end") UNKNOWN_IS("zero");
	enum tcp_state old_state DOC("state before");
	enum tcp_state new_state DOC("state after");
	enum followed_by followed_by UNKNOWN_IS("zero")
		DOC("what the kernel keeps after CLOSE: a timewait socket in TIME_WAIT or timed FIN_WAIT2, or nothing");
	__u32 padding;
	__u64 in_state_us UNIT("us") UNKNOWN_IS("max") DOC("time spent in the old state");
};

const struct transition *transition_anchor __attribute__((unused));

/* Filled by user space before loading: which of the optional hooks this kernel took. */
const volatile bool hooked_timewait;

static __noinline int transition_emit(struct connection *connection, const struct identity *id, __u64 cookie,
				      const struct held *change)
{
	const struct owner *owner = connection_owner(connection);
	struct transition *event;

	COUNT(seen);
	if (!filter_pass(id, owner)) {
		COUNT(filtered);
		return 0;
	}
	event = event_reserve(sizeof(*event));
	if (!event)
		return 0;
	event->time_ns = change->time_ns;
	event->id = *id;
	event->id.cookie = cookie;
	event->old_state = change->old_state;
	event->new_state = change->new_state;
	event->padding = 0;
	event->in_state_us = -1;
	event->followed_by = FOLLOWED_BY_UNKNOWN;
	if (connection) {
		event->owner = *owner;
		event->role = connection->role;
		if (connection->state_since_ns)
			event->in_state_us = (change->time_ns - connection->state_since_ns) / 1000;
		if (change->new_state == STATE_CLOSE && hooked_timewait)
			event->followed_by = connection->followed_by == STATE_TIME_WAIT   ? FOLLOWED_BY_TIME_WAIT
					     : connection->followed_by == STATE_FIN_WAIT2 ? FOLLOWED_BY_FIN_WAIT2
											  : FOLLOWED_BY_NOTHING;
	} else {
		__builtin_memset(&event->owner, 0, sizeof(event->owner));
		event->role = ROLE_UNKNOWN;
	}
	if (!event->owner.pid)
		event->owner.uid = -1;
	event_submit(event);
	return 0;
}

/* The first transition of a connection happens before its ports or its remote end are set: it waits for them. */
static __always_inline void transition_release(struct connection *connection, __u64 cookie)
{
	struct held held = connection->held;

	if (!held.time_ns)
		return;
	connection->held.time_ns = 0;
	transition_emit(connection, &connection->id, cookie, &held);
	connection->state_since_ns = held.time_ns;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state, struct sock *sk, int old_state, int new_state)
{
	struct held change = {.old_state = old_state, .new_state = new_state};
	struct connection *connection;
	__u64 cookie;

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	change.time_ns = bpf_ktime_get_ns();
	cookie = COOKIE_OF(sk);
	connection = connection_transition(sk, old_state, new_state);
	if (!connection) {
		struct identity id = {};

		identity_read(sk, &id);
		transition_emit(NULL, &id, cookie, &change);
		return 0;
	}
	transition_release(connection, cookie);
	if (new_state == STATE_SYN_SENT || (new_state == STATE_SYN_RECV && old_state == STATE_LISTEN)) {
		connection->held = change;
		return 0;
	}
	transition_emit(connection, &connection->id, cookie, &change);
	connection->state_since_ns = change.time_ns;
	return 0;
}

/* The SYN is about to leave: the local port is chosen. Without functions to hook, its first retransmission tells. */
static __always_inline void syn_sent(struct sock *sk, __u64 cookie)
{
	struct connection *connection = connection_find(sk);

	if (!connection || !connection->held.time_ns)
		return;
	identity_read(sk, &connection->id);
	transition_release(connection, cookie);
}

SEC("fentry/tcp_connect")
int BPF_PROG(connect__fentry, struct sock *sk)
{
	syn_sent(sk, COOKIE_OF(sk));
	return 0;
}

SEC("kprobe/tcp_connect")
int BPF_KPROBE(connect__kprobe, struct sock *sk)
{
	syn_sent(sk, cookie_if_any(sk));
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int BPF_PROG(connect__retransmit, struct sock *sk)
{
	syn_sent(sk, COOKIE_OF(sk));
	return 0;
}

static __always_inline void timewait(struct sock *sk, int state)
{
	struct connection *connection = connection_find(sk);

	if (connection)
		connection->followed_by = state;
}

/* The socket is about to be replaced by a small timewait socket, unless none could be had. */
OPTIONAL("what follows CLOSE")
SEC("fexit/inet_twsk_alloc")
int BPF_PROG(timewait__fexit, struct sock *sk, void *death_row, int state, void *timewait_sock)
{
	if (timewait_sock)
		timewait(sk, state);
	return 0;
}

SEC("kprobe/tcp_time_wait")
int BPF_KPROBE(timewait__kprobe, struct sock *sk, int state)
{
	timewait(sk, state);
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
	connection_forget(sk);
	return 0;
}

/* At the end: what still waits for its port or its remote end is shown as far as it is known. */
OVER_MAP("connections")
SEC("iter/bpf_map_elem")
int flush(struct bpf_iter__bpf_map_elem *ctx)
{
	__u64 *key = ctx->key;

	if (key)
		syn_sent((struct sock *)*key, cookie_if_any((struct sock *)*key));
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
