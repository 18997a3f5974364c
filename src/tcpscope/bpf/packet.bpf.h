/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* What the headers of a TCP packet say. */
#ifndef TCPSCOPE_PACKET_BPF_H
#define TCPSCOPE_PACKET_BPF_H

#include "kernel.bpf.h"
#include "extension.bpf.h"
#include "identity.bpf.h"

#define IPV4_BYTES 20
#define TCP_BYTES 14 /* up to the flags */
#define HEADERS_BYTES (IPV6_BYTES + TCP_BYTES)
#define NO_FLAGS 0xffff

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_ACK = 16 };

struct packet {
	__u8 saddr[16], daddr[16];
	__u16 sport, dport; /* 0: not known */
	__u32 seq, ack;
	__u32 bytes;   /* from the IP header on; 0: not known */
	__u16 headers; /* bytes of the IP and TCP headers */
	__u16 flags;   /* NO_FLAGS: not known */
	__u8 family;   /* 4, 6; 0: no IP header */
	bool data;     /* something follows the TCP header */
};

static __always_inline void tcp_header_parse(const __u8 *header, __u32 before, struct packet *packet)
{
	packet->sport = header[0] << 8 | header[1];
	packet->dport = header[2] << 8 | header[3];
	packet->seq = bpf_ntohl(*(__u32 *)&header[4]);
	packet->ack = bpf_ntohl(*(__u32 *)&header[8]);
	packet->flags = header[13];
	packet->headers = before + (header[12] >> 4) * 4;
	packet->data = packet->bytes > packet->headers;
}

/* Is it a packet of TCP? Behind too many extension headers, or some that are not there, it is not known. */
enum of_tcp { OF_TCP_NO, OF_TCP, OF_TCP_UNKNOWN };

/*
 * Reads the headers of a packet, whose IP header is `at` bytes from skb->head. The kernel sets skb->protocol when it receives a packet, and
 * when it has added the IP header to one that it sends. Behind the header of a tunnel may be the other version of IP. The headers stay at
 * skb->head when it removes them. Those of a later fragment have no TCP header, and it may lie outside of the linear part of the packet.
 * Nobody has tested yet that the IP header is as long as it must be.
 */
static __noinline enum of_tcp packet_read_at(struct sk_buff *skb, __u32 at, struct packet *packet)
{
	__u8 headers[HEADERS_BYTES] __attribute__((aligned(8))) = {};
	__u32 end = skb->tail;
	__u64 length; /* of 64 bits, of which the verifier of 5.10 follows the bound */
	struct header header = {};
	bool inner;

	packet->flags = NO_FLAGS;
	if (at + IPV4_BYTES > end)
		return OF_TCP_NO;
	length = end - at;
	barrier_var(length);
	if (length > HEADERS_BYTES)
		length = HEADERS_BYTES;
	bpf_probe_read_kernel(headers, length, skb->head + at);
	inner = at == skb->inner_network_header;
	if ((inner || skb->protocol == bpf_htons(ETH_P_IP)) && headers[0] >> 4 == 4) {
		header.type = headers[9];
		header.at = (headers[0] & 15) * 4;
		header.later = (headers[6] & 31) || headers[7];
		packet->family = 4;
		packet->bytes = headers[2] << 8 | headers[3];
		map_v4(packet->saddr, *(__be32 *)&headers[12]);
		map_v4(packet->daddr, *(__be32 *)&headers[16]);
	} else if ((inner || skb->protocol == bpf_htons(ETH_P_IPV6)) && headers[0] >> 4 == 6 && length >= IPV6_BYTES) {
		header.type = headers[6];
		header.at = IPV6_BYTES;
		packet->family = 6;
		packet->bytes = headers[4] << 8 | headers[5];
		if (packet->bytes)
			packet->bytes += IPV6_BYTES;
		__builtin_memcpy(packet->saddr, headers + 8, 16);
		__builtin_memcpy(packet->daddr, headers + 24, 16);
		if (is_extension(header.type)) {
			bpf_core_read(headers, sizeof(skb->head),
				      &skb->head); /* what is in them is not needed any more */
			header = header_find(*(__u64 *)headers + at, end - at, header.type, (union unknown *)headers);
			if (!header.at)
				return OF_TCP_UNKNOWN;
		}
	} else {
		return OF_TCP_NO;
	}
	if (header.type != IPPROTO_TCP)
		return OF_TCP_NO;
	if (header.later || header.at < IPV4_BYTES || at + header.at + TCP_BYTES > end)
		return OF_TCP;
	if (header.at == IPV4_BYTES) {
		tcp_header_parse(headers + IPV4_BYTES, header.at, packet);
	} else if (header.at == IPV6_BYTES && packet->family == 6) {
		tcp_header_parse(headers + IPV6_BYTES, header.at, packet);
	} else { /* behind IP options or extension headers */
		bpf_probe_read_kernel(headers, TCP_BYTES, skb->head + at + header.at);
		tcp_header_parse(headers, header.at, packet);
	}
	return OF_TCP;
}

static __always_inline enum of_tcp packet_read(struct sk_buff *skb, struct packet *packet)
{
	return packet_read_at(skb, skb->network_header, packet);
}

/* Its ends as this host sees them, that sends or receives it. */
static __always_inline void ends_read(const struct packet *packet, bool out, struct identity *id)
{
	id->family = packet->family;
	id->lport = out ? packet->sport : packet->dport;
	id->rport = out ? packet->dport : packet->sport;
	__builtin_memcpy(id->laddr, out ? packet->saddr : packet->daddr, 16);
	__builtin_memcpy(id->raddr, out ? packet->daddr : packet->saddr, 16);
}

#endif
