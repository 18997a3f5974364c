/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The table of connections: both ends, owner and role. A softirq does not know these by itself.
 *
 * The key is the socket's address. A transition, accept() or the seed inserts an entry when it first sees the socket.
 * tcp_destroy_sock deletes it; this tracepoint fires for every TCP socket on every kernel of the matrix.
 *
 * An object that keeps more about a connection defines `struct scratch` and HAS_SCRATCH before it includes this.
 */
#ifndef TCPSCOPE_CONNECTION_BPF_H
#define TCPSCOPE_CONNECTION_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "files.bpf.h"
#include "identity.bpf.h"
#include "owner.bpf.h"
#include "state.bpf.h"

/* SHARED("owner") in an object that only asks for the owner of a socket. */
#ifndef CONNECTIONS_ARE
#define CONNECTIONS_ARE
#endif

struct connection {
	struct identity id;    /* see identity_complete() */
	struct owner opener;   /* the process that called connect() or listen(); of a child: its listener's opener */
	struct owner accepter; /* the process that called accept() */
	__u64 opened_ns;       /* when it entered SYN_SENT, LISTEN or, as a child, SYN_RECV; 0: not seen */
	__u64 listener;        /* of a child: address of the listener's socket, which may be gone; 0: not known */
	__u64 seeded_ns;       /* when `opener` was started, if the seed found it; 0: no */
	bool accepted;         /* `accepter` is filled */
	enum role role;
	enum tcp_state state; /* after the last transition that a program saw; 0: none saw one */
#ifdef HAS_SCRATCH
	struct scratch scratch;
#endif
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct connection);
} connections SEC(".maps")
CONNECTIONS_ARE;

static const struct connection new_connection;

static __always_inline struct connection *connection_find(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&connections, &key);
}

/* NULL if the socket can never pass the filter, or the table is full. */
static __always_inline struct connection *connection_add(struct sock *sk)
{
	__u64 key = (__u64)sk;

	if (!filter_may_want(sk))
		return NULL;
	table_put(&connections, &key, &new_connection, BPF_NOEXIST);
	return bpf_map_lookup_elem(&connections, &key);
}

static __always_inline struct connection *connection_find_or_try(struct sock *sk, bool counts)
{
	struct connection *found = connection_find(sk);

	if (found)
		return found;
	found = connection_add(sk);
	if (!found && counts && filter_may_want(sk))
		COUNT(table_full);
	return found;
}

static __always_inline struct connection *connection_find_or_add(struct sock *sk)
{
	return connection_find_or_try(sk, true);
}

/* Deletes the entry. False if there was none. */
static __always_inline bool connection_forget(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return !bpf_map_delete_elem(&connections, &key);
}

static __always_inline const struct owner *connection_owner(const struct connection *connection)
{
	if (!connection)
		return NULL;
	if (!connection->accepted)
		return &connection->opener;
	memory_barrier();
	return &connection->accepter;
}

/* Could it carry data in this state? With TCP Fast Open an accepted child reads and writes in SYN_RECV. */
static __always_inline bool had_life(const struct connection *connection, int state)
{
	return was_established(state) || (state == STATE_SYN_RECV && connection && connection->accepted);
}

/* Both ports are set; a listener has only one. The identity does not change any more. */
static __always_inline bool identity_complete(const struct connection *connection)
{
	return connection->id.lport && (connection->id.rport || connection->role == ROLE_LISTENER);
}

/* Clears the entry. A process may disconnect a socket and connect it again; another socket may get the same address. */
static __always_inline void connection_begin(struct connection *connection, enum role role)
{
	__builtin_memset(connection, 0, sizeof(*connection));
	connection->role = role;
}

/* In the context of connect() or listen(), but for a further subflow of an MPTCP socket. */
static __always_inline void connection_opened(struct sock *sk, struct connection *connection)
{
	struct sock *first = first_subflow(sk);
	const struct connection *other = first ? connection_find(first) : NULL;

	if (!first)
		owner_of_current(&connection->opener);
	else if (other)
		connection->opener = *connection_owner(other);
}

/*
 * While the kernel makes a child on this CPU: its listener, or the child if the listener is not known before. Softirqs do
 * not nest, and the value is used once. See child.bpf.h.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} at_birth SEC(".maps");

const volatile bool hooked_child4; /* otherwise the listener's wake-up names it, after the child's transitions */

static __always_inline void connection_of_listener(struct connection *connection, struct sock *listener)
{
	const struct connection *parent = connection_find(listener);

	connection->listener = (__u64)listener;
	if (parent && parent->role == ROLE_LISTENER)
		connection->opener = parent->opener;
}

static __always_inline void connection_born(struct sock *sk, struct connection *connection)
{
	__u32 zero = 0;
	__u64 *place = bpf_map_lookup_elem(&at_birth, &zero);

	if (!place)
		return;
	if (!hooked_child4) {
		*place = connection ? (__u64)sk : 0;
		return;
	}
	if (*place && connection)
		connection_of_listener(connection, (struct sock *)*place);
	*place = 0;
}

/* The listener of a child. NULL if it is not known, or listens no more. */
static __always_inline struct sock *connection_listener(const struct connection *connection)
{
	struct sock *sk = connection ? (struct sock *)connection->listener : NULL;

	return sk && connection_find(sk) && BPF_CORE_READ(sk, __sk_common.skc_state) == STATE_LISTEN ? sk : NULL;
}

/* Brings the role, the opener and the identity up to date at a transition. */
static __always_inline void connection_changed(struct sock *sk, struct connection *connection, int old_state,
					       int new_state)
{
	if (new_state == STATE_SYN_SENT || new_state == STATE_LISTEN) {
		/* In the context of connect() or listen(). */
		connection_begin(connection, new_state == STATE_LISTEN ? ROLE_LISTENER : ROLE_ACTIVE);
		connection_opened(sk, connection);
	} else if (is_birth(old_state, new_state)) {
		connection_begin(connection, ROLE_PASSIVE);
		connection_born(sk, connection);
	}
	/* In the first state one of the two ends is not set yet. */
	if (new_state != STATE_SYN_SENT && !is_birth(old_state, new_state) && !identity_complete(connection))
		identity_read(sk, &connection->id);
}

/* The entry of a socket at a transition, brought up to date. NULL if it has none. */
static __always_inline struct connection *connection_transition(struct sock *sk, int old_state, int new_state)
{
	struct connection *connection = new_state == STATE_CLOSE ? connection_find(sk) : connection_find_or_add(sk);

	if (connection) {
		connection_changed(sk, connection, old_state, new_state);
		connection->state = new_state;
	}
	return connection;
}

/* accept() returns `child` to the current process, which becomes its owner. NULL: no place in the table. */
static __always_inline struct connection *connection_accepted(struct sock *child)
{
	struct connection *connection = child ? connection_find_or_add(child) : NULL;

	if (!connection || connection->accepted)
		return connection;
	connection->role = ROLE_PASSIVE;
	owner_of_current(&connection->accepter);
	memory_barrier(); /* no reader on another processor sees half an owner */
	connection->accepted = true;
	return connection;
}

/* The seed runs twice when the object is loaded. Only the second time it counts the sockets that find no place. */
bool seed_counts;

/*
 * The seed: an iterator over all open files calls this, so that sockets older than the tool have an owner. The kernel does
 * not keep who opened a socket. So the owner is the process that started first, of those that hold it: a parent starts before
 * the children that inherit its sockets. `only`: sockets in that state. NULL: not wanted, or it has an owner already.
 *
 * The iterator holds the file, so the socket cannot be destroyed between the look and the insertion, and no entry stays
 * behind. The file of an MPTCP socket does not hold its subflow. So the code looks at the subflow once more.
 */
static __always_inline struct connection *connection_seed(struct task_struct *task, struct file *file,
							  enum tcp_state only)
{
	struct sock *sk = tcp_sock_of_file(file);
	struct connection *connection;
	__u8 state;

	if (!sk)
		return NULL;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == STATE_CLOSE || (only && state != only))
		return NULL;
	connection = connection_find_or_try(sk, seed_counts);
	if (!connection || connection->accepted ||
	    (connection->opener.pid && connection->seeded_ns <= started_ns(task)))
		return NULL;
	if (!file_holds(file, sk) &&
	    (tcp_sock_of_file(file) != sk || BPF_CORE_READ(sk, __sk_common.skc_state) == STATE_CLOSE)) {
		connection_forget(sk);
		return NULL;
	}
	owner_of_task(task, &connection->opener);
	connection->seeded_ns = started_ns(task);
	if (state == STATE_LISTEN && connection->role != ROLE_LISTENER) {
		connection->role = ROLE_LISTENER;
		identity_read(sk, &connection->id);
	} else if (state == STATE_SYN_SENT && connection->role == ROLE_UNKNOWN) {
		connection->role = ROLE_ACTIVE;
	} else if (connection->role == ROLE_UNKNOWN) {
		connection->role = role_of_older(sk, state);
	}
	return connection;
}

#define ANY_STATE 0

/*
 * The program of another object that looks at the same file next. Objects that begin together share one walk over all open
 * files (walk.py): that takes longer than what they do with each. On other processors a program that calls functions of its own
 * may have no tail call before 6.1; without this map each walks by itself.
 */
#ifdef __TARGET_ARCH_x86
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} next_walker SEC(".maps");
#endif

/* The last thing that a program of iter/task_file does. */
static __always_inline int walk_on(struct bpf_iter__task_file *ctx)
{
#ifdef __TARGET_ARCH_x86
	bpf_tail_call(ctx, &next_walker, 0);
#endif
	return 0;
}

/* The program of the seed. It gives listeners their cookie, because events know a listener only by address. */
#define SEED(only)                                               \
	ROLE("seeds")                                            \
	SEC("iter/task_file")                                    \
	int seed(struct bpf_iter__task_file *ctx)                \
	{                                                        \
		struct task_struct *task = ctx->task;            \
		struct file *file = ctx->file;                   \
                                                                 \
		if (task && file) {                              \
			if ((only) == STATE_LISTEN)              \
				cookie_give(file, STATE_LISTEN); \
			connection_seed(task, file, only);       \
		}                                                \
		return walk_on(ctx);                             \
	}

#endif
