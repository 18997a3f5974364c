/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* Of the packets that netfilter discards: the chain of nf_tables that does it. Its programs are in trace_functions.bpf.h. */
#ifndef TCPSCOPE_TRACE_NETFILTER_BPF_H
#define TCPSCOPE_TRACE_NETFILTER_BPF_H

#include "compat.bpf.h"

#define NAME_BYTES 24        /* of a table's name, and of a chain's: a longer one is cut */
#define CHAIN_BYTES 56       /* the longest family, and both */
#define NF_VERDICT_MASK 0xff /* include/uapi/linux/netfilter.h */
#define NF_VERDICT_FLAG_QUEUE_BYPASS 0x8000
#define NF_ACCEPT 1
#define NF_QUEUE 3

enum { NFPROTO_INET = 1, NFPROTO_IPV4 = 2, NFPROTO_NETDEV = 5, NFPROTO_BRIDGE = 7, NFPROTO_IPV6 = 10 };

/* include/net/netfilter/nf_tables.h. Where nf_tables is a module, only programs that hook its functions find these types. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct nft_pktinfo {
	struct sk_buff *skb;
};

struct nft_table {
	__u8 family; /* some bits */
	char *name;
};

struct nft_chain {
	struct nft_table *table;
	char *name;
};
#pragma clang attribute pop

/* A base chain, while a packet is in it, and when it has not accepted the packet. */
struct chain {
	__u64 table, name; /* where their names are; 0: there is no such chain */
	__u8 family;       /* of the table */
	__u8 padding[7];
};

static __always_inline void chain_read(const struct nft_chain *chain, struct chain *known)
{
	const struct nft_table *table = BPF_CORE_READ(chain, table);

	known->table = (__u64)BPF_CORE_READ(table, name);
	known->family = READ_ANY_WIDTH(table, family);
	known->name = (__u64)BPF_CORE_READ(chain, name);
}

/* As `nft list chain` has them, but with colons: `inet:filter:input`. The packet is still in the hook, so the names are there. */
static __noinline int chain_write(const struct chain *known, char *to)
{
	struct chain chain = {};
	__u64 at = 0;
	long length;

	bpf_probe_read_kernel(&chain, sizeof(chain), known);
	if (!chain.name)
		return 0;
	switch (chain.family) {
	case NFPROTO_INET:
		__builtin_memcpy(to, "inet:", at = 5);
		break;
	case NFPROTO_IPV4:
		__builtin_memcpy(to, "ip:", at = 3);
		break;
	case NFPROTO_IPV6:
		__builtin_memcpy(to, "ip6:", at = 4);
		break;
	case NFPROTO_NETDEV:
		__builtin_memcpy(to, "netdev:", at = 7);
		break;
	case NFPROTO_BRIDGE:
		__builtin_memcpy(to, "bridge:", at = 7);
		break;
	default:
		return 0;
	}
	length = bpf_probe_read_kernel_str(to + at, NAME_BYTES, (void *)chain.table);
	if (length < 1) {
		to[0] = 0;
		return 0;
	}
	barrier_var(length); /* the compiler would join both comparisons, and the verifier forget the bounds */
	if (length > NAME_BYTES)
		return 0;
	at += length;
	to[at - 1] = ':';
	bpf_probe_read_kernel_str(to + at, NAME_BYTES, (void *)chain.name);
	return 0;
}

#endif
