/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The ports that bind() has taken, which several sockets may share. */
#ifndef TCPSCOPE_PORTS_TAKEN_BPF_H
#define TCPSCOPE_PORTS_TAKEN_BPF_H

/* A port that bind() has taken: for a local address, or, with `kind` POOL_NAMESPACE, at all. Deleted with its last socket. */
struct taken_key {
	__u32 netns;
	__u16 port;
	__u8 kind;
	__u8 padding;
	__u8 laddr[16];
};

struct taken {
	__s32 sockets;
	__s32 listeners;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, struct taken_key);
	__type(value, struct taken);
} taken SEC(".maps");

/* One socket more has a port that bind() has taken. True if it is the first one. */
static __noinline int taken_add(const struct taken_key *key, bool listens)
{
	struct taken first = {.sockets = 1, .listeners = listens}, *entry;
	long error = bpf_map_update_elem(&taken, key, &first, BPF_NOEXIST);

	if (!error)
		return true;
	entry = bpf_map_lookup_elem(&taken, key);
	if (!entry) {
		NO_ROOM();
		return false;
	}
	__sync_fetch_and_add(&entry->sockets, 1);
	if (listens)
		__sync_fetch_and_add(&entry->listeners, 1);
	return false;
}

/* One less. True if it was the last one. */
static __noinline int taken_remove(const struct taken_key *key, bool listens)
{
	struct taken *entry = bpf_map_lookup_elem(&taken, key);

	if (!entry)
		return false;
	__sync_fetch_and_add(&entry->sockets, -1);
	if (listens)
		__sync_fetch_and_add(&entry->listeners, -1);
	return entry->sockets <= 0 && !bpf_map_delete_elem(&taken, key);
}

/* A socket takes or gives back a port of a pool of bind(), which is that of an address or of the namespace. */
static __noinline int port_count(__u32 place, __u16 port, bool listens, bool takes)
{
	struct pool *pool = pool_find(place);
	struct taken_key key = {.port = port};

	if (!pool)
		return 0;
	key.netns = pool->key.netns;
	key.kind = pool->key.kind;
	__builtin_memcpy(key.laddr, pool->key.laddr, sizeof(key.laddr));
	if (takes && taken_add(&key, listens))
		__sync_fetch_and_add(&pool->bound, 1);
	if (!takes && taken_remove(&key, listens))
		__sync_fetch_and_add(&pool->bound, -1);
	return 0;
}

#endif
