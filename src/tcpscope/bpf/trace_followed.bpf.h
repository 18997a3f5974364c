/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * Which packet an skb is, and from where it is followed. An skb's address is used again, so its header has to say that it is the one
 * that was seen before.
 */
#ifndef TCPSCOPE_TRACE_FOLLOWED_BPF_H
#define TCPSCOPE_TRACE_FOLLOWED_BPF_H

#define GONE_NS 10000000000 /* longer than a packet waits that no connection of this host waits for */

/* Does the header say that it is this one? Its ports and addresses may have changed. */
static __always_inline bool is_same(const struct followed *followed, const struct packet *packet)
{
	return packet->flags != NO_FLAGS && followed->piece.seq == packet->seq && followed->piece.ack == packet->ack;
}

static __always_inline struct followed *followed_find(struct sk_buff *skb)
{
	return packet_find((__u64)skb);
}

static __always_inline void followed_delete(struct sk_buff *skb)
{
	packet_delete((__u64)skb);
}

/* The TCP header of a packet that TCP gives to IP: it has no IP header yet. False if it is not there. */
static __noinline bool transport_read(struct sk_buff *skb, struct packet *packet)
{
	__u8 header[TCP_BYTES + 2] __attribute__((aligned(8))) = {};

	if (skb->transport_header + TCP_BYTES > skb->tail)
		return false;
	bpf_probe_read_kernel(header, TCP_BYTES, skb->head + skb->transport_header);
	packet->bytes = skb->len;
	tcp_header_parse(header, 0, packet);
	return true;
}

/*
 * Does the header behind that of a tunnel say that it is this one? Without a header of TCP anywhere it is encrypted, or the skb is
 * another one: that shows at the next header.
 */
static __noinline bool is_inside(struct sk_buff *skb, const struct followed *followed)
{
	__u32 numbers[2] = {};

	bpf_probe_read_kernel(numbers, sizeof(numbers), skb->head + BPF_CORE_READ(skb, inner_transport_header) + 4);
	return bpf_ntohl(numbers[0]) == followed->piece.seq && bpf_ntohl(numbers[1]) == followed->piece.ack;
}

/* The headers behind that of a tunnel. */
static __always_inline enum of_tcp inner_read(struct sk_buff *skb, struct packet *packet)
{
	return packet_read_at(skb, skb->inner_network_header, packet);
}

/* Of what a device receives the data begins at the IP header. Unless GRO has looked at it, skb->network_header is not set yet. */
static __always_inline __u32 data_offset(struct sk_buff *skb)
{
	return BPF_CORE_READ(skb, data) - BPF_CORE_READ(skb, head);
}

/* Is the packet still the one that was followed? Less than 0: that shows later. */
static __noinline int is_still(struct sk_buff *skb, const struct followed *followed)
{
	struct packet packet = {};

	if (followed->piece.hop == HOP_TRANSMIT)
		return transport_read(skb, &packet) && is_same(followed, &packet);
	if (packet_read_at(skb, followed->piece.hop == HOP_GRO ? data_offset(skb) : skb->network_header, &packet) !=
	    OF_TCP)
		return is_inside(skb, followed) ? 1 : -1;
	return is_same(followed, &packet);
}

/* The packet that an skb is, if it is followed. One comparison for all others. */
static __noinline struct followed *followed_now(struct sk_buff *skb)
{
	struct followed *followed = followed_find(skb);
	int still;

	if (!followed)
		return NULL;
	still = is_still(skb, followed);
	if (still > 0)
		return followed;
	if (!still)
		followed_delete(skb);
	return NULL;
}

/* The length from the IP header on. The header of a packet of more than 64 KB does not say it. */
static __always_inline __u32 length_of(struct sk_buff *skb, const struct packet *packet)
{
	__u64 head, data;

	if (packet->bytes)
		return packet->bytes;
	head = (__u64)BPF_CORE_READ(skb, head);
	data = (__u64)BPF_CORE_READ(skb, data);
	return skb->len - (head + skb->network_header - data);
}

static __always_inline void piece_read(struct sk_buff *skb, const struct packet *packet, struct piece *piece)
{
	piece->bytes = length_of(skb, packet);
	piece->seq = packet->seq;
	piece->ack = packet->ack;
	piece->flags = packet->flags;
	piece->end_seq = packet->seq + (piece->bytes > packet->headers ? piece->bytes - packet->headers : 0) +
			 !!(packet->flags & TCP_SYN) + !!(packet->flags & TCP_FIN);
}

static __always_inline __u64 next_number(void)
{
	__u32 zero = 0, interrupting;
	struct numbers *mine = bpf_map_lookup_elem(&numbers, &zero);
	__u64 number;

	if (!mine)
		return 0;
	interrupting = mine->taking++ & 1;
	barrier();
	number = mine->begun[interrupting]++;
	barrier();
	mine->taking--;
	return number * possible_cpus + bpf_get_smp_processor_id() + 1 + (interrupting ? INTERRUPTING : 0);
}

/* The connection with these ends; 0: not known. Apart, as handled_begin() is. */
static __noinline __u64 socket_with(const struct identity *id)
{
	struct ends ends;
	__u64 *sk;

	ends_of(id, &ends);
	sk = bpf_map_lookup_elem(&sockets, &ends);
	return sk ? *sk : 0;
}

/*
 * Has the packet no hop left that an skb shows? If TCP has taken it, its connection shows the rest. If GRO or the backlog has merged it,
 * or it belongs to a handshake, which tcp_probe does not see, the connection's sequence numbers say that it has arrived.
 */
static __noinline bool is_over(const struct followed *followed)
{
	struct tcp_sock *tcp = (struct tcp_sock *)(followed->sk ?: socket_with(&followed->id));
	__u32 acked = BPF_CORE_READ(tcp, snd_una);
	const struct flow *flow = flow_find((struct sock *)tcp);
	bool lives = flow && flow->id.lport == followed->id.lport && flow->id.rport == followed->id.rport;

	if (followed->piece.direction == WAY_SENT)
		return followed->sk && followed->piece.hop == HOP_XMIT &&
		       followed->piece.end_seq != followed->piece.seq &&
		       (!lives || !is_after(followed->piece.end_seq, acked));
	if (followed->piece.hop != HOP_RECEIVE)
		return followed->piece.hop == HOP_TCP;
	if (followed->piece.left_out) /* most likely it has arrived */
		return true;
	if (!tcp)
		return bpf_ktime_get_ns() - followed->piece.last_ns > GONE_NS;
	return !lives || !(is_after(followed->piece.end_seq, BPF_CORE_READ(tcp, rcv_nxt)) ||
			   is_after(followed->piece.ack, acked));
}

/* The packet that began first gives way, so that there is a ticket for another one. */
__noinline int oldest_push_out(void)
{
	struct ticket ticket = {};
	struct followed *followed;
	struct flow *flow;

	if (bpf_map_pop_elem(&tickets, &ticket))
		return 0;
	followed = packet_find(ticket.skb);
	if (!followed || followed->since_ns != ticket.since_ns)
		return 0;
	if (!is_over(followed)) {
		COUNT(missed);
		flow = followed->piece.waits ? flow_find((struct sock *)followed->sk) : NULL;
		if (flow && followed->piece.direction == WAY_SENT)
			flow->pushed_out++;
	}
	packet_delete(ticket.skb);
	return 0;
}

/* From now on the packet is followed. NULL: no place. Without a number it is a new packet. */
static __noinline struct followed *followed_add(struct sk_buff *skb, const struct packet *packet, enum way direction,
						__u64 number)
{
	struct ticket ticket = {.skb = (__u64)skb, .since_ns = bpf_ktime_get_ns()};
	struct followed *followed;

	if (bpf_map_push_elem(&tickets, &ticket, BPF_ANY)) {
		oldest_push_out();
		if (bpf_map_push_elem(&tickets, &ticket, BPF_ANY)) { /* another processor was quicker */
			COUNT(missed);
			return NULL;
		}
	}
	followed = packet_add(ticket.skb);
	if (!followed) {
		COUNT(missed);
		return NULL;
	}
	followed->skb = ticket.skb;
	followed->since_ns = ticket.since_ns;
	piece_read(skb, packet, &followed->piece);
	followed->piece.direction = direction;
	followed->piece.number = number ?: next_number();
	return followed;
}

/* The socket in the table of owners: of a request its listener. */
static __always_inline struct sock *owned_of(struct sock *sk)
{
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	if (state == STATE_TIME_WAIT)
		return NULL;
	return state == STATE_NEW_SYN_RECV ? BPF_CORE_READ(sk, __sk_common.skc_listener) : sk;
}

static __always_inline bool is_owner_chosen(struct sock *owned)
{
	return !filter_wants_owner() || filter_owner(owned ? connection_owner(connection_find(owned)) : NULL);
}

/* What the filter says, before anything is counted: other traffic is no event. */
static __always_inline bool is_chosen(const struct identity *id, struct sock *owned)
{
	return filter_identity(id) && is_owner_chosen(owned);
}

#endif
