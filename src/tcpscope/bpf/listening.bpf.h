/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Which process listens where: a child does not know its listener, only the address that it was called at. */
#ifndef TCPSCOPE_LISTENING_BPF_H
#define TCPSCOPE_LISTENING_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"
#include "identity.bpf.h"

struct listen_key {
	__u32 netns;
	__u32 port;
	__u8 address[16];
};

struct listening {
	struct owner owner;
	__u64 sk;      /* 0: several */
	__u32 sockets; /* with SO_REUSEPORT several */
	__u32 mixed;   /* of more than one process: then nobody can say whose child it will be */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct listen_key);
	__type(value, struct listening);
} listening SEC(".maps");

static __always_inline void listening_key(const struct identity *id, struct listen_key *key)
{
	key->netns = id->netns;
	key->port = id->lport;
	__builtin_memcpy(key->address, id->laddr, 16);
}

/* A listener more. False if there is no room for it. */
static __always_inline bool listening_add(const struct identity *id, const struct owner *owner, struct sock *sk)
{
	struct listening entry = {.owner = *owner, .sk = (__u64)sk, .sockets = 1};
	struct listening *present;
	struct listen_key key = {};

	listening_key(id, &key);
	if (!bpf_map_update_elem(&listening, &key, &entry, BPF_NOEXIST))
		return true;
	present = bpf_map_lookup_elem(&listening, &key);
	if (!present) {
		COUNT(table_full);
		return false;
	}
	if (present->sockets) {
		present->sk = 0;
		if (present->owner.pid != owner->pid)
			present->mixed = 1;
	} else { /* being removed: nothing of it holds any more */
		present->owner = *owner;
		present->sk = (__u64)sk;
		present->mixed = 0;
	}
	__sync_fetch_and_add(&present->sockets, 1);
	return true;
}

static __always_inline void listening_remove(const struct identity *id)
{
	struct listening *present;
	struct listen_key key = {};

	listening_key(id, &key);
	present = bpf_map_lookup_elem(&listening, &key);
	if (!present)
		return;
	__sync_fetch_and_add(&present->sockets, -1); /* before 5.12 it has no result */
	if (!present->sockets)
		bpf_map_delete_elem(&listening, &key);
}

/* The listener of a child: bound to the child's own address, or to any address of its or of either family. */
static __always_inline struct listening *listening_for(const struct identity *child)
{
	struct listening *found;
	struct listen_key key = {};

	listening_key(child, &key);
	found = bpf_map_lookup_elem(&listening, &key);
	if (!found && child->family == 4) {
		map_v4(key.address, 0);
		found = bpf_map_lookup_elem(&listening, &key);
	}
	if (!found) {
		__builtin_memset(key.address, 0, 16);
		found = bpf_map_lookup_elem(&listening, &key);
	}
	return found;
}

#endif
