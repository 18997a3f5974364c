/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Who an event is about: both ends of the connection, and the process that owns it. */
#ifndef TCPSCOPE_IDENTITY_BPF_H
#define TCPSCOPE_IDENTITY_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"

/* Both ends, as every event shows them. Addresses are 16 bytes: IPv4 has its v4-mapped form. */
struct identity {
	__u64 cookie WIDTH(8) DOC("socket cookie, what ss -e prints as sk:") UNKNOWN_IS("zero");
	__u32 netns WIDTH(10) DOC("network namespace, as inode number");
	__u16 lport DOC("local port") UNKNOWN_IS("zero");
	__u16 rport DOC("remote port") UNKNOWN_IS("zero");
	__u8 laddr[16] KIND("address") DOC("local address");
	__u8 raddr[16] KIND("address") DOC("remote address") UNKNOWN_IS("zero");
	__u8 family TITLE("IP") DOC("IP version of the packets: a v4-mapped socket talks IPv4");
	__u8 padding[7];
};

/* The process that called connect(), listen() or accept(), not the one on the CPU. An object with another one says so before. */
#ifndef OWNER_IS
#define OWNER_IS "process that called connect(), listen() or accept()"
#endif

struct owner {
	__u32 pid WIDTH(7) DOC(OWNER_IS) UNKNOWN_IS("zero");
	__u32 uid WIDTH(5) DOC("user of that process") UNKNOWN_IS("max");
	char comm[16] KIND("comm") DOC("name of that process") UNKNOWN_IS("zero");
	__u64 cgroup DOC("cgroup v2 id of that process") UNKNOWN_IS("zero");
	__u8 in_cgroup;      /* in a cgroup of the filter or below it */
	__u8 has_filter_pid; /* if the filter's PIDs are meant in another PID namespace than the first */
	__u8 padding[6];
};

static __always_inline void map_v4(__u8 *mapped, __be32 v4)
{
	__builtin_memset(mapped, 0, 10);
	mapped[10] = mapped[11] = 0xff;
	__builtin_memcpy(mapped + 12, &v4, 4);
}

static __always_inline bool is_v4_mapped(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

/* The part of struct sock_common that has both ends. tests/kernel/test_types.py checks it on all kernels. */
#define COMMON_BYTES 96

/*
 * Reads both ends of a socket. It reads by address, so every program type can call it. One read copies all: a read is a
 * call, which costs more than the copy.
 * The kernel clears skc_num when it unhashes the socket, just before the last transition; inet_sport stays.
 * When a child enters SYN_RECV, its remote end is not set yet. When connect() enters SYN_SENT, the local port is not.
 */
static __noinline int identity_read(struct sock *sk, struct identity *id)
{
	__u64 copy[COMMON_BYTES / 8] = {};
	const struct sock_common *common = (const struct sock_common *)copy;
	__u16 family;

	bpf_probe_read_kernel(copy, sizeof(copy), sk);
	family = common->skc_family;
	id->netns = BPF_CORE_READ(common->skc_net.net, ns.inum);
	id->lport = common->skc_num;
	if (!id->lport)
		id->lport = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	id->rport = bpf_ntohs(common->skc_dport);
	if (family == AF_INET6) {
		__builtin_memcpy(id->raddr, &common->skc_v6_daddr, 16);
		__builtin_memcpy(id->laddr, &common->skc_v6_rcv_saddr, 16);
	}
	if (family == AF_INET || is_v4_mapped(id->raddr)) {
		map_v4(id->raddr, common->skc_daddr);
		map_v4(id->laddr, common->skc_rcv_saddr);
		family = AF_INET;
	} else if (is_v4_mapped(id->laddr)) {
		family = AF_INET;
	}
	id->family = family == AF_INET ? 4 : 6;
	if (!id->rport)
		__builtin_memset(id->raddr, 0, 16);
	return 0;
}

#endif
