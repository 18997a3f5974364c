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

/* inet_csk_clone_lock() has copied the listener's cookie, too, and resets it only after the child's first change. */
#define COOKIE_AT(sk, old_state, new_state)                                                        \
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

static __always_inline int state_changed(struct sock *sk, const struct held *change, __u64 cookie)
{
	struct identity unlisted = {};
	const struct identity *id = &unlisted;
	struct connection *connection;

	if (emits_attempt && change->old_state == STATE_SYN_RECV && !connection_find(sk))
		return 0; /* a child; an attempt that has met another one from the other end has an entry */
	attempt_before(sk, change->new_state);
	life_before(sk, change);
	connection = connection_transition(sk, change->old_state, change->new_state);
	if (connection) {
		connection->id.cookie = cookie;
		id = &connection->id;
		if (change->new_state == STATE_SYN_SENT ||
		    (change->new_state == STATE_SYN_RECV && change->old_state == STATE_LISTEN))
			connection->opened_ns = change->time_ns;
	} else {
		unlisted.cookie = cookie;
		identity_read(sk, &unlisted);
	}
	transition_changed(connection, id, change);
	attempt_changed(sk, connection, id, change);
	life_changed(sk, connection, id, change);
	step_changed(connection, id, change);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state, struct sock *sk, int old_state, int new_state)
{
	struct held change = {.old_state = old_state, .new_state = new_state};

	if (!matters(old_state, new_state) || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	once_note(sk, old_state << 8 | new_state);
	change.time_ns = bpf_ktime_get_ns();
	return state_changed(sk, &change, COOKIE_AT(sk, old_state, new_state));
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_again, struct sock *sk, int old_state, int new_state)
{
	struct held change = {.old_state = old_state, .new_state = new_state};

	if (!matters(old_state, new_state) || sk->sk_protocol != IPPROTO_TCP ||
	    !once_missed(sk, old_state << 8 | new_state))
		return 0;
	change.time_ns = bpf_ktime_get_ns();
	return state_changed(sk, &change, COOKIE_AT(sk, old_state, new_state));
}

FOR("transition")
SEC("fentry/tcp_connect")
int BPF_PROG(connect__fentry, struct sock *sk)
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
int BPF_PROG(connect__retransmit, struct sock *sk)
{
	transition_syn_sent(sk);
	return 0;
}

/* connect(), and sendto() with MSG_FASTOPEN: what it returns. */
FOR("attempt")
SEC("fexit/__inet_stream_connect")
int BPF_PROG(connected__fexit, struct socket *socket, void *address, int size, int flags, int is_sendmsg, int result)
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
int BPF_PROG(connected__syscall, struct pt_regs *regs, long result)
{
	struct remote_address to = {};
	struct sock *sk;

	if (!SYSCALL_IS_CONNECT(regs))
		return 0;
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
int BPF_PROG(timewait__fexit, struct sock *sk, void *death_row, int state, void *timewait_sock)
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
	if (connection && (connection->accepted || connection->role == ROLE_ACTIVE || connection->role == ROLE_LISTENER))
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
	if (emits_accepted)
		accepted_emit(id, owner, queued_ns, listener);
	if (emits_step)
		step_emit(bpf_ktime_get_ns(), id, owner, STEP_ACCEPT);
	return 0;
}

/*
 * Without functions to hook: io_uring's completions. Those of a multishot request come without it, and a result may be
 * something else than a descriptor. But a child that was seen to be born and now has a descriptor has been accepted.
 * `completion` is followed directly, so that the verifier refuses kernels that have something else in its place.
 */
FOR("transition accepted life step")
UNLESS("accept__fexit accept__kretprobe")
OPTIONAL("connections accepted through io_uring")
SEC("tp_btf/io_uring_complete")
int BPF_PROG(accept_uring, void *ring, struct io_kiocb *request, struct io_uring_cqe *completion)
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
int accept__fexit(__u64 *ctx)
{
	return accepted(ACCEPTED_CHILD(ctx), (struct sock *)CTX_SLOT(ctx, 0));
}

SEC("kretprobe/inet_csk_accept")
int BPF_KRETPROBE(accept__kretprobe, struct sock *child)
{
	return accepted(child, NULL);
}

SEC("tp_btf/sys_exit")
int BPF_PROG(accept__syscall, struct pt_regs *regs, long fd)
{
	struct sock *child = sock_of_accept(regs, fd);

	return child ? accepted(child, tcp_sock_of_fd(SYSCALL_ARGUMENT_1(regs))) : 0;
}

/* A call that was already waiting in inet_csk_accept() when that was hooked passes here when it wakes up. */
FOR("transition accepted life step")
UNLESS("accept__syscall")
OPTIONAL("who accepts by a call that began before the tool")
SEC("fentry/security_sock_graft")
int BPF_PROG(graft__fentry, struct sock *child)
{
	return connection_find(child) ? accepted(child, NULL) : 0;
}

SEC("kprobe/security_sock_graft")
int BPF_KPROBE(graft__kprobe, struct sock *child)
{
	return connection_find(child) ? accepted(child, NULL) : 0;
}

FOR("life")
SEC("tp_btf/tcp_send_reset")
int BPF_PROG(reset_sent, struct sock *sk)
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
int BPF_PROG(reset_received__fentry, struct sock *sk, struct sk_buff *skb)
{
	unsigned char *header = BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, transport_header);
	__u8 flags = 0;

	bpf_probe_read_kernel(&flags, sizeof(flags), header + TCP_FLAGS_AT);
	reset_received(sk, flags & TCP_FLAG_RST ? RESET_RECEIVED : RESET_SENT);
	return 0;
}

SEC("tp_btf/tcp_receive_reset")
int BPF_PROG(reset_received__tracepoint, struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);
	bool closed = (state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2) &&
		      BPF_CORE_READ(sk, sk_shutdown) & RCV_SHUTDOWN;

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
	if (!emits_transition)
		resolve(sk, connection);
	connection_forget(sk);
	return 0;
}

SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(destroy, struct sock *sk)
{
	once_note(sk, 0);
	return destroyed(sk);
}

AGAIN
SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(destroy_again, struct sock *sk)
{
	return once_missed(sk, 0) ? destroyed(sk) : 0;
}

/*
 * All entries of the table, in two ways. An iteration over all maps ends with a call without one, which is the moment to
 * visit them with "bpf: Add bpf_for_each_map_elem() helper" (5.13). Before, there is an iterator over the entries of one
 * map, which some kernels refuse that have iterators otherwise.
 *
 * This one at the end of a run.
 */
static long flush_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	resolve((struct sock *)*key, connection);
	return 0;
}

FOR("transition attempt life")
NEEDS("BPF_FUNC_for_each_map_elem")
SEC("iter/bpf_map")
int flush__each(struct bpf_iter__bpf_map *ctx)
{
	if (!ctx->map)
		bpf_for_each_map_elem(&connections, flush_entry, NULL, 0);
	return 0;
}

OVER_MAP("connections")
SEC("iter/bpf_map_elem")
int flush__element(struct bpf_iter__bpf_map_elem *ctx)
{
	__u64 *key = ctx->key;
	struct connection *connection = key ? connection_find((struct sock *)*key) : NULL;

	return connection ? flush_entry(NULL, key, connection, NULL) : 0;
}

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
NEEDS("BPF_FUNC_for_each_map_elem")
SEC("iter/bpf_map")
int live__each(struct bpf_iter__bpf_map *ctx)
{
	if (!ctx->map)
		bpf_for_each_map_elem(&connections, live_entry, NULL, 0);
	return 0;
}

OVER_MAP("connections")
SEC("iter/bpf_map_elem")
int live__element(struct bpf_iter__bpf_map_elem *ctx)
{
	__u64 *key = ctx->key;
	struct connection *connection = key ? connection_find((struct sock *)*key) : NULL;

	return connection ? live_entry(NULL, key, connection, NULL) : 0;
}

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

char LICENSE[] SEC("license") = "Dual BSD/GPL";
