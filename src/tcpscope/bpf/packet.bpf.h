/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What the headers of a TCP packet say. */
#ifndef TCPSCOPE_PACKET_BPF_H
#define TCPSCOPE_PACKET_BPF_H

#include "kernel.bpf.h"
#include "identity.bpf.h"

#define IPV4_BYTES 20
#define IPV6_BYTES 40
#define TCP_BYTES 14 /* up to the flags */
#define NO_FLAGS 0xffff

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };

struct packet {
	__u8 saddr[16], daddr[16];
	__u16 sport, dport; /* 0: not known */
	__u32 seq;
	__u32 bytes; /* from the IP header on; 0: not known */
	__u16 flags; /* NO_FLAGS: not known */
	__u8 family; /* 4, 6; 0: no IP header */
	bool data;   /* something follows the TCP header */
};

/*
 * The part of the TCP header that is needed, at this offset from skb->head. A later fragment has none, and it may lie
 * outside of the linear part of the packet.
 */
static __always_inline void tcp_header_read(struct sk_buff *skb, __u32 at, __u32 before, struct packet *packet)
{
	__u8 header[16] = {};

	if (at + TCP_BYTES > skb->tail)
		return;
	bpf_probe_read_kernel(header, TCP_BYTES, skb->head + at);
	packet->sport = header[0] << 8 | header[1];
	packet->dport = header[2] << 8 | header[3];
	packet->seq = bpf_ntohl(*(__u32 *)&header[4]);
	packet->flags = header[13];
	packet->data = packet->bytes > before + (header[12] >> 4) * 4;
}

/*
 * Reads the headers of a packet. False if it is none of TCP. The kernel sets skb->protocol when it receives a packet, and
 * when it has added the IP header to one that it sends. The headers stay at skb->head when it removes them.
 */
static __noinline bool packet_read(struct sk_buff *skb, struct packet *packet)
{
	__u8 header[IPV6_BYTES] = {};
	__u32 at = skb->network_header;
	__u32 length, before;
	bool later = false;
	__u8 protocol;

	packet->flags = NO_FLAGS;
	if (at + IPV4_BYTES > skb->tail)
		return false;
	bpf_probe_read_kernel(header, sizeof(header), skb->head + at);
	length = header[2] << 8 | header[3];
	if (skb->protocol == bpf_htons(ETH_P_IP) && header[0] >> 4 == 4) {
		protocol = header[9];
		before = (header[0] & 15) * 4;
		later = (header[6] & 31) || header[7];
		packet->family = 4;
		packet->bytes = length;
		map_v4(packet->saddr, *(__be32 *)&header[12]);
		map_v4(packet->daddr, *(__be32 *)&header[16]);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6) && header[0] >> 4 == 6 && at + IPV6_BYTES <= skb->tail) {
		length = header[4] << 8 | header[5];
		protocol = header[6];
		before = IPV6_BYTES;
		packet->family = 6;
		packet->bytes = length ? length + IPV6_BYTES : 0;
		__builtin_memcpy(packet->saddr, header + 8, 16);
		__builtin_memcpy(packet->daddr, header + 24, 16);
	} else {
		return false;
	}
	if (protocol != IPPROTO_TCP)
		return false;
	if (!later)
		tcp_header_read(skb, at + before, before, packet);
	return true;
}

#endif
