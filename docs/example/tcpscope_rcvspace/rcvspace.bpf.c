// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* The receive buffer of a connection, when an application has read: tcp_rcv_space_adjust() of net/ipv4/tcp_input.c. */
#include "socket_event.bpf.h"

/* A field that tcpscope's kernel.bpf.h does not have. libbpf ignores what follows ___, and finds it by name. */
struct tcp_sock___rcvspace {
	struct {
		__u32 space;
	} rcvq_space;
} __attribute__((preserve_access_index));

struct rcvspace {
	struct event event;
	__u32 space_bytes UNIT("bytes") DOC("what the application took in the last round-trip time");
	__u32 rcvbuf_bytes UNIT("bytes") DOC("size of the receive buffer, as SO_RCVBUF has it");
};

const struct rcvspace *rcvspace_anchor __attribute__((unused));

SEC("tp_btf/tcp_rcv_space_adjust")
int TRACEPOINT_PROG(adjusted, struct sock *sk)
{
	struct rcvspace *event = socket_event_begin(NULL, sizeof(*event), sk, COOKIE_OF(sk), sk);

	if (!event)
		return 0;
	event->space_bytes = BPF_CORE_READ((struct tcp_sock___rcvspace *)sk, rcvq_space.space);
	event->rcvbuf_bytes = BPF_CORE_READ(sk, sk_rcvbuf);
	return event_submit(event);
}
