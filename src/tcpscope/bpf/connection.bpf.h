/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The connection: who it is, whose it is, and what softirq context has forgotten about it.
 *
 * One table keyed by the socket's address. An entry is inserted when the socket is first seen (state change, accept,
 * seed) and deleted at tcp_destroy_sock, which fires for every TCP socket on every kernel of the matrix.
 */
#ifndef TCPSCOPE_CONNECTION_BPF_H
#define TCPSCOPE_CONNECTION_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "files.bpf.h"
#include "identity.bpf.h"
#include "listening.bpf.h"

enum role {
	ROLE_UNKNOWN,
	ROLE_ACTIVE,
	ROLE_PASSIVE,
	ROLE_LISTENER,
} __attribute__((packed));

/* A transition that waits until both ends of its connection are known. */
struct held {
	__u64 time_ns; /* 0: none */
	enum tcp_state old_state;
	enum tcp_state new_state;
};

/* Where an active open stands; see attempt.bpf.h. */
enum attempt_stage {
	ATTEMPT_NONE,
	ATTEMPT_OPEN,    /* SYN_SENT */
	ATTEMPT_CLOSED,  /* closed without an error of the socket: what connect() returns will tell */
	ATTEMPT_REPORTED /* failed and shown; connect() may still return the error */
} __attribute__((packed));

enum reset {
	RESET_NONE,
	RESET_SENT,
	RESET_RECEIVED,
	RESET_SEEN, /* one of the two */
} __attribute__((packed));

struct connection {
	struct identity id;     /* see identity_complete() */
	struct owner opener;    /* who called connect() or listen(); for a child, who listens */
	struct owner accepter;  /* who called accept() */
	__u64 changed_ns;       /* when its state was last seen to change */
	__u64 state_since_ns;   /* 0: not seen */
	__u64 opened_ns;        /* entered SYN_SENT or, as a child, SYN_RECV; 0: not seen */
	__u64 established_ns;   /* 0: not seen */
	__u64 closed_ns;        /* entered CLOSE, and whoever closed it is still at it: see life.bpf.h, attempt.bpf.h */
	__u32 syn_retrans;      /* valid once established, or closed in SYN_SENT */
	__u32 handshake_us;     /* of a child; valid once established */
	__u32 data_segs_before; /* received with data before it entered FIN_WAIT1 */
	__u32 error;            /* that ends it, if it was told before: see error_reported() */
	__u32 stale_error;      /* was in the socket when it entered SYN_SENT */
	struct held held;
	bool in_listening;     /* this listener is counted in `listening` */
	bool accepted;         /* `accepter` is filled; set after it, so a reader never sees half an owner */
	bool syn_sent;         /* valid once closed in SYN_SENT */
	bool connect_returned; /* while still in SYN_SENT; a byte of its own, as others write `attempt` meanwhile */
	bool told;             /* accepted before it was ESTABLISHED, and shown */
	bool timewait;         /* tcp_time_wait() was called, whether or not a timewait socket could be had */
	enum role role;
	enum tcp_state
		state; /* after the last change that was seen; 0: there was none, or the next one is not followed */
	enum tcp_state followed_by;
	enum tcp_state closed_in;
	enum attempt_stage attempt;
	enum reset reset;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct connection);
} connections SEC(".maps");

static const struct connection new_connection;

/* The processes below a cgroup belong to it. Walks upwards; 32 levels are more than anyone nests. */
static __always_inline bool below_filter_cgroup(struct task_struct *task)
{
	struct cgroup *cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);

	for (int level = 0; level < 32 && cgroup; level++) {
		struct cgroup_subsys_state *parent;

		if (BPF_CORE_READ(cgroup, kn, id) == filter.cgroup)
			return true;
		parent = BPF_CORE_READ(cgroup, self.parent);
		if (!parent)
			break;
		cgroup = BPF_CORE_READ(parent, cgroup);
	}
	return false;
}

/* The name is the process's, as ps and ss show it, not that of one of its threads. */
static __always_inline void owner_name(struct task_struct *task, struct owner *owner)
{
	/* Up to the NUL: before 5.17 the bytes behind it are those of an older name. */
	__builtin_memset(owner->comm, 0, sizeof(owner->comm));
	BPF_CORE_READ_STR_INTO(&owner->comm, task, group_leader, comm);
}

static __noinline int owner_of_task(struct task_struct *task, struct owner *owner)
{
	owner->pid = BPF_CORE_READ(task, tgid);
	owner->uid = BPF_CORE_READ(task, cred, uid.val);
	owner->cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	owner_name(task, owner);
	if (filter.cgroup)
		owner->in_cgroup = below_filter_cgroup(task);
	return 0;
}

/* The same in a third of the time, by the helpers that know the current task. */
static __noinline int owner_of_current(struct owner *owner)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u64 process_and_thread = bpf_get_current_pid_tgid();

	owner->pid = process_and_thread >> 32;
	owner->uid = bpf_get_current_uid_gid();
	owner->cgroup = bpf_get_current_cgroup_id();
	if ((__u32)process_and_thread == owner->pid)
		bpf_get_current_comm(owner->comm, sizeof(owner->comm));
	else
		owner_name(task, owner);
	if (filter.cgroup)
		owner->in_cgroup = below_filter_cgroup(task);
	return 0;
}

static __always_inline struct connection *connection_find(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&connections, &key);
}

static __always_inline struct connection *connection_find_or_add(struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct connection *found = bpf_map_lookup_elem(&connections, &key);

	if (found || !filter_may_want(sk))
		return found;
	bpf_map_update_elem(&connections, &key, &new_connection, BPF_NOEXIST);
	found = bpf_map_lookup_elem(&connections, &key);
	if (!found)
		COUNT(table_full);
	return found;
}

static __always_inline const struct owner *connection_owner(const struct connection *connection)
{
	if (!connection)
		return NULL;
	return connection->accepted ? &connection->accepter : &connection->opener;
}

static __always_inline bool was_established(int state)
{
	return state == STATE_ESTABLISHED || state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2 ||
	       state == STATE_CLOSE_WAIT || state == STATE_LAST_ACK || state == STATE_CLOSING;
}

/* It carried data, or might have: with TCP Fast Open a child is accepted, reads and writes in SYN_RECV. */
static __always_inline bool had_life(const struct connection *connection, int state)
{
	return was_established(state) || (state == STATE_SYN_RECV && connection && connection->accepted);
}

/* In these states our FIN is the last that there is to send. */
static __always_inline bool after_fin(int state)
{
	return was_established(state) && state != STATE_ESTABLISHED && state != STATE_CLOSE_WAIT;
}

/* Our FIN has been sent and acknowledged: it has a sequence number like a byte. */
static __always_inline bool fin_acked(struct sock *sk, int state)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	return after_fin(state) && BPF_CORE_READ(tp, snd_una) == BPF_CORE_READ(tp, write_seq);
}

/* Bytes that the remote end has acknowledged, with the SYN of an active open, but without the FIN. */
static __always_inline __u64 acked_before_fin(struct sock *sk, int state)
{
	return BPF_CORE_READ((struct tcp_sock *)sk, bytes_acked) - fin_acked(sk, state);
}

/*
 * Who opened a connection that is older than the tool: only an active open has an acknowledged SYN among its bytes.
 * The data among them is what was sent for the first time, less what is on its way. Where this host has thrown away
 * what it sent, that was counted as sent and not as retransmitted, and nothing can be told.
 */
static __noinline enum role role_of_older(struct sock *sk, int state)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	__u32 nxt = BPF_CORE_READ(tp, snd_nxt);
	__u32 on_its_way = nxt - BPF_CORE_READ(tp, snd_una);
	__u64 syn;

	if (!was_established(state))
		return ROLE_UNKNOWN;
	if (on_its_way && after_fin(state) && nxt == BPF_CORE_READ(tp, write_seq))
		on_its_way--;
	syn = acked_before_fin(sk, state) + on_its_way + BPF_CORE_READ(tp, bytes_retrans) -
	      BPF_CORE_READ(tp, bytes_sent);
	return syn == 1 ? ROLE_ACTIVE : syn == 0 ? ROLE_PASSIVE : ROLE_UNKNOWN;
}

/* Both ports are set; a listener has only one. From then on the identity is not read again. */
static __always_inline bool identity_complete(const struct connection *connection)
{
	return connection->id.lport && (connection->id.rport || connection->role == ROLE_LISTENER);
}

/* This listener is no more. */
static __always_inline void connection_stop_listening(struct connection *connection)
{
	if (connection->in_listening)
		listening_remove(&connection->id);
	connection->in_listening = false;
}

/* A socket may be connected again after a disconnect, and its address may be another one's after it: begin anew. */
static __always_inline void connection_begin(struct connection *connection, enum role role)
{
	connection_stop_listening(connection);
	__builtin_memset(connection, 0, sizeof(*connection));
	connection->role = role;
}

/* What a change of state tells about a connection. */
static __always_inline void connection_changed(struct sock *sk, struct connection *connection, int old_state,
					       int new_state)
{
	if (new_state == STATE_SYN_SENT || new_state == STATE_LISTEN) {
		/* In the caller's context. */
		connection_begin(connection, new_state == STATE_LISTEN ? ROLE_LISTENER : ROLE_ACTIVE);
		owner_of_current(&connection->opener);
	} else if (new_state == STATE_SYN_RECV && old_state == STATE_LISTEN) {
		connection_begin(connection, ROLE_PASSIVE);
	}
	if (!identity_complete(connection))
		identity_read(sk, &connection->id);
	if (new_state == STATE_SYN_SENT) /* in inet_sport the port of an earlier connection may stand */
		connection->id.lport = BPF_CORE_READ(sk, __sk_common.skc_num);
	/* listen() without bind(): the port is chosen only after this, and the children cannot be told whose they are. */
	if (new_state == STATE_LISTEN && connection->id.lport)
		connection->in_listening = listening_add(&connection->id, &connection->opener, sk);
	else if (old_state == STATE_LISTEN && new_state == STATE_CLOSE)
		connection_stop_listening(connection);
	if (connection->role == ROLE_PASSIVE && !connection->opener.pid) {
		struct listening *listener = listening_for(&connection->id);

		if (listener && !listener->mixed)
			connection->opener = listener->owner;
	}
}

/* The entry of a socket whose state changes, up to date. Call it before using the entry. */
static __always_inline struct connection *connection_transition(struct sock *sk, int old_state, int new_state)
{
	struct connection *connection = new_state == STATE_CLOSE ? connection_find(sk) : connection_find_or_add(sk);

	if (connection)
		connection_changed(sk, connection, old_state, new_state);
	return connection;
}

/*
 * Does this error of the socket end the connection? In an active open any does. Later it comes from a RST, from
 * `ss -K`, or from a timer that gives up, and then it is the soft error where there is one. What ICMP said to a socket with
 * IP_RECVERR ends nothing.
 */
static __always_inline bool error_ends(struct sock *sk, const struct connection *connection, __u32 error)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	return state == STATE_SYN_SENT || (state == STATE_SYN_RECV && connection && connection->role == ROLE_ACTIVE) ||
	       error == ECONNRESET || error == EPIPE || error == ECONNABORTED || error == ETIMEDOUT ||
	       error == (__u32)BPF_CORE_READ(sk, sk_err_soft);
}

/* The owner is told of an error. */
static __always_inline void error_reported(struct sock *sk)
{
	__u32 error = BPF_CORE_READ(sk, sk_err);
	struct connection *connection = error ? connection_find(sk) : NULL;

	if (connection && error_ends(sk, connection, error))
		connection->error = error;
}

/* Why it is being closed: the error that is in the socket, or was; 0: none. */
static __always_inline __u32 error_of(struct sock *sk, const struct connection *connection)
{
	__u32 error = BPF_CORE_READ(sk, sk_err);

	if (error && error_ends(sk, connection, error))
		return error;
	return connection ? connection->error : 0;
}

/* accept() returns `child` to the current process. */
static __always_inline struct connection *connection_accepted(struct sock *child)
{
	struct connection *connection = child ? connection_find_or_add(child) : NULL;

	if (!connection || connection->accepted)
		return connection;
	connection->role = ROLE_PASSIVE;
	owner_of_current(&connection->accepter);
	barrier();
	connection->accepted = true;
	return connection;
}

/* False if there was nothing to forget. */
static __always_inline bool connection_forget(struct sock *sk)
{
	struct connection *connection = connection_find(sk);
	__u64 key = (__u64)sk;

	if (!connection)
		return false;
	connection_stop_listening(connection);
	bpf_map_delete_elem(&connections, &key);
	return true;
}

/*
 * The seed: one pass over all open files puts the owners of the sockets that are older than the tool into the table.
 * The first process that holds a socket is taken as its owner. With `only`, sockets in that state. The iterator holds the
 * file, so the socket cannot be destroyed between the look and the insertion, and no entry can be left behind.
 */
static __always_inline void connection_seed(struct task_struct *task, struct file *file, enum tcp_state only)
{
	struct sock *sk = tcp_sock_of_file(file);
	struct connection *connection;
	__u8 state;

	if (!sk)
		return;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == STATE_CLOSE || (only && state != only))
		return;
	connection = connection_find_or_add(sk);
	if (!connection || connection->opener.pid || connection->accepted)
		return;
	owner_of_task(task, &connection->opener);
	if (state == STATE_LISTEN && connection->role != ROLE_LISTENER) {
		connection->role = ROLE_LISTENER;
		identity_read(sk, &connection->id);
		connection->in_listening = listening_add(&connection->id, &connection->opener, sk);
	} else if (state == STATE_SYN_SENT && connection->role == ROLE_UNKNOWN) {
		connection->role = ROLE_ACTIVE;
		connection->attempt = ATTEMPT_OPEN;
	} else if (connection->role == ROLE_UNKNOWN) {
		connection->role = role_of_older(sk, state);
	}
}

#endif
