/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The filters of all tools, as the kernel decides them.
 *
 * User space fills `filter`, and libbpf freezes it before it loads the programs. So the verifier removes every test that was not
 * asked for. filters.py has the same rules in Python; tests compare the two.
 */
#ifndef TCPSCOPE_FILTER_BPF_H
#define TCPSCOPE_FILTER_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"
#include "identity.bpf.h"

#define PORT_WORDS (65536 / 64)

/* How many values an option has. One is in `struct filter`, several are in filter_lists. */
enum filter_count { ANY_VALUE, ONE_VALUE, SEVERAL_VALUES };

struct network {
	__u64 address[2];
	__u64 mask[2];
	__u64 family; /* ::/0 has no IPv4 address, although it contains the v4-mapped ones */
};

struct filter {
	__u32 pid;
	__u32 uid;
	__u32 netns;
	__u32 pid_namespace; /* of `pid`, as inode number; 0: the first one */
	__u8 family;
	bool has_lport, has_rport, has_port;
	__u8 pid_count, uid_count, comm_count, cgroup_count, netns_count, laddr_count,
		raddr_count; /* enum filter_count */
	__u8 padding[5];
	__u64 cgroup;
	char comm[16];
	struct network laddr;
	struct network raddr;
};

enum filter_option { FILTER_PID, FILTER_UID, FILTER_COMM, FILTER_CGROUP, FILTER_NETNS, FILTER_LADDR, FILTER_RADDR };

struct filter_key {
	__u32 bits; /* that count, of all that follows */
	__u16 option;
	__u16 family;
	__u64 value[2];
};

#define FILTER_KEY_BITS (8 * (sizeof(struct filter_key) - sizeof(__u32)))

/* The values of options that have several. User space fills it before it attaches a program; programs only look up. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct filter_key);
	__type(value, __u8);
} filter_lists SEC(".maps");

const volatile struct filter filter;
const volatile bool both_families; /* sockets of both families have an entry, whatever `family` is */
/* Read only if filter.has_... says so. Not constant: zeros of .bss take no room in the object, and no value of them is known here. */
volatile __u64 filter_lport[PORT_WORDS], filter_rport[PORT_WORDS], filter_port[PORT_WORDS];

#define PORT_IN(set, port) ((set)[(__u16)(port) >> 6] >> ((port) & 63) & 1)

static __noinline __attribute__((unused)) bool in_list(__u16 option, __u16 family, __u64 first, __u64 second)
{
	struct filter_key key = {
		.bits = FILTER_KEY_BITS,
		.option = option,
		.family = family,
		.value = {first, second},
	};

	return bpf_map_lookup_elem(&filter_lists, &key);
}

static __always_inline bool wanted_number(__u8 count, __u64 only, __u16 option, __u64 value)
{
	return count == SEVERAL_VALUES ? in_list(option, 0, value, 0) : count == ANY_VALUE || value == only;
}

static __always_inline bool wanted_address(__u8 count, const volatile struct network *only, __u16 option, __u8 family,
					   const __u8 *address)
{
	const __u64 *words = (const __u64 *)address;

	if (count == SEVERAL_VALUES)
		return in_list(option, family, words[0], words[1]);
	return count == ANY_VALUE || (family == only->family && (words[0] & only->mask[0]) == only->address[0] &&
				      (words[1] & only->mask[1]) == only->address[1]);
}

static __always_inline bool wanted_netns(__u32 netns)
{
	return wanted_number(filter.netns_count, filter.netns, FILTER_NETNS, netns);
}

static __always_inline bool wanted_cgroup(__u64 cgroup)
{
	return wanted_number(filter.cgroup_count, filter.cgroup, FILTER_CGROUP, cgroup);
}

static __always_inline bool wanted_comm(const char *comm)
{
	const __u64 *a = (const __u64 *)comm;
	const volatile __u64 *b = (const volatile __u64 *)filter.comm;

	if (filter.comm_count == SEVERAL_VALUES)
		return in_list(FILTER_COMM, 0, a[0], a[1]);
	return filter.comm_count == ANY_VALUE || (a[0] == b[0] && a[1] == b[1]);
}

/*
 * Can this socket ever pass the filter? Its namespace and its address family never change, but an IPv6 socket may come to
 * talk IPv4. A socket that can never pass has no entry in a table.
 */
static __always_inline bool filter_may_want(struct sock *sk)
{
	if (filter.netns_count != ANY_VALUE && !wanted_netns(BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum)))
		return false;
	return filter.family != 6 || both_families || BPF_CORE_READ(sk, __sk_common.skc_family) != AF_INET;
}

static __always_inline bool filter_wants_owner(void)
{
	return filter.pid_count || filter.uid_count || filter.comm_count || filter.cgroup_count;
}

static __always_inline bool wanted_pid(__u32 pid)
{
	return wanted_number(filter.pid_count, filter.pid, FILTER_PID, pid);
}

static __always_inline bool filter_pid(const struct owner *owner)
{
	return filter.pid_namespace ? owner->has_filter_pid : wanted_pid(owner->pid);
}

/* What is not known does not match: without an owner (NULL, or pid 0) it passes only if no filter asks for the owner. */
static __always_inline bool filter_owner(const struct owner *owner)
{
	if (!filter_wants_owner())
		return true;
	if (!owner || !owner->pid)
		return false;
	if (!filter_pid(owner))
		return false;
	if (!wanted_number(filter.uid_count, filter.uid, FILTER_UID, owner->uid))
		return false;
	if (filter.cgroup_count && !owner->in_cgroup)
		return false;
	return wanted_comm(owner->comm);
}

static __always_inline bool filter_identity(const struct identity *id)
{
	if (!wanted_netns(id->netns))
		return false;
	if (filter.family && id->family != filter.family)
		return false;
	if (filter.has_lport && !PORT_IN(filter_lport, id->lport))
		return false;
	if (filter.has_rport && !PORT_IN(filter_rport, id->rport))
		return false;
	if (filter.has_port && !PORT_IN(filter_port, id->lport) && !PORT_IN(filter_port, id->rport))
		return false;
	if (!wanted_address(filter.laddr_count, &filter.laddr, FILTER_LADDR, id->family, id->laddr))
		return false;
	return !filter.raddr_count ||
	       (id->rport && wanted_address(filter.raddr_count, &filter.raddr, FILTER_RADDR, id->family, id->raddr));
}

static __always_inline bool filter_pass(const struct identity *id, const struct owner *owner)
{
	return filter_identity(id) && filter_owner(owner);
}

#endif
