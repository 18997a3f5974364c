/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The address that a process gives to connect() or bind(). */
#ifndef TCPSCOPE_SOCKADDR_BPF_H
#define TCPSCOPE_SOCKADDR_BPF_H

#include "kernel.bpf.h"

#define SOCKADDR_IN_SIZE 16 /* sizeof(struct sockaddr_in) */

/* struct sockaddr_in, and sockaddr_in6 without its scope */
struct socket_address {
	__u16 family;
	__be16 port;
	__be32 v4; /* flow label of IPv6 */
	__u8 v6[16];
};

/* The kernel refuses a shorter address, and the bytes after it are no address. */
static __always_inline bool socket_address_fits(const struct socket_address *to, int size)
{
	if (to->family == AF_INET)
		return size >= SOCKADDR_IN_SIZE;
	return to->family == AF_INET6 && size >= (int)sizeof(*to);
}

/* Reads no more than `size` bytes: the memory may end there. `read` is bpf_probe_read_kernel or bpf_probe_read_user. */
#define SOCKET_ADDRESS_READ(read, to, address, size)                                            \
	({                                                                                      \
		read(to, SOCKADDR_IN_SIZE, (void *)(address));                                  \
		if ((int)(size) >= (int)sizeof(*(to)))                                          \
			read((void *)(to) + SOCKADDR_IN_SIZE, sizeof(*(to)) - SOCKADDR_IN_SIZE, \
			     (void *)(address) + SOCKADDR_IN_SIZE);                             \
	})

#endif
