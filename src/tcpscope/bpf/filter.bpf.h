/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The filters of all tools, as the kernel decides them.
 *
 * User space fills `filter` and the port sets, and libbpf freezes them before it loads the programs. So the verifier removes
 * every test that was not asked for. filters.py has the same rules in Python; tests compare the two.
 */
#ifndef TCPSCOPE_FILTER_BPF_H
#define TCPSCOPE_FILTER_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"
#include "identity.bpf.h"

#define FILTER_NETWORKS 8 /* per option; user space decides about more of them */
#define PORT_WORDS (65536 / 64)

struct network {
	__u64 address[2];
	__u64 mask[2];
	__u64 family; /* ::/0 has no IPv4 address, although it contains the v4-mapped ones */
};

struct filter {
	__u32 pid;
	__u32 uid;
	__u32 netns;
	__u8 family;
	bool has_pid, has_uid, has_comm, has_lport, has_rport, has_port;
	__u8 laddr_count, raddr_count;
	__u64 cgroup;
	char comm[16];
	struct network laddr[FILTER_NETWORKS];
	struct network raddr[FILTER_NETWORKS];
};

const volatile struct filter filter;
const volatile bool both_families; /* sockets of both families have an entry, whatever `family` is */
const volatile __u64 filter_lport[PORT_WORDS];
const volatile __u64 filter_rport[PORT_WORDS];
const volatile __u64 filter_port[PORT_WORDS];

#define PORT_IN(set, port) ((set)[(__u16)(port) >> 6] >> ((port) & 63) & 1)

static __always_inline bool in_networks(const volatile struct network *networks, __u8 count, __u8 family,
					const __u8 *address)
{
	const __u64 *words = (const __u64 *)address;

#pragma unroll
	for (int i = 0; i < FILTER_NETWORKS; i++)
		if (i < count && family == networks[i].family &&
		    (words[0] & networks[i].mask[0]) == networks[i].address[0] &&
		    (words[1] & networks[i].mask[1]) == networks[i].address[1])
			return true;
	return false;
}

/*
 * Can this socket ever pass the filter? Its namespace and its address family never change, but an IPv6 socket may come to
 * talk IPv4. A socket that can never pass has no entry in a table.
 */
static __always_inline bool filter_may_want(struct sock *sk)
{
	if (filter.netns && BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum) != filter.netns)
		return false;
	return filter.family != 6 || both_families || BPF_CORE_READ(sk, __sk_common.skc_family) != AF_INET;
}

static __always_inline bool filter_wants_owner(void)
{
	return filter.has_pid || filter.has_uid || filter.has_comm || filter.cgroup;
}

static __always_inline bool same_comm(const char *comm)
{
	const __u64 *a = (const __u64 *)comm;
	const volatile __u64 *b = (const volatile __u64 *)filter.comm;

	return a[0] == b[0] && a[1] == b[1];
}

/* What is not known does not match: without an owner (NULL, or pid 0) it passes only if no filter asks for the owner. */
static __always_inline bool filter_owner(const struct owner *owner)
{
	if (!filter_wants_owner())
		return true;
	if (!owner || !owner->pid)
		return false;
	if (filter.has_pid && owner->pid != filter.pid)
		return false;
	if (filter.has_uid && owner->uid != filter.uid)
		return false;
	if (filter.cgroup && !owner->in_cgroup)
		return false;
	return !filter.has_comm || same_comm(owner->comm);
}

static __always_inline bool filter_identity(const struct identity *id)
{
	if (filter.netns && id->netns != filter.netns)
		return false;
	if (filter.family && id->family != filter.family)
		return false;
	if (filter.has_lport && !PORT_IN(filter_lport, id->lport))
		return false;
	if (filter.has_rport && !PORT_IN(filter_rport, id->rport))
		return false;
	if (filter.has_port && !PORT_IN(filter_port, id->lport) && !PORT_IN(filter_port, id->rport))
		return false;
	if (filter.laddr_count && !in_networks(filter.laddr, filter.laddr_count, id->family, id->laddr))
		return false;
	return !filter.raddr_count ||
	       (id->rport && in_networks(filter.raddr, filter.raddr_count, id->family, id->raddr));
}

static __always_inline bool filter_pass(const struct identity *id, const struct owner *owner)
{
	return filter_identity(id) && filter_owner(owner);
}

#endif
