/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What stands behind the extension headers of an IPv6 packet. */
#ifndef TCPSCOPE_EXTENSION_BPF_H
#define TCPSCOPE_EXTENSION_BPF_H

#include "kernel.bpf.h"

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

static __always_inline bool is_extension(__u8 type)
{
	return type == NEXTHDR_HOP || type == NEXTHDR_ROUTING || type == NEXTHDR_FRAGMENT || type == NEXTHDR_AUTH ||
	       type == NEXTHDR_DEST || type == NEXTHDR_MOBILITY || type == NEXTHDR_HIP || type == NEXTHDR_SHIM6;
}

/*
 * Walks from the first header behind the IPv6 header to the first one that is no extension header. `length` bytes are in the linear
 * part of the packet from its IPv6 header on. False if there are too many, or one is not there as a whole.
 */
static __noinline bool extensions_walk(const unsigned char *ip, __u32 length, struct header *header)
{
	__u8 begin[4] = {};

	for (int i = 0; i < EXTENSION_HEADERS && is_extension(header->type); i++) {
		if (header->later || header->at + 8 > length)
			return false;
		bpf_probe_read_kernel(begin, sizeof(begin), ip + header->at);
		if (header->type == NEXTHDR_FRAGMENT) {
			header->later = begin[2] || begin[3] >> 3;
			header->at += 8;
		} else {
			header->at += header->type == NEXTHDR_AUTH ? (begin[1] + 2) * 4 : (begin[1] + 1) * 8;
		}
		header->type = begin[0];
	}
	return !is_extension(header->type);
}

#endif
