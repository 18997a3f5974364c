/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * A visit to all entries of the table, in two ways. Since "bpf: Add bpf_for_each_map_elem() helper" (5.13) a program can
 * visit them; it runs at the end of an iteration over all maps, in the call without a map. Before 5.13 there is an iterator
 * over the entries of one map. Some kernels refuse that one and allow other iterators.
 */
#ifndef TCPSCOPE_VISIT_BPF_H
#define TCPSCOPE_VISIT_BPF_H

#include "connection.bpf.h"

/* Both ends, read from the socket: another processor may be writing those of the entry. */
static __always_inline void ends_read(struct sock *sk, const struct connection *connection, struct identity *id)
{
	id->cookie = connection->id.cookie ? connection->id.cookie : cookie_if_any(sk);
	identity_read(sk, id);
}

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

#endif
