// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Local ports in use, counted as they are taken and given back.
 *
 * connect() looks for a local port that no other socket has with the same local address, remote address and remote port. So
 * these three, in a network namespace, are a pool of ports of their own. It also leaves out each port that bind() has taken in the
 * namespace, whatever the addresses are (__inet_hash_connect(), net/ipv4/inet_hashtables.c). A socket takes its port by bind() if
 * it has one when connect() begins.
 *
 *   pool            its sockets                                   key
 *   POOL_CONNECT    connect() has chosen the port                 namespace, local address, remote address, remote port
 *   POOL_BIND       bind() has, and the socket does not listen    namespace, local address
 *   POOL_NAMESPACE  all ports that bind() has taken               namespace
 *
 * Each socket of the first kind has a port of its own, so these are counted as sockets. Several sockets may share a port that
 * bind() has taken (SO_REUSEADDR, SO_REUSEPORT): `taken` has their number.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "identity.bpf.h"
#include "aggregate.bpf.h"

/* What the socket counts in. Numbers of places are one more than the index; 0: none. */
struct scratch {
	__u64 searched_ns; /* how long connect() has looked for a port, in vain */
	__u32 pool;
	__u32 holder;
	__u32 failing_pool; /* connect() has found no port, and returns soon; until then this pool and holder stay */
	__u32 failing_holder;
	__u16 port; /* taken by bind(); 0: not, or no port of the range */
	__u8 state; /* of `pool`, in which it counts */
};
#define HAS_SCRATCH

/* After ESTABLISHED only the first state counts, and the end: what lies between keeps the port all the same. */
#define FOLLOWED                                                                                                    \
	(STATE_BIT(SYN_SENT) | STATE_BIT(SYN_RECV) | STATE_BIT(ESTABLISHED) | STATE_BIT(LISTEN) | STATE_BIT(CLOSE))
#include "follow.bpf.h"
#include "sockaddr.bpf.h"
#include "ports_pools.bpf.h"
#include "ports_range.bpf.h"
#include "ports_taken.bpf.h"

/* The socket counts in its pool no more. */
static __always_inline void pool_leave(struct scratch *mine)
{
	struct pool *pool = pool_find(mine->pool);

	if (!pool)
		return;
	if (mine->port)
		port_count(mine->pool, mine->port, false, false);
	pool_count(mine->pool, mine->holder, mine->state, -1);
	mine->pool = mine->holder = 0;
}

/* ... and its port is free. */
static __always_inline void leave(__u64 socket, struct scratch *mine, bool listened)
{
	pool_leave(mine);
	if (mine->port)
		port_count(namespace_place(socket), mine->port, listened, false);
	mine->port = 0;
}

/* The socket moves to another state. */
static __always_inline void move(struct scratch *mine, __u8 state)
{
	struct pool *pool = pool_find(mine->pool);

	if (!pool || mine->state == state)
		return;
	__sync_fetch_and_add(&pool->sockets[state_index(state)], 1);
	__sync_fetch_and_add(&pool->sockets[state_index(mine->state)], -1);
	mine->state = state;
}

/* connect() gives up the place to which a failed call has not come back. */
static __always_inline void unpin(struct scratch *mine)
{
	struct pool_holder *holder = holder_find(mine->failing_holder);
	struct pool *pool = pool_find(mine->failing_pool);

	if (pool)
		__sync_fetch_and_add(&pool->pins, -1);
	if (holder)
		__sync_fetch_and_add(&holder->pins, -1);
	mine->failing_pool = mine->failing_holder = 0;
}

/* bind() has given the socket a port. */
static __noinline int bound(__u64 socket, struct connection *connection, __u32 state)
{
	struct sock *sk = (struct sock *)socket;
	__u16 port = BPF_CORE_READ(sk, __sk_common.skc_num);
	struct pool_key key = {.kind = POOL_BIND};
	struct identity id = {};
	struct scratch *mine;
	struct pool *pool;
	__u32 whole;

	whole = namespace_place(socket);
	pool = pool_find(whole);
	if (!pool || connection->scratch.port || !is_local_port(sk, pool->range, port))
		return 0;
	mine = &connection->scratch;
	mine->port = port;
	port_count(whole, port, state == STATE_LISTEN, true);
	if (state == STATE_LISTEN)
		return 0;
	identity_read(sk, &id);
	key.netns = id.netns;
	key.family = id.family;
	__builtin_memcpy(key.laddr, id.laddr, sizeof(key.laddr));
	mine->pool = pool_place(&key);
	own_range_note(sk, mine->pool, port);
	mine->holder = holder_place(connection, mine->pool);
	mine->state = state;
	port_count(mine->pool, port, false, true);
	pool_count(mine->pool, mine->holder, state, 1);
	return 0;
}

/* connect() has chosen the port, or will do so now. */
static __noinline int chosen(__u64 socket, struct connection *connection, __u32 state)
{
	struct scratch *mine = &connection->scratch;

	mine->pool = connect_place(socket);
	mine->holder = holder_place(connection, mine->pool);
	mine->state = state;
	pool_count(mine->pool, mine->holder, state, 1);
	return 0;
}

/* connect() begins. */
static __noinline int opens(__u64 socket, struct connection *connection)
{
	struct sock *sk = (struct sock *)socket;
	struct scratch *mine = &connection->scratch;
	struct pool *pool;

	unpin(mine);
	if (!BPF_CORE_READ(sk, __sk_common.skc_num)) {
		leave(socket, mine, false);
		chosen(socket, connection, STATE_SYN_SENT);
	} else if (!mine->port) {
		bound(socket, connection, STATE_SYN_SENT);
	} else {
		move(mine, STATE_SYN_SENT);
	}
	pool = pool_find(mine->pool);
	if (pool)
		__sync_fetch_and_add(&span_of(pool)->opened, 1);
	return 0;
}

static __always_inline void search_add(struct pool *pool, __u64 search_ns)
{
	__u32 shard = bpf_get_smp_processor_id() & (SHARDS - 1);
	struct pool_span *span = span_of(pool);
	__u64 search_us = search_ns / 1000;

	__sync_fetch_and_add(&span->searches, 1);
	__sync_fetch_and_add(&span->search_ns, search_ns);
	if (search_us > span->search_max_us[shard])
		span->search_max_us[shard] = search_us;
}

/*
 * The attempt ends. connect() has looked for a port from the transition to SYN_SENT until it sent the SYN, whose time the socket
 * has, unless it has sent it again since.
 */
static __always_inline void searched(struct sock *sk, const struct scratch *mine, __u64 opened_ns)
{
	__u64 sent_ns = BPF_CORE_READ((struct tcp_sock *)sk, tcp_wstamp_ns);
	struct pool *pool = pool_find(mine->pool);

	if (pool && opened_ns && sent_ns >= opened_ns && !BPF_CORE_READ((struct tcp_sock *)sk, total_retrans))
		search_add(pool, sent_ns - opened_ns);
}

#include "ports_timewait.bpf.h"

static __always_inline bool matters(int old_state, int new_state)
{
	return !is_birth(old_state, new_state) && new_state != STATE_FIN_WAIT2 && new_state != STATE_CLOSING &&
	       new_state != STATE_LAST_ACK;
}

static __always_inline bool makes_entry(int old_state, int new_state)
{
	return new_state == STATE_SYN_SENT || (new_state == STATE_LISTEN && old_state == STATE_CLOSE);
}

/* connect() has found no port, or fails otherwise before it sends a SYN. Its return tells which. */
static __always_inline void fails(struct scratch *mine, __u64 searched_ns)
{
	struct pool_holder *holder = holder_find(mine->holder);
	struct pool *pool = pool_find(mine->pool);

	if (!pool || !holder)
		return;
	mine->failing_pool = mine->pool;
	mine->failing_holder = mine->holder;
	mine->searched_ns = searched_ns;
	__sync_fetch_and_add(&pool->pins, 1);
	__sync_fetch_and_add(&holder->pins, 1);
}

/* The socket enters CLOSE. */
static __noinline int closes(__u64 socket, struct connection *connection, __u32 old_state, __u64 open_ns)
{
	struct sock *sk = (struct sock *)socket;
	struct scratch *mine = &connection->scratch;
	__u64 waiting;

	if (mine->pool && (old_state == STATE_FIN_WAIT2 || old_state == STATE_CLOSING)) {
		waiting = timewait_of(socket);
		if (waiting)
			timewait_begin(waiting, mine->pool, mine->holder, mine->port);
	}
	if (old_state == STATE_SYN_SENT && !mine->port && !BPF_CORE_READ((struct tcp_sock *)sk, segs_out))
		fails(mine, open_ns);
	/* A port that the caller of bind() has named stays until the socket is destroyed (SOCK_BINDPORT_LOCK). */
	if (!mine->port || !BPF_CORE_READ(sk, __sk_common.skc_num)) {
		leave(socket, mine, old_state == STATE_LISTEN);
	} else if (old_state == STATE_LISTEN) {
		leave(socket, mine, true);
		bound(socket, connection, STATE_CLOSE);
	} else {
		move(mine, STATE_CLOSE);
	}
	return 0;
}

/* The socket listens. Its port is one that bind() has taken, but no pool of an address has it. */
static __noinline int listens(__u64 socket, struct connection *connection)
{
	leave(socket, &connection->scratch, false);
	return bound(socket, connection, STATE_LISTEN);
}

static __noinline int leaves(__u64 socket, struct connection *connection)
{
	unpin(&connection->scratch);
	leave(socket, &connection->scratch, connection->state == STATE_LISTEN);
	return 0;
}

static __always_inline int state_changed(struct sock *sk, const struct change *change)
{
	__u64 socket = (__u64)sk, opened_ns;
	struct followed now;
	struct scratch mine;

	follow_find(&now, sk, change);
	if (!now.connection)
		return 0;
	mine = now.connection->scratch;
	opened_ns = now.connection->opened_ns;
	follow_update(&now, sk, change);
	now.connection->scratch = mine; /* a socket that is connected again still has its port by bind() */
	if (change->old_state == STATE_SYN_SENT && !mine.port)
		searched(sk, &mine, opened_ns);
	if (change->new_state == STATE_SYN_SENT)
		return opens(socket, now.connection);
	if (change->new_state == STATE_LISTEN)
		return listens(socket, now.connection);
	if (change->new_state == STATE_CLOSE)
		return closes(socket, now.connection, change->old_state, change->time_ns - opened_ns);
	move(&now.connection->scratch, change->new_state);
	return 0;
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
	missed_close(sk, connection); /* it may wait in TIME_WAIT now, and count in no pool */
	leaves((__u64)sk, connection);
}

/* connect() returns an error to a socket that has sent no SYN. */
static __noinline int failed(__u64 socket, __u32 error)
{
	struct connection *connection = connection_find((struct sock *)socket);
	struct pool_holder *holder;
	struct scratch *mine;
	struct pool *pool;

	if (!connection || !connection->scratch.failing_pool)
		return 0;
	mine = &connection->scratch;
	pool = pool_find(mine->failing_pool);
	holder = holder_find(mine->failing_holder);
	if (pool && holder && error == EADDRNOTAVAIL) {
		search_add(pool, mine->searched_ns);
		__sync_fetch_and_add(&holder->failed_connects[epoch & 1], 1);
	}
	unpin(mine);
	return 0;
}

UNLESS("bound4__syscall")
SEC("fexit/__inet_stream_connect")
int FUNCTION_PROG(connected__fexit, struct socket *socket, void *address, int size, int flags, int is_sendmsg,
		  int result)
{
	struct sock *sk = result < 0 ? tcp_sock_of_socket(socket) : NULL;

	return sk ? failed((__u64)sk, -result) : 0;
}

/* bind() found no port, although any would do. */
static __noinline int bind_failed(__u64 socket, __u32 family, __u64 first, __u64 second)
{
	struct sock *sk = (struct sock *)socket;
	struct pool_key key = {.kind = POOL_BIND, .family = family};
	struct pool_holder *holder;
	__u32 place;

	key.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	__builtin_memcpy(key.laddr, &first, sizeof(first));
	__builtin_memcpy(key.laddr + 8, &second, sizeof(second));
	place = pool_place(&key);
	own_range_note(sk, place, 0);
	namespace_place(socket);
	holder = holder_find(holder_place(connection_find(sk), place));
	if (holder)
		__sync_fetch_and_add(&holder->failed_binds[epoch & 1], 1);
	return 0;
}

/* bind() returns. */
static __noinline int bind_returned(struct sock *sk, const struct socket_address *to, int size, int result)
{
	struct connection *connection;
	__u8 laddr[16];
	__u64 *words = (__u64 *)laddr;

	/* IP_BIND_ADDRESS_NO_PORT leaves the port to connect(). A port that the caller has named is not one of many. */
	if (!filter_may_want(sk) || (result && (!socket_address_fits(to, size) || to->port)) ||
	    (!result && !BPF_CORE_READ(sk, __sk_common.skc_num)))
		return 0;
	connection = connection_find_or_add(sk);
	if (!connection)
		return 0;
	if (!connection->state) {
		owner_of_current(&connection->opener);
		connection->state = STATE_CLOSE;
	}
	if (!result)
		return bound((__u64)sk, connection, STATE_CLOSE);
	if (to->family == AF_INET)
		map_v4(laddr, to->v4);
	else
		__builtin_memcpy(laddr, to->v6, 16);
	return bind_failed((__u64)sk, is_v4_mapped(laddr) ? 4 : 6, words[0], words[1]);
}

SEC("fexit/inet_bind")
int FUNCTION_PROG(bound4__fexit, struct socket *socket, void *address, int size, int result)
{
	struct sock *sk = tcp_sock_of_socket(socket);
	struct socket_address to = {};

	if (!sk)
		return 0;
	SOCKET_ADDRESS_READ(bpf_probe_read_kernel, &to, address, size);
	return bind_returned(sk, &to, size, result);
}

static __always_inline bool took_or_found_no_port(const struct pt_regs *regs, long result)
{
	return result == -EADDRNOTAVAIL ? syscall_is_connect(regs)
					: (!result || result == -EADDRINUSE) && syscall_is_bind(regs);
}

/* bind() or connect() returns: one program at the exit of every system call. */
SEC("tp_btf/sys_exit")
int TRACEPOINT_PROG_IF(took_or_found_no_port(regs, result), bound4__syscall, struct pt_regs *regs, long result)
{
	struct socket_address to = {};
	__u64 arguments[3];
	struct sock *sk;

	syscall_arguments(regs, arguments);
	sk = tcp_sock_of_fd(arguments[0]);
	if (!sk)
		return 0;
	if (result == -EADDRNOTAVAIL)
		return failed((__u64)sk, -result);
	SOCKET_ADDRESS_READ(bpf_probe_read_user, &to, arguments[1], arguments[2]);
	return bind_returned(sk, &to, arguments[2], result);
}

/* A kernel without IPv6 has no such function. */
OPTIONAL("ports that bind() takes for IPv6")
UNLESS("bound4__syscall")
SEC("fexit/inet6_bind")
int FUNCTION_PROG(bound6__fexit, struct socket *socket, void *address, int size, int result)
{
	struct sock *sk = tcp_sock_of_socket(socket);
	struct socket_address to = {};

	if (!sk)
		return 0;
	SOCKET_ADDRESS_READ(bpf_probe_read_kernel, &to, address, size);
	return bind_returned(sk, &to, size, result);
}

static __always_inline bool is_timewait(struct timer_list *timer)
{
	return timewait_function && (__u64)timer->function == timewait_function;
}

static __always_inline __u64 timewait_with(struct timer_list *timer)
{
	return (__u64)timer - bpf_core_field_offset(struct inet_timewait_sock, tw_timer);
}

/* A timer is taken away: it has run out, was stopped, or is set anew. The kernel holds a lock, with interrupts off. */
SEC("tp_btf/timer_cancel")
int TRACEPOINT_PROG_IF(is_timewait(timer), timer_ends, struct timer_list *timer)
{
	return timewait_end(timewait_with(timer));
}

SEC("tp_btf/timer_start")
int TRACEPOINT_PROG_IF(is_timewait(timer), timer_begins, struct timer_list *timer)
{
	return timewait_again(timewait_with(timer));
}

/* Did connect() choose the port, and not bind()? */
static __always_inline bool chosen_by_connect(struct inet_bind_bucket *bucket)
{
	return BPF_CORE_READ(bucket, fastreuse) < 0 && BPF_CORE_READ(bucket, fastreuseport) < 0;
}

/*
 * Does a socket that is older than the tool have a port that counts? Children share the port of their listener, which has it already.
 */
static __always_inline bool counts(struct sock *sk, __u8 state)
{
	struct inet_bind_bucket *bucket = BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_bind_hash);

	return bucket && filter_may_want(sk) &&
	       (state == STATE_LISTEN || state == STATE_CLOSE || chosen_by_connect(bucket) ||
		role_of_older(sk, state) == ROLE_ACTIVE);
}

static __noinline int found(struct sock *sk, struct connection *connection, __u8 state)
{
	struct inet_bind_bucket *bucket = BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_bind_hash);

	connection->state = state;
	connection->role = state == STATE_LISTEN ? ROLE_LISTENER : ROLE_ACTIVE;
	return chosen_by_connect(bucket) ? chosen((__u64)sk, connection, state) : bound((__u64)sk, connection, state);
}

static __always_inline void held_by(struct task_struct *task, struct file *file)
{
	struct sock *sk = tcp_sock_of_file(file);
	struct connection *connection;
	__u8 state;

	if (!sk)
		return;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (connection_find(sk) || !counts(sk, state))
		return;
	connection = connection_find_or_add(sk);
	if (!connection)
		return;
	owner_of_task(task, &connection->opener);
	found(sk, connection, state);
}

/* The sockets that processes have open. Those that are only bound are found here alone. */
SEC("iter/task_file")
int held(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (task && file)
		held_by(task, file);
	return walk_on(ctx);
}

/* Of the others: sockets that no process has open any more. */
SEC("iter/tcp")
int existing(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct sock *sk = (struct sock *)common;
	struct tcp_timewait_sock *waiting;
	struct connection *connection;
	struct tcp_sock *tcp;

	if (!common || !filter_may_want(sk))
		return 0;
	waiting = bpf_skc_to_tcp_timewait_sock(common);
	if (waiting) {
		if (!chosen_by_connect(BPF_CORE_READ(waiting, tw_sk.tw_tb)))
			return 0;
		return timewait_begin((__u64)common, connect_place((__u64)common), 0, 0) * 0;
	}
	tcp = bpf_skc_to_tcp_sock(common);
	if (!tcp || common->skc_state == STATE_LISTEN || connection_find(sk) || !counts(sk, common->skc_state))
		return 0;
	connection = connection_find_or_add(sk);
	return connection ? found(sk, connection, common->skc_state) : 0;
}
