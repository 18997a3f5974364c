// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * The owner of each socket, for objects that do not follow transitions: their `connections` is SHARED("owner"). A process
 * loads this object once. It sends no events.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "state.bpf.h"

#define FOLLOWED 0
#include "follow.bpf.h"
#include "accept_hooks.bpf.h"
#include "child.bpf.h"

static __always_inline bool matters(int old_state, int new_state)
{
	return begins_or_ends(old_state, new_state);
}

static __always_inline bool makes_entry(int old_state, int new_state)
{
	return new_state != STATE_CLOSE;
}

static __always_inline int state_changed(struct sock *sk, const struct change *change)
{
	struct followed now;

	follow_find(&now, sk, change);
	if (now.connection)
		follow_update(&now, sk, change);
	else if (is_birth(change->old_state, change->new_state))
		connection_born(sk, NULL);
	return 0;
}

static __always_inline void child_known(struct sock *child, struct connection *connection)
{
}

static __always_inline void accepted(struct sock *child, struct connection *connection, struct sock *listener)
{
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
}

SEED(ANY_STATE)
