/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What stands behind the extension headers of an IPv6 packet. */
#ifndef TCPSCOPE_EXTENSION_BPF_H
#define TCPSCOPE_EXTENSION_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"

#define IPV6_BYTES 40
#define EXTENSION_HEADERS 8 /* most that are walked */

/* include/uapi/linux/in6.h, include/net/ipv6.h */
enum {
	NEXTHDR_HOP = 0,
	NEXTHDR_ROUTING = 43,
	NEXTHDR_FRAGMENT = 44,
	NEXTHDR_AUTH = 51,
	NEXTHDR_DEST = 60,
	NEXTHDR_MOBILITY = 135,
	NEXTHDR_HIP = 139,
	NEXTHDR_SHIM6 = 140,
};

/* A header of an IPv6 packet. */
struct header {
	__u32 at;   /* from the IPv6 header */
	__u8 type;  /* which one, or what follows */
	bool later; /* of a later fragment: nothing of it is there */
};

/* By shifts: of each comparison the verifier would follow both outcomes. */
static __always_inline bool is_extension(__u8 type)
{
	const __u64 below_64 = 1ULL << NEXTHDR_HOP | 1ULL << NEXTHDR_ROUTING | 1ULL << NEXTHDR_FRAGMENT |
			       1ULL << NEXTHDR_AUTH | 1ULL << NEXTHDR_DEST;
	const __u64 from_128 =
		1ULL << (NEXTHDR_MOBILITY - 128) | 1ULL << (NEXTHDR_HIP - 128) | 1ULL << (NEXTHDR_SHIM6 - 128);
	__u64 types = type < 64 ? below_64 : type >= 128 && type < 192 ? from_128 : 0;

	return types >> (type & 63) & 1;
}

/*
 * Walks from the header of this type behind the IPv6 header to the first one that is no extension header. `length` bytes are in the
 * linear part of the packet from its IPv6 header on. Returns `at`, `type` and `later` of what was found; 0 if there are too many, or one
 * is not there as a whole.
 *
 * A global function: the verifier looks at it once, not once for each way that leads here. Before 5.12 such a function takes numbers
 * only.
 */
__noinline __u64 extensions_walk(__u64 ip, __u32 length, __u32 type)
{
	struct header header = {.at = IPV6_BYTES, .type = type};
	__u8 begin[4] = {};

	for (int i = 0; i < EXTENSION_HEADERS && is_extension(header.type); i++) {
		if (header.later || header.at + 8 > length)
			return 0;
		bpf_probe_read_kernel(begin, sizeof(begin), (const void *)(ip + header.at));
		if (header.type == NEXTHDR_FRAGMENT) {
			header.later = begin[2] || begin[3] >> 3;
			header.at += 8;
		} else {
			header.at += header.type == NEXTHDR_AUTH ? (begin[1] + 2) * 4 : (begin[1] + 1) * 8;
		}
		header.type = begin[0];
	}
	if (is_extension(header.type))
		return 0;
	return header.at | (__u64)header.type << 32 | (__u64)header.later << 40;
}

/* The header behind all extension headers, the first of which has this type. Its `at` is 0 if that is not known. */
static __always_inline struct header header_find(__u64 ip, __u32 length, __u8 type, union unknown *room)
{
	__u64 found = forgotten_in(room, extensions_walk(ip, length, type));

	return (struct header){.at = found, .type = found >> 32, .later = found >> 40 & 1};
}

#endif
