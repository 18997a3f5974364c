// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Birth, life and death of connections. One set of hooks and one table, and several kinds of events made from them, each
 * in a header of its own; a run asks for one kind (`emits_...`), and the verifier removes the others.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "connection.bpf.h"
#include "once.bpf.h"
#include "transition.bpf.h"
#include "attempt.bpf.h"
#include "accepted.bpf.h"
#include "life.bpf.h"
#include "step.bpf.h"
#include "gap.bpf.h"

/* inet_csk_clone_lock() has copied the listener's cookie, too, and resets it only after the child's first change. */
#define COOKIE_AT(sk, old_state, new_state)                                                \
	((old_state) == STATE_LISTEN && (new_state) == STATE_SYN_RECV ? 0 : COOKIE_OF(sk))

/* Does this change matter for the events of this run? The states alone tell, so most changes cost next to nothing. */
static __always_inline bool matters(int old_state, int new_state)
{
	if (emits_attempt)
		return new_state == STATE_SYN_SENT || old_state == STATE_SYN_SENT || old_state == STATE_SYN_RECV;
	if (emits_accepted)
		return new_state == STATE_LISTEN || old_state == STATE_LISTEN || old_state == STATE_SYN_RECV;
	return true;
}

/* A socket that closes needs no entry any more; but a life that nobody held when the tool began may wait in one. */
static __always_inline struct connection *entry_for(struct sock *sk, const struct held *change)
{
	if (change->new_state != STATE_CLOSE || (emits_life && was_established(change->old_state)))
		return connection_find_or_add(sk);
	return connection_find(sk);
}

/* A socket is connected again, and what waited for more will not get it. */
static __always_inline void before_anew(struct connection *connection)
{
	if (emits_attempt)
		attempt_resolve(connection, 0);
	if (emits_life)
		life_lost(connection);
}

static __always_inline int state_changed(struct sock *sk, const struct held *change, __u64 cookie)
{
	bool is_child = change->new_state == STATE_SYN_RECV && change->old_state == STATE_LISTEN;
	struct identity unlisted = {};
	const struct identity *id = &unlisted;
	struct connection *connection;
	bool after_gap = false;

	if (emits_attempt && change->old_state == STATE_SYN_RECV && !connection_find(sk))
		return 0; /* a child; an attempt that has met another one from the other end has an entry */
	connection = entry_for(sk, change);
	if (connection) {
		/* A child is a new socket; what stands at its address is one that has gone. */
		after_gap = gap(sk, connection, is_child ? STATE_CLOSE : change->old_state);
		if (after_gap && (change->old_state == STATE_SYN_SENT || change->old_state == STATE_SYN_RECV)) {
			/* It began unseen: what stands here is of the connection before it. */
			before_anew(connection);
			connection_begin(connection, ROLE_UNKNOWN);
		}
		if (change->new_state == STATE_SYN_SENT)
			before_anew(connection);
		connection_changed(sk, connection, change->old_state, change->new_state);
		connection->changed_ns = change->time_ns;
		barrier();
		connection->state = is_followed(change->new_state) ? change->new_state : 0;
		connection->id.cookie = cookie;
		id = &connection->id;
		if (change->new_state == STATE_SYN_SENT || is_child)
			connection->opened_ns = change->time_ns;
	} else {
		unlisted.cookie = cookie;
		identity_read(sk, &unlisted);
	}
	if (emits_accepted && connection && connection->told)
		connection_forget(sk);
	transition_changed(connection, id, change, after_gap);
	attempt_changed(sk, connection, id, change);
	life_changed(sk, connection, id, change);
	step_changed(connection, id, change);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int TRACING_PROG_IF(matters(old_state, new_state), state, struct sock *sk, int old_state, int new_state)
{
	struct held change = {.old_state = old_state, .new_state = new_state};

	if (sk->sk_protocol == IPPROTO_TCP) {
		once_note(sk, old_state << 8 | new_state);
		change.time_ns = bpf_ktime_get_ns();
		state_changed(sk, &change, COOKIE_AT(sk, old_state, new_state));
	}
	return 0;
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACING_PROG_IF(matters(old_state, new_state), state_again, struct sock *sk, int old_state, int new_state)
{
	struct held change = {.old_state = old_state, .new_state = new_state};

	if (sk->sk_protocol == IPPROTO_TCP && once_missed(sk, old_state << 8 | new_state)) {
		change.time_ns = bpf_ktime_get_ns();
		state_changed(sk, &change, COOKIE_AT(sk, old_state, new_state));
	}
	return 0;
}

FOR("transition")
SEC("fentry/tcp_connect")
int TRACING_PROG(connect__fentry, struct sock *sk)
{
	transition_syn_sent(sk);
	return 0;
}

SEC("kprobe/tcp_connect")
int BPF_KPROBE(connect__kprobe, struct sock *sk)
{
	transition_syn_sent(sk);
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int TRACING_PROG(connect__retransmit, struct sock *sk)
{
	transition_syn_sent(sk);
	return 0;
}

/* connect(), and sendto() with MSG_FASTOPEN: what it returns. */
FOR("attempt")
SEC("fexit/__inet_stream_connect")
int TRACING_PROG(connected__fexit, struct socket *socket, void *address, int size, int flags, int is_sendmsg,
		 int result)
{
	struct sock *sk = tcp_sock_of_socket(socket);
	struct remote_address to = {};

	if (!sk || subflow_is_connected_apart(socket))
		return 0;
	REMOTE_ADDRESS_READ(bpf_probe_read_kernel, &to, address, size);
	attempt_returned(sk, &to, size, result);
	return 0;
}

SEC("tp_btf/sys_exit")
int TRACING_PROG_IF(SYSCALL_IS_CONNECT(regs), connected__syscall, struct pt_regs *regs, long result)
{
	struct remote_address to = {};
	struct sock *sk;

	sk = tcp_sock_of_fd(SYSCALL_ARGUMENT_1(regs));
	if (!sk)
		return 0;
	REMOTE_ADDRESS_READ(bpf_probe_read_user, &to, SYSCALL_ARGUMENT_2(regs), SYSCALL_ARGUMENT_3(regs));
	attempt_returned(sk, &to, SYSCALL_ARGUMENT_3(regs), result);
	return 0;
}

static __always_inline void timewait(struct sock *sk, int state, bool made)
{
	struct connection *connection = connection_find(sk);

	if (!connection)
		return;
	connection->timewait = true;
	if (made)
		connection->followed_by = state;
}

/* The socket is about to be replaced by a small timewait socket, unless none could be had. */
FOR("transition life")
OPTIONAL("what follows CLOSE")
SEC("fexit/inet_twsk_alloc")
int TRACING_PROG(timewait__fexit, struct sock *sk, void *death_row, int state, void *timewait_sock)
{
	timewait(sk, state, timewait_sock);
	return 0;
}

SEC("kprobe/tcp_time_wait")
int BPF_KPROBE(timewait__kprobe, struct sock *sk, int state)
{
	timewait(sk, state, true);
	return 0;
}

/* accept() returns `child` to the current process. `listener` is NULL where it is not known. */
static __noinline int accepted(struct sock *child, struct sock *listener)
{
	struct owner unlisted_owner = {};
	struct identity unlisted = {};
	struct identity *id = &unlisted;
	const struct owner *owner = &unlisted_owner;
	struct connection *connection;
	__u64 queued_ns = 0;

	if (!child || BPF_CORE_READ(child, sk_protocol) != IPPROTO_TCP)
		return 0;
	connection = connection_find(child);
	if (connection &&
	    (connection->accepted || connection->role == ROLE_ACTIVE || connection->role == ROLE_LISTENER))
		return 0; /* seen by another hook; or not a child at all, but what a number that is no descriptor points to */
	connection = connection_accepted(child);
	if (connection) {
		id = &connection->id;
		owner = &connection->accepter;
		queued_ns = connection->opened_ns;
	} else {
		owner_of_current(&unlisted_owner);
	}
	if (!connection || !identity_complete(connection))
		identity_read(child, id);
	if (!id->cookie)
		id->cookie = cookie_if_any(child);
	if (!listener) {
		struct listening *found = listening_for(id);

		if (found)
			listener = (struct sock *)found->sk;
	}
	if (emits_step)
		step_emit(bpf_ktime_get_ns(), id, owner, STEP_ACCEPT);
	if (emits_accepted) {
		accepted_emit(id, owner, queued_ns, listener);
		/* The table is for those that wait; but one that will be ESTABLISHED would then come in anew. */
		if (BPF_CORE_READ(child, __sk_common.skc_state) != STATE_SYN_RECV)
			connection_forget(child);
		else if (connection)
			connection->told = true;
	}
	return 0;
}

/*
 * Without functions to hook: io_uring's completions. Those of a multishot request come without it, and a result may be
 * something else than a descriptor. But a child that was seen to be born and now has a descriptor has been accepted.
 * `completion` is followed directly, so that the verifier refuses kernels that have something else in its place.
 */
FOR("transition accepted life step")
UNLESS("accept__fexit")
OPTIONAL("connections accepted through io_uring")
SEC("tp_btf/io_uring_complete")
int TRACING_PROG(accept_uring, void *ring, struct io_kiocb *request, struct io_uring_cqe *completion)
{
	struct connection *connection;
	int fd = completion->res;
	struct sock *child;

	if (fd < 0 || (request && BPF_CORE_READ(request, opcode) != IORING_OP_ACCEPT))
		return 0;
	child = tcp_sock_of_fd(fd);
	connection = child ? connection_find(child) : NULL;
	if (!connection || connection->role != ROLE_PASSIVE || !connection->opened_ns)
		return 0;
	return accepted(child, request ? tcp_sock_of_file(BPF_CORE_READ(request, file)) : NULL);
}

FOR("transition accepted life step")
SEC("fexit/inet_csk_accept")
int TRACING_PROG(accept__fexit)
{
	return accepted(ACCEPTED_CHILD(ctx), (struct sock *)CTX_SLOT(ctx, 0));
}

/* A kretprobe would come to mind, but it has few places for calls under way, and loses the others without a count. */
SEC("tp_btf/sys_exit")
int TRACING_PROG_IF(fd >= 0 && SYSCALL_IS_ACCEPT(regs), accept__syscall, struct pt_regs *regs, long fd)
{
	struct sock *child = tcp_sock_of_fd(fd);

	return child ? accepted(child, tcp_sock_of_fd(SYSCALL_ARGUMENT_1(regs))) : 0;
}

/* A call that was already waiting in inet_csk_accept() when that was hooked passes here when it wakes up. */
FOR("transition accepted life step")
UNLESS("accept__syscall")
OPTIONAL("who accepts by a call that began before the tool")
SEC("fentry/security_sock_graft")
int TRACING_PROG(graft__fentry, struct sock *child)
{
	return connection_find(child) ? accepted(child, NULL) : 0;
}

SEC("kprobe/security_sock_graft")
int BPF_KPROBE(graft__kprobe, struct sock *child)
{
	return connection_find(child) ? accepted(child, NULL) : 0;
}

/*
 * The socket's error is told to its owner. Before "tcp: fix race in tcp_write_err()" (6.10) that comes before the change
 * of state, and the owner, on another processor, may have fetched and so erased it by then. This function wakes the owner
 * up; the tracepoint comes after it.
 */
FOR("attempt life")
OPTIONAL("an error that was fetched just before its socket was closed")
SEC("fentry/sock_def_error_report")
int TRACING_PROG(error__fentry, struct sock *sk)
{
	error_reported(sk);
	return 0;
}

SEC("kprobe/sock_def_error_report")
int BPF_KPROBE(error__kprobe, struct sock *sk)
{
	error_reported(sk);
	return 0;
}

SEC("tp_btf/inet_sk_error_report")
int TRACING_PROG(error__tracepoint, struct sock *sk)
{
	error_reported(sk);
	return 0;
}

FOR("life")
SEC("tp_btf/tcp_send_reset")
int TRACING_PROG(reset_sent, struct sock *sk)
{
	struct connection *connection = sk ? connection_find(sk) : NULL;

	if (!connection)
		return 0;
	if (connection->closed_ns || was_established(BPF_CORE_READ(sk, __sk_common.skc_state)))
		connection->reset = RESET_SENT;
	life_resolve(sk, connection);
	return 0;
}

/*
 * Called for a RST that came, and for data that came after close(), which is answered by one. Without the packet at hand
 * the two cannot be told apart where the application has closed.
 */
static __always_inline void reset_received(struct sock *sk, enum reset reset)
{
	struct connection *connection = connection_find(sk);

	if (connection)
		connection->reset = reset;
}

#define TCP_FLAGS_AT 13 /* in the header */
#define TCP_FLAG_RST 0x04

/* tcp_reset() is given the packet since 5.11. */
FOR("life")
ARGUMENTS(2)
SEC("fentry/tcp_reset")
int TRACING_PROG(reset_received__fentry, struct sock *sk, struct sk_buff *skb)
{
	unsigned char *header = BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, transport_header);
	__u8 flags = 0;

	bpf_probe_read_kernel(&flags, sizeof(flags), header + TCP_FLAGS_AT);
	reset_received(sk, flags & TCP_FLAG_RST ? RESET_RECEIVED : RESET_SENT);
	return 0;
}

SEC("tp_btf/tcp_receive_reset")
int TRACING_PROG(reset_received__tracepoint, struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);
	bool closed =
		(state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2) && BPF_CORE_READ(sk, sk_shutdown) & RCV_SHUTDOWN;

	reset_received(sk, closed ? RESET_SEEN : RESET_RECEIVED);
	return 0;
}

/* What waited for more will not get it. */
static __always_inline void resolve(struct sock *sk, struct connection *connection)
{
	if (emits_transition)
		transition_syn_sent(sk);
	if (emits_attempt)
		attempt_resolve(connection, 0);
	if (emits_life)
		life_resolve(sk, connection);
}

static __always_inline int destroyed(struct sock *sk)
{
	struct connection *connection = connection_find(sk);

	if (!connection)
		return 0;
	gap(sk, connection, STATE_CLOSE);
	if (!emits_transition)
		resolve(sk, connection);
	connection_forget(sk);
	return 1;
}

SEC("tp_btf/tcp_destroy_sock")
int TRACING_PROG(destroy, struct sock *sk)
{
	destroyed(sk);
	return 0;
}

AGAIN
SEC("tp_btf/tcp_destroy_sock")
int TRACING_PROG(destroy_again, struct sock *sk)
{
	once_forget(sk);
	if (destroyed(sk)) /* the first copy leaves nothing behind */
		COUNT(rescued);
	return 0;
}

/*
 * All entries of the table, in two ways. An iteration over all maps ends with a call without one, which is the moment to
 * visit them with "bpf: Add bpf_for_each_map_elem() helper" (5.13). Before, there is an iterator over the entries of one
 * map, which some kernels refuse that have iterators otherwise. FOR() stands before it.
 */
#define FOR_EACH_CONNECTION(hook, entry)                                                           \
	NEEDS("BPF_FUNC_for_each_map_elem")                                                        \
	SEC("iter/bpf_map")                                                                        \
	int hook##__each(struct bpf_iter__bpf_map *ctx)                                            \
	{                                                                                          \
		if (!ctx->map)                                                                     \
			bpf_for_each_map_elem(&connections, entry, NULL, 0);                       \
		return 0;                                                                          \
	}                                                                                          \
                                                                                                   \
	OVER_MAP("connections")                                                                    \
	SEC("iter/bpf_map_elem")                                                                   \
	int hook##__element(struct bpf_iter__bpf_map_elem *ctx)                                    \
	{                                                                                          \
		__u64 *key = ctx->key;                                                             \
		struct connection *connection = key ? connection_find((struct sock *)*key) : NULL; \
                                                                                                   \
		return connection ? entry(NULL, key, connection, NULL) : 0;                        \
	}

FOR("transition attempt life step")
OPTIONAL("gaps in what was seen of connections that are open at the end")
FOR_EACH_CONNECTION(gap, gap_entry)

/* At the end of a run. */
static long flush_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	resolve((struct sock *)*key, connection);
	return 0;
}

FOR("transition attempt life")
FOR_EACH_CONNECTION(flush, flush_entry)

/* Those that are open now. */
static long live_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct closing closing = {.end = END_OPEN};
	struct sock *sk = (struct sock *)*key;

	closing.state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (!was_established(closing.state))
		return 0;
	closing.time_ns = bpf_ktime_get_ns();
	if (!identity_complete(connection))
		identity_read(sk, &connection->id);
	if (!connection->id.cookie)
		connection->id.cookie = cookie_if_any(sk);
	life_emit(sk, connection, &connection->id, &closing);
	return 0;
}

FOR("life")
FOR_EACH_CONNECTION(live, live_entry)

SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (!task || !file)
		return 0;
	if (emits_accepted)
		cookie_give(file, STATE_LISTEN);
	connection_seed(task, file, emits_attempt ? STATE_SYN_SENT : emits_accepted ? STATE_LISTEN : 0);
	return 0;
}

SEC("license")
char LICENSE[] = "Dual BSD/GPL";
