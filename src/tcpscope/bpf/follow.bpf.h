/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The programs of an object that follows connections from transition to transition, until the sockets are destroyed. An
 * object that includes this defines
 *
 *   matters(old_state, new_state)      whether it handles this transition; asked first, so all others cost little
 *   makes_entry(old_state, new_state)  whether this transition adds an entry for a socket that has none
 *   state_changed(sk, change)          handles a transition that matters; it calls follow_find() and follow_update()
 *   before_end(sk, connection)         handles what is pending when the socket is destroyed
 *
 * and FOLLOWED (missed.bpf.h), if it does not follow all states.
 */
#ifndef TCPSCOPE_FOLLOW_BPF_H
#define TCPSCOPE_FOLLOW_BPF_H

#include "connection.bpf.h"
#include "missed.bpf.h"
#include "recursion.bpf.h"

static __always_inline bool matters(int old_state, int new_state);
static __always_inline bool makes_entry(int old_state, int new_state);
static __always_inline int state_changed(struct sock *sk, const struct change *change);
static __always_inline void before_end(struct sock *sk, struct connection *connection);

/* The transitions of an object that needs owners and ends only. Without CLOSE the second copy of the program would take a
 * second SYN_SENT of the socket for one that the first copy handled. */
static __always_inline __attribute__((unused)) bool begins_or_ends(int old_state, int new_state)
{
	return new_state == STATE_SYN_SENT || new_state == STATE_LISTEN || new_state == STATE_CLOSE ||
	       is_birth(old_state, new_state);
}

/* A connection at one of its transitions. */
struct followed {
	struct connection *connection; /* NULL: it has no entry */
	struct identity unlisted;      /* its identity, if it has no entry */
	bool after_miss;               /* a transition was missed: when it entered the old state is not known */
	bool unseen_start;             /* the entry is still that of the connection before */
};

/* Finds the entry, which still describes the old state. follow_update() brings it up to date. */
static __always_inline void follow_find(struct followed *now, struct sock *sk, const struct change *change)
{
	now->connection =
		makes_entry(change->old_state, change->new_state) ? connection_find_or_add(sk) : connection_find(sk);
	now->after_miss = now->unseen_start = false;
	if (!now->connection) {
		if (makes_entry(change->old_state, change->new_state) && filter_may_want(sk))
			note_no_place(sk, change->new_state);
		return;
	}
	/* A child is a new socket: an entry at its address is that of a socket which is gone. */
	now->after_miss = missed_transition(
		sk, now->connection, is_birth(change->old_state, change->new_state) ? STATE_CLOSE : change->old_state);
	now->unseen_start =
		now->after_miss && (change->old_state == STATE_SYN_SENT || change->old_state == STATE_SYN_RECV);
}

/* Is the socket connected again? Then nothing more comes for what the connection before left pending. */
static __always_inline bool follow_begins_anew(const struct followed *now, const struct change *change)
{
	return now->connection && (now->unseen_start || change->new_state == STATE_SYN_SENT);
}

static __always_inline const struct identity *follow_identity(const struct followed *now)
{
	return now->connection ? &now->connection->id : &now->unlisted;
}

static __always_inline void follow_update(struct followed *now, struct sock *sk, const struct change *change)
{
	/* inet_csk_clone_lock() copies the listener's cookie, and resets the copy only after the child's first transition. */
	bool birth = is_birth(change->old_state, change->new_state);
	struct connection *connection = now->connection;

	if (!connection) {
		if (birth)
			connection_born(sk, NULL);
		__builtin_memset(&now->unlisted, 0, sizeof(now->unlisted));
		now->unlisted.cookie = birth ? 0 : COOKIE_OF(sk);
		identity_read(sk, &now->unlisted);
		return;
	}
	if (now->unseen_start)
		connection_begin(connection, ROLE_UNKNOWN);
	connection_changed(sk, connection, change->old_state, change->new_state);
	connection->state = change->new_state;
	if (!connection->id.cookie && !birth)
		connection->id.cookie = COOKIE_OF(sk);
	if (change->new_state == STATE_SYN_SENT || birth)
		connection->opened_ns = change->time_ns;
}

ROLE("delays")
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(matters(old_state, new_state), state, struct sock *sk, int old_state, int new_state)
{
	struct change change = {.old_state = old_state, .new_state = new_state};

	if (sk->sk_protocol == IPPROTO_TCP) {
		change.time_ns = bpf_ktime_get_ns();
		state_changed(sk, &change);
	}
	return 0;
}

/*
 * A whole copy, not a tail call to the first: a softirq that interrupts the first one would run it on its own stack. Since
 * "bpf, x86: Add jit support for private stack" (6.13) a program has one stack for each processor, and only a call from outside
 * is checked for recursion.
 */
AGAIN
ROLE("delays")
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(matters(old_state, new_state), state_again, struct sock *sk, int old_state, int new_state)
{
	struct change change = {.old_state = old_state, .new_state = new_state};

	if (sk->sk_protocol == IPPROTO_TCP && was_skipped(sk, new_state, makes_entry(old_state, new_state))) {
		change.time_ns = bpf_ktime_get_ns();
		state_changed(sk, &change);
	}
	return 0;
}

static __always_inline int destroyed(struct sock *sk)
{
	struct connection *connection = connection_find(sk);

	if (!connection)
		return 0;
	missed_transition(sk, connection, STATE_CLOSE);
	before_end(sk, connection);
	connection_forget(sk);
	return 1;
}

#include "destroy.bpf.h"

#endif
