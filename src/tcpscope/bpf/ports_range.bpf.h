/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Which local ports a namespace and a socket may choose from, and the pool that a socket belongs to. */
#ifndef TCPSCOPE_PORTS_RANGE_BPF_H
#define TCPSCOPE_PORTS_RANGE_BPF_H

#define SECOND 1000000000ULL
#define RANGE_NS 10000000ULL /* connections to one destination look at the sysctls of their namespace so seldom */

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

#endif
