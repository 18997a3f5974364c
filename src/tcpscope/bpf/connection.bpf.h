/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The table of connections: who each is, whose it is, and what softirq context has forgotten about it.
 *
 * It is keyed by the socket's address. An entry is inserted when the socket is first seen (transition, accept, seed) and
 * deleted at tcp_destroy_sock, which fires for every TCP socket on every kernel of the matrix.
 *
 * An object that keeps more about a connection declares a `struct scratch` and HAS_SCRATCH before it includes this.
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

/* SHARED("owner") in an object that only asks whose a socket is. */
#ifndef CONNECTIONS_ARE
#define CONNECTIONS_ARE
#endif

struct connection {
	struct identity id;    /* see identity_complete() */
	struct owner opener;   /* who called connect() or listen(); for a child, who listens */
	struct owner accepter; /* who called accept() */
	__u64 opened_ns;       /* entered SYN_SENT, LISTEN or, as a child, SYN_RECV; 0: not seen */
	__u64 listener;        /* of a child: address of the listener's socket, which may be gone; 0: not known */
	bool accepted;         /* `accepter` is filled */
	enum role role;
	enum tcp_state state; /* after the last transition that was seen; 0: none was */
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

/* NULL if the filter excludes it for good, or the table is full. */
static __always_inline struct connection *connection_add(struct sock *sk)
{
	__u64 key = (__u64)sk;

	if (!filter_may_want(sk))
		return NULL;
	bpf_map_update_elem(&connections, &key, &new_connection, BPF_NOEXIST);
	return bpf_map_lookup_elem(&connections, &key);
}

static __always_inline struct connection *connection_find_or_add(struct sock *sk)
{
	struct connection *found = connection_find(sk);

	if (found)
		return found;
	found = connection_add(sk);
	if (!found && filter_may_want(sk))
		COUNT(table_full);
	return found;
}

/* False if there was nothing to forget. */
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

/* It carried data, or might have: with TCP Fast Open a child is accepted, reads and writes in SYN_RECV. */
static __always_inline bool had_life(const struct connection *connection, int state)
{
	return was_established(state) || (state == STATE_SYN_RECV && connection && connection->accepted);
}

/* Both ports are set; a listener has only one. From then on the identity is not read again. */
static __always_inline bool identity_complete(const struct connection *connection)
{
	return connection->id.lport && (connection->id.rport || connection->role == ROLE_LISTENER);
}

/* A socket may be connected again after a disconnect, and its address may be another one's after it: begin anew. */
static __always_inline void connection_begin(struct connection *connection, enum role role)
{
	__builtin_memset(connection, 0, sizeof(*connection));
	connection->role = role;
}

/*
 * A child is being made on this CPU: its listener, or where that is not known before, the child. Softirqs do not nest, and
 * what stands here is used once. See child.bpf.h.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} at_birth SEC(".maps");

const volatile bool hooked_child4; /* else the listener's wake-up tells, after the child's transitions */

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
	if (hooked_child4) {
		if (*place)
			connection_of_listener(connection, (struct sock *)*place);
		*place = 0;
	} else {
		*place = (__u64)sk;
	}
}

/* The listener of a child, if that is known and it still listens; else NULL. */
static __always_inline struct sock *connection_listener(const struct connection *connection)
{
	struct sock *sk = connection ? (struct sock *)connection->listener : NULL;

	return sk && connection_find(sk) && BPF_CORE_READ(sk, __sk_common.skc_state) == STATE_LISTEN ? sk : NULL;
}

/* What a change of state tells about a connection. */
static __always_inline void connection_changed(struct sock *sk, struct connection *connection, int old_state,
					       int new_state)
{
	if (new_state == STATE_SYN_SENT || new_state == STATE_LISTEN) {
		/* In the caller's context. */
		connection_begin(connection, new_state == STATE_LISTEN ? ROLE_LISTENER : ROLE_ACTIVE);
		owner_of_current(&connection->opener);
	} else if (is_birth(old_state, new_state)) {
		connection_begin(connection, ROLE_PASSIVE);
		connection_born(sk, connection);
	}
	/* In the first state one of the two ends is not set yet. */
	if (new_state != STATE_SYN_SENT && !is_birth(old_state, new_state) && !identity_complete(connection))
		identity_read(sk, &connection->id);
}

/* The entry of a socket whose state changes, up to date. Call it before using the entry. */
static __always_inline struct connection *connection_transition(struct sock *sk, int old_state, int new_state)
{
	struct connection *connection = new_state == STATE_CLOSE ? connection_find(sk) : connection_find_or_add(sk);

	if (connection) {
		connection_changed(sk, connection, old_state, new_state);
		connection->state = new_state;
	}
	return connection;
}

/* accept() returns `child` to the current process. */
static __always_inline struct connection *connection_accepted(struct sock *child)
{
	struct connection *connection = child ? connection_find_or_add(child) : NULL;

	if (!connection || connection->accepted)
		return connection;
	connection->role = ROLE_PASSIVE;
	owner_of_current(&connection->accepter);
	memory_barrier(); /* a reader on another processor never sees half an owner */
	connection->accepted = true;
	return connection;
}

/*
 * The seed: one pass over all open files puts the owners of the sockets that are older than the tool into the table.
 * The first process that holds a socket is taken as its owner. With `only`, sockets in that state. NULL: not wanted, or
 * it has an owner.
 *
 * The iterator holds the file, so the socket cannot be destroyed between the look and the insertion, and no entry can be
 * left behind. The file of an MPTCP socket does not hold its subflow: hence the second look.
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
	connection = connection_find_or_add(sk);
	if (!connection || connection->opener.pid || connection->accepted)
		return NULL;
	if (!file_holds(file, sk) &&
	    (tcp_sock_of_file(file) != sk || BPF_CORE_READ(sk, __sk_common.skc_state) == STATE_CLOSE)) {
		connection_forget(sk);
		return NULL;
	}
	owner_of_task(task, &connection->opener);
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

/* The program of the seed. Listeners get their cookie: events know them by address only. */
#define SEED(only)                                       \
	ROLE("seeds")                                    \
	SEC("iter/task_file")                            \
	int seed(struct bpf_iter__task_file *ctx)        \
	{                                                \
		struct task_struct *task = ctx->task;    \
		struct file *file = ctx->file;           \
                                                         \
		if (!task || !file)                      \
			return 0;                        \
		if ((only) == STATE_LISTEN)              \
			cookie_give(file, STATE_LISTEN); \
		connection_seed(task, file, only);       \
		return 0;                                \
	}

#endif
