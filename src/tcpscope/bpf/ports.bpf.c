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
 *
 * A timewait socket keeps the port. It is found in the kernel's table of connections at the transition to CLOSE, where it has
 * taken the socket's place. It ends with its timer, in whichever way the kernel ends it (inet_twsk_kill()): the timer runs out,
 * or inet_twsk_deschedule_put() stops it.
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

#define POOLS 8192
#define HOLDERS 8192
#define STATES 16 /* a power of two */
#define SECOND 1000000000ULL
#define RANGE_NS 10000000ULL /* connections to one destination look at the sysctls of their namespace so seldom */

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

/* A timewait socket that counts in a pool. Inserted at the transition to CLOSE, deleted with its timer. */
struct timewait {
	__u32 pool;
	__u32 holder;
	__u16 port; /* taken by bind(); 0: not */
	__be16 rport;
	__be32 raddr;
	__u64 cookie;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PER_SOCKET);
	__type(key, __u64); /* address of the struct inet_timewait_sock */
	__type(value, struct timewait);
} timewaits SEC(".maps");

/* tw_timer_handler(), which the timers of all timewait sockets have: read from the first of them. 0: there was none yet. */
volatile __u64 timewait_function;

/* On this CPU, the timewait socket whose timer was taken away last. It may be set again at once: inet_twsk_reschedule(). */
struct rearmed {
	__u64 socket;
	struct timewait timewait;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rearmed);
} rearmed SEC(".maps");

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

/*
 * The reserved ports of a namespace (ip_local_reserved_ports), by the place of its pool. User space counts those of a range: to do
 * it here takes the verifier a fifth of a second.
 */
struct ports {
	__u64 bits[65536 / 64];
};
static const struct ports no_ports;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, struct ports);
} reserved SEC(".maps");

/* Notes the range of the namespace; its reserved ports at most once a second. */
static __noinline int range_note(struct net *net, __u32 place)
{
	__u64 now_ns = bpf_ktime_get_ns();
	struct pool *pool = pool_find(place);
	unsigned long *bits;
	struct ports *ports;

	if (!pool)
		return 0;
	pool->range = local_ports_of(net);
	pool->step_width = port_step_of(net);
	pool->tw_reuse = READ_ANY_WIDTH(net, ipv4.sysctl_tcp_tw_reuse);
	if (now_ns - pool->checked_ns < SECOND)
		return 0;
	bits = BPF_CORE_READ(net, ipv4.sysctl_local_reserved_ports);
	ports = aggregate_find_or_add(&reserved, &place, &no_ports);
	if (ports)
		bpf_probe_read_kernel(ports, sizeof(*ports), bits);
	else
		NO_ROOM();
	pool->checked_ns = now_ns; /* user space reads the ports again when this has changed */
	return 0;
}

/* Notes IP_LOCAL_PORT_RANGE of a socket of a pool. A timewait socket does not keep it. `port`: by bind(); 0: none. */
static __always_inline void own_range_note(struct sock *sk, __u32 place, __u16 port)
{
	bool waits = BPF_CORE_READ(sk, __sk_common.skc_state) == STATE_TIME_WAIT;
	__u32 own = waits ? 0 : own_ports_of(sk);
	struct pool *pool = pool_find(place);

	if (!pool)
		return;
	if (!own) {
		pool->whole = true;
		return;
	}
	if ((pool->own && pool->own != own) || (port && (port < (own & 0xffff) || (own >> 16 && port > own >> 16))))
		pool->mixed = true;
	pool->own = own;
}

/* Is it one of the ports that connect() may choose in the namespace? */
static __always_inline bool is_local_port(struct sock *sk, __u32 range, __u16 port)
{
	unsigned long *bits = BPF_CORE_READ(sk, __sk_common.skc_net.net, ipv4.sysctl_local_reserved_ports);
	__u64 word = 0;

	if (port < (range & 0xffff) || port > range >> 16)
		return false;
	bpf_probe_read_kernel(&word, sizeof(word), bits + port / 64);
	return !(word >> port % 64 & 1);
}

/* The pool of the namespace, up to date. */
static __noinline int namespace_place(__u64 socket)
{
	struct net *net = BPF_CORE_READ((struct sock *)socket, __sk_common.skc_net.net);
	struct pool_key key = {.kind = POOL_NAMESPACE};
	__u32 place;

	key.netns = BPF_CORE_READ(net, ns.inum);
	place = pool_place(&key);
	range_note(net, place);
	return place;
}

/* The pool of connections like this one, whose local address, remote address and remote port are set. */
static __noinline int connect_place(__u64 socket)
{
	struct sock *sk = (struct sock *)socket;
	struct pool_key key = {.kind = POOL_CONNECT};
	__u64 now_ns = bpf_ktime_get_ns();
	struct identity id = {};
	struct pool *pool;
	__u32 place;

	identity_read(sk, &id);
	id.lport = 0;
	if (!filter_identity(&id))
		return 0;
	key.netns = id.netns;
	key.rport = id.rport;
	key.family = id.family;
	__builtin_memcpy(key.laddr, id.laddr, sizeof(key.laddr));
	__builtin_memcpy(key.raddr, id.raddr, sizeof(key.raddr));
	place = pool_place(&key);
	own_range_note(sk, place, 0);
	pool = pool_find(place);
	if (!pool || now_ns - pool->checked_ns >= RANGE_NS) {
		if (pool)
			pool->checked_ns = now_ns;
		namespace_place(socket);
	}
	return place;
}

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

#define CHAIN 64 /* most sockets of one chain that are looked at */

/*
 * The timewait socket that has taken the place of a socket in the kernel's table of connections (inet_twsk_hashdance()). 0: there
 * is none. A socket that is closed has no skc_num any more.
 */
static __noinline __u64 timewait_of(__u64 socket)
{
	struct sock *sk = (struct sock *)socket;
	__u16 port = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	__u64 mine[COMMON_BYTES / 8] = {}, other[COMMON_BYTES / 8] = {};
	const struct sock_common *own = (const struct sock_common *)mine;
	const struct sock_common *common = (const struct sock_common *)other;
	struct hlist_nulls_node *node;
	struct inet_hashinfo *table;
	struct inet_ehash_bucket *chain;

	bpf_probe_read_kernel(mine, sizeof(mine), sk);
	table = BPF_CORE_READ(own->skc_net.net, ipv4.tcp_death_row.hashinfo);
	chain = BPF_CORE_READ(table, ehash);
	chain = (void *)chain +
		(own->skc_hash & BPF_CORE_READ(table, ehash_mask)) * bpf_core_type_size(struct inet_ehash_bucket);
	node = BPF_CORE_READ(chain, chain.first);
	for (int i = 0; i < CHAIN && !((__u64)node & 1); i++) {
		__u64 found = (__u64)node - bpf_core_field_offset(struct sock_common, skc_nulls_node);

		if (bpf_probe_read_kernel(other, sizeof(other), (void *)found))
			break;
		if (common->skc_state == STATE_TIME_WAIT && common->skc_dport == own->skc_dport &&
		    common->skc_daddr == own->skc_daddr && common->skc_num == port &&
		    common->skc_family == own->skc_family && common->skc_net.net == own->skc_net.net &&
		    common->skc_rcv_saddr == own->skc_rcv_saddr &&
		    cookie_if_any((struct sock *)found) == cookie_if_any(sk))
			return found;
		node = BPF_CORE_READ(node, next);
	}
	if (!((__u64)node & 1))
		COUNT(missed); /* it may be in the rest of the chain */
	return 0;
}

/* A timewait socket or a full one takes or gives back a port that bind() has taken, for its pool and for the namespace. */
static __always_inline void ports_count(__u32 place, __u16 port, bool takes)
{
	struct pool_key key = {.kind = POOL_NAMESPACE};
	struct pool *pool = pool_find(place);

	if (!pool || !port)
		return;
	key.netns = pool->key.netns;
	port_count(place, port, false, takes);
	port_count(pool_place(&key), port, false, takes);
}

/* A timewait socket counts in a pool from now on. */
static __noinline int timewait_begin(__u64 address, __u32 pool, __u32 holder, __u32 port)
{
	struct inet_timewait_sock *tw = (struct inet_timewait_sock *)address;
	struct timewait mine = {.pool = pool, .holder = holder, .port = port};

	if (!pool)
		return 0;
	if (!timewait_function)
		timewait_function = (__u64)BPF_CORE_READ(tw, tw_timer.function);
	mine.cookie = cookie_if_any((struct sock *)tw);
	mine.rport = BPF_CORE_READ(tw, __tw_common.skc_dport);
	mine.raddr = BPF_CORE_READ(tw, __tw_common.skc_daddr);
	if (table_put(&timewaits, &address, &mine, BPF_NOEXIST)) {
		if (!bpf_map_lookup_elem(&timewaits, &address))
			NO_ROOM();
		return 0;
	}
	ports_count(pool, port, true);
	pool_count(pool, holder, STATE_TIME_WAIT, 1);
	return 1;
}

/* Its timer is taken away. */
static __noinline int timewait_end(__u64 address)
{
	struct timewait *entry = bpf_map_lookup_elem(&timewaits, &address), mine;
	struct rearmed *last;
	__u32 zero = 0;

	if (!entry)
		return 0;
	mine = *entry;
	if (bpf_map_delete_elem(&timewaits, &address)) {
		if (bpf_map_lookup_elem(&timewaits, &address))
			COUNT(missed);
		return 0;
	}
	ports_count(mine.pool, mine.port, false);
	pool_count(mine.pool, mine.holder, STATE_TIME_WAIT, -1);
	last = bpf_map_lookup_elem(&rearmed, &zero);
	if (last) {
		last->socket = address;
		last->timewait = mine;
	}
	return 0;
}

/* Its timer is set again, if it was taken away just before, on this CPU. */
static __noinline int timewait_again(__u64 address)
{
	struct inet_timewait_sock *tw = (struct inet_timewait_sock *)address;
	struct rearmed *last;
	__u32 zero = 0;

	last = bpf_map_lookup_elem(&rearmed, &zero);
	if (!last)
		return 0;
	if (last->socket == address && last->timewait.cookie == cookie_if_any((struct sock *)tw) &&
	    last->timewait.rport == BPF_CORE_READ(tw, __tw_common.skc_dport) &&
	    last->timewait.raddr == BPF_CORE_READ(tw, __tw_common.skc_daddr))
		timewait_begin(address, last->timewait.pool, last->timewait.holder, last->timewait.port);
	last->socket = 0;
	return 0;
}

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
