/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The pools of local ports, and the processes that hold them: their places, and what is counted there. */
#ifndef TCPSCOPE_PORTS_POOLS_BPF_H
#define TCPSCOPE_PORTS_POOLS_BPF_H

#define POOLS 8192
#define HOLDERS 8192
#define STATES 16 /* a power of two */

enum pool_kind { POOL_NAMESPACE = 1, POOL_BIND, POOL_CONNECT };

struct pool_key {
	__u32 netns;
	__u16 rport;
	__u8 family;
	__u8 kind;
	__u8 laddr[16];
	__u8 raddr[16];
};

/* What was done since user space looked last. Programs add to one of two while `epoch` is even, to the other while it is odd. */
struct pool_span {
	__u64 opened;
	__u64 searches; /* ... of connect() for a port */
	__u64 search_ns;
	__u32 search_max_us[SHARDS]; /* by processor, as in aggregate.bpf.h */
};

struct pool {
	struct pool_key key; /* kind 0: the place is free */
	__s32 sockets[STATES];
	__s32 bound; /* ports that bind() has taken */
	__s32 pins;  /* sockets that come back to this place, although they count no more */
	__u32 own; /* IP_LOCAL_PORT_RANGE of the last socket that had one: first port, and the last one in the upper half; 0: none */
	__u32 range;      /* of POOL_NAMESPACE, when its last socket came */
	__u32 step_width; /* the same; -1: the kernel has no such sysctl */
	bool whole;       /* a socket without a range of its own has come, or one whose range is not known */
	bool mixed;       /* several ranges, or a port outside of the socket's own */
	__u8 tw_reuse;    /* as `range`: the sysctl tcp_tw_reuse */
	__u8 padding;
	__u64 checked_ns; /* of POOL_NAMESPACE, when `reserved` was filled; of POOL_CONNECT, when its namespace was asked for it */
	struct pool_span spans[2];
};
const struct pool *pool_anchor __attribute__((unused));

/* A process that holds ports of a pool, or whose calls fail for want of one. */
struct pool_holder {
	struct owner owner; /* the process that called connect() or bind(); pid 0: not known */
	__u32 pool;         /* its place; 0: this place is free */
	__s32 ports;
	__s32 pins;
	__u32 padding;
	__u64 failed_connects[2]; /* by epoch */
	__u64 failed_binds[2];
	bool wanted; /* passes the filter */
	__u8 padding2[7];
};
const struct pool_holder *pool_holder_anchor __attribute__((unused));

/* In memory shared with user space, which frees the places of pools that count nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, POOLS);
	__type(key, __u32);
	__type(value, struct pool);
} pools SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HOLDERS);
	__type(key, __u32);
	__type(value, struct pool_holder);
} holders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_STACK);
	__uint(max_entries, POOLS);
	__uint(value_size, sizeof(__u32));
} free_pools SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_STACK);
	__uint(max_entries, HOLDERS);
	__uint(value_size, sizeof(__u32));
} free_holders SEC(".maps");

/* One more than an index. */
struct place {
	__u32 number;
};
const struct place *place_anchor __attribute__((unused));

/* Where a pool is. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, POOLS);
	__type(key, struct pool_key);
	__type(value, struct place);
} pool_places SEC(".maps");

struct holder_key {
	__u32 pool;
	__u32 pid;
	char comm[16];
};
const struct holder_key *holder_key_anchor __attribute__((unused));
const struct pool_key *pool_key_anchor __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HOLDERS);
	__type(key, struct holder_key);
	__type(value, struct place);
} holder_places SEC(".maps");

/* Sockets, ports or processes for which a table had no room. */
#define NO_ROOM() COUNT(table_full)

static __always_inline struct pool *pool_find(__u32 place)
{
	__u32 index = place - 1;

	return place ? bpf_map_lookup_elem(&pools, &index) : NULL;
}

static __always_inline struct pool_holder *holder_find(__u32 place)
{
	__u32 index = place - 1;

	return place ? bpf_map_lookup_elem(&holders, &index) : NULL;
}

/* The place of a pool; 0: there is no room. */
static __noinline int pool_place(const struct pool_key *key)
{
	struct place *known = bpf_map_lookup_elem(&pool_places, key), place;
	struct pool *pool;
	__u32 index;

	if (known)
		return known->number;
	if (bpf_map_pop_elem(&free_pools, &index))
		goto full;
	pool = bpf_map_lookup_elem(&pools, &index);
	if (!pool)
		goto full;
	pool->key = *key;
	place.number = index + 1;
	if (!bpf_map_update_elem(&pool_places, key, &place, BPF_NOEXIST))
		return place.number;
	pool->key.kind = 0; /* another processor was quicker */
	bpf_map_push_elem(&free_pools, &index, 0);
	known = bpf_map_lookup_elem(&pool_places, key);
	if (known)
		return known->number;
full:
	NO_ROOM();
	return 0;
}

/* The place of the socket's owner in a pool; 0: there is no room. */
static __noinline int holder_place(const struct connection *connection, __u32 pool)
{
	struct holder_key key = {.pool = pool};
	struct pool_holder *holder;
	struct place *known, place;
	struct owner owner = {};
	__u32 index;

	if (!pool)
		return 0;
	if (connection) {
		key.pid = connection->opener.pid;
		__builtin_memcpy(key.comm, connection->opener.comm, sizeof(key.comm));
	}
	known = bpf_map_lookup_elem(&holder_places, &key);
	if (known)
		return known->number;
	if (bpf_map_pop_elem(&free_holders, &index))
		goto full;
	holder = bpf_map_lookup_elem(&holders, &index);
	if (!holder)
		goto full;
	if (connection)
		owner = connection->opener;
	holder->owner = owner;
	holder->wanted = filter_owner(&owner);
	holder->pool = pool;
	place.number = index + 1;
	if (!bpf_map_update_elem(&holder_places, &key, &place, BPF_NOEXIST))
		return place.number;
	holder->pool = 0;
	bpf_map_push_elem(&free_holders, &index, 0);
	known = bpf_map_lookup_elem(&holder_places, &key);
	if (known)
		return known->number;
full:
	NO_ROOM();
	return 0;
}

static __always_inline struct pool_span *span_of(struct pool *pool)
{
	return &pool->spans[epoch & 1];
}

/* The verifier loses the limit of a number that the compiler narrows again. */
static __always_inline __u32 state_index(__u32 state)
{
	asm volatile("%0 &= %1" : "+r"(state) : "i"(STATES - 1));
	return state;
}

/* One socket more (1) or less (-1) in a state. */
static __always_inline void pool_count(__u32 pool_at, __u32 holder_at, __u8 state, __s32 change)
{
	struct pool_holder *holder = holder_find(holder_at);
	struct pool *pool = pool_find(pool_at);

	if (pool)
		__sync_fetch_and_add(&pool->sockets[state_index(state)], change);
	if (holder)
		__sync_fetch_and_add(&holder->ports, change);
}

#endif
