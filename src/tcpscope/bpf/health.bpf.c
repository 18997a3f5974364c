// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * A look at all connections: one event for each that waits for something, or that moves data. No program runs between two
 * looks, so a connection costs nothing while nobody looks.
 */
#include "socket_event.bpf.h"
#include "visit.bpf.h"

#define CHRONO_KINDS 3 /* enum tcp_chrono without TCP_CHRONO_UNSPEC, include/net/tcp.h */
#define SNDBUF_LOCK 1  /* SOCK_SNDBUF_LOCK, SOCK_RCVBUF_LOCK, include/uapi/linux/socket.h */
#define RCVBUF_LOCK 2
#define SSTHRESH_NOT_KNOWN 0x7fffffff /* TCP_INFINITE_SSTHRESH, include/net/tcp.h */

/* icsk_pending: ICSK_TIME_..., include/net/inet_connection_sock.h. DACK is not among them since 4.18. */
enum timer {
	TIMER_NONE = 0,
	TIMER_RTO = 1,
	TIMER_ZERO_WINDOW = 3,
	TIMER_LOSS_PROBE = 5,
	TIMER_REORDERING = 6,
} __attribute__((packed));

struct health {
	struct event event;
	enum tcp_state state DOC("state of the connection");
	enum role role;
	__u8 ca_state NAMED_BY("tcp_ca_state", "TCP_CA_") DOC("state of congestion control");
	enum timer timer DOC("which timer of the sender runs");
	__u8 retransmits DOC("retransmission timeouts without an ACK between");
	__u8 backoff DOC("how often the timeout was doubled");
	__u8 probes DOC("probes without an answer: of a zero window, or of keepalive");
	bool has_file DOC("a process can have it: neither in an accept queue nor closed");
	bool accepted;
	bool nagle;
	bool sndbuf_set DOC("SO_SNDBUF was set");
	bool rcvbuf_set DOC("SO_RCVBUF was set");
	bool has_fin DOC("the remote end has sent its FIN");
	bool cwnd_limited;
	bool keepalive DOC("SO_KEEPALIVE is set");
	__u8 mtu_probing DOC("net.ipv4.tcp_mtu_probing of its namespace");
	__u32 out_segs DOC("segments that were sent and not acknowledged");
	__u32 lost_segs;
	__u32 sacked_segs;
	__u32 retrans_segs DOC("segments on their way that were sent again");
	__u32 cwnd;
	__u32 ssthresh UNKNOWN_IS("max");
	__u32 mss;
	__u32 peer_window DOC("window that the remote end has offered");
	__u32 own_window DOC("window that this host has offered");
	__u32 unacked DOC("sequence numbers sent and not acknowledged: bytes, and a SYN or FIN");
	__u32 unsent DOC("data, and the FIN, that waits to be sent");
	__u32 unread DOC("data, and the FIN, that the application has not read");
	__u32 read_seq DOC("up to where the application has read");
	__u32 acked_seq DOC("up to where the remote end has acknowledged");
	__u32 sndbuf;
	__u32 rcvbuf;
	__u32 memory DOC("that what is in its buffers takes, with the kernel's own bytes");
	__u32 srtt_us UNIT("us") UNKNOWN_IS("zero");
	__u32 min_rtt_us UNIT("us") UNKNOWN_IS("max");
	__u32 rto_us UNIT("us");
	__u32 keepalive_s UNIT("s") DOC("idle time after which keepalive would probe");
	__u32 user_timeout_ms UNIT("ms") DOC("TCP_USER_TIMEOUT; 0: it is not set");
	__u32 total_retrans DOC("segments sent again, since it began");
	__u32 dsack_dups DOC("segments that the remote end has said to have got twice");
	__u32 reord_seen DOC("how often reordering was seen");
	__u32 data_segs_out;
	__u32 data_segs_in;
	__u32 fin_timeout_s UNIT("s") DOC("how long it may wait in FIN_WAIT2 when it is closed; 0: not at all");
	bool linger2_set DOC("TCP_LINGER2 was set: otherwise that time is net.ipv4.tcp_fin_timeout");
	__u8 padding2[7];
	__u64 sent_bytes UNIT("bytes") DOC("with what was sent again");
	__u64 retrans_bytes UNIT("bytes");
	__u64 received_bytes UNIT("bytes");
	__u64 since_sent_us UNIT("us") DOC("since data was sent");
	__u64 since_received_us UNIT("us") DOC("since data was received");
	__u64 since_ack_us UNIT("us") DOC("since an ACK was received");
	__u64 busy_us UNIT("us") DOC("time in which data waited to be sent or acknowledged");
	__u64 rwnd_us UNIT("us") DOC("of it: the remote end's window was full");
	__u64 sndbuf_us UNIT("us") DOC("of it: the send buffer was too small");
	__u64 socket;    /* its address */
	__u64 opened_ns; /* 0: not seen. With the address it tells a connection from all others */
};
const struct health *health_anchor __attribute__((unused));

const volatile __u64 jiffy_ns;
const volatile __u32 moving_at_most; /* so many events of connections that move and wait for nothing, in a look */
const volatile __u64 moving_us;      /* such a connection has sent or received something in this time */

/* User space sets both to zero before a look. */
volatile __u64 looked_at, moving;

static __always_inline __u64 jiffies_us(__u32 jiffies)
{
	return jiffies * jiffy_ns / 1000;
}

static __always_inline __u64 age_us(__u32 since)
{
	__u32 age = (__u32)bpf_jiffies64() - since;

	return (__s32)age < 0 ? 0 : jiffies_us(age);
}

/* tcp_get_info_chrono_stats() */
static __always_inline void limits_read(struct tcp_sock *tcp, struct health *health)
{
	__u32 limited[CHRONO_KINDS] = {};
	__u32 since = (__u32)bpf_jiffies64() - BPF_CORE_READ(tcp, chrono_start);
	__u8 now = BPF_CORE_READ_BITFIELD_PROBED(tcp, chrono_type);

	bpf_probe_read_kernel(limited, sizeof(limited), __builtin_preserve_access_index(&tcp->chrono_stat));
	for (int kind = 0; kind < CHRONO_KINDS; kind++)
		if (now == kind + 1)
			limited[kind] += since;
	health->busy_us = jiffies_us(limited[0]) + jiffies_us(limited[1]) + jiffies_us(limited[2]);
	health->rwnd_us = jiffies_us(limited[1]);
	health->sndbuf_us = jiffies_us(limited[2]);
}

static __noinline int window_and_queues_read(struct tcp_sock *tcp, struct health *health)
{
	__u32 una = BPF_CORE_READ(tcp, snd_una), nxt = BPF_CORE_READ(tcp, snd_nxt);

	health->acked_seq = una;
	health->unacked = nxt - una;
	health->unsent = BPF_CORE_READ(tcp, write_seq) - nxt;
	health->read_seq = BPF_CORE_READ(tcp, copied_seq);
	health->unread = BPF_CORE_READ(tcp, rcv_nxt) - health->read_seq;
	if ((__s32)health->unsent < 0)
		health->unsent = 0;
	if ((__s32)health->unread < 0)
		health->unread = 0;
	health->peer_window = BPF_CORE_READ(tcp, snd_wnd);
	health->own_window = BPF_CORE_READ(tcp, rcv_wnd);
	health->out_segs = BPF_CORE_READ(tcp, packets_out);
	health->lost_segs = BPF_CORE_READ(tcp, lost_out);
	health->sacked_segs = BPF_CORE_READ(tcp, sacked_out);
	health->retrans_segs = BPF_CORE_READ(tcp, retrans_out);
	health->cwnd = BPF_CORE_READ(tcp, snd_cwnd);
	health->ssthresh = BPF_CORE_READ(tcp, snd_ssthresh);
	if (health->ssthresh >= SSTHRESH_NOT_KNOWN)
		health->ssthresh = -1;
	health->mss = BPF_CORE_READ(tcp, mss_cache);
	return 0;
}

static __noinline int times_and_totals_read(struct tcp_sock *tcp, struct health *health)
{
	health->srtt_us = BPF_CORE_READ(tcp, srtt_us) >> 3;
	health->min_rtt_us = BPF_CORE_READ(tcp, rtt_min.s[0].v);
	health->rto_us = jiffies_us(BPF_CORE_READ(tcp, inet_conn.icsk_rto));
	health->total_retrans = BPF_CORE_READ(tcp, total_retrans);
	health->dsack_dups = BPF_CORE_READ(tcp, dsack_dups);
	health->reord_seen = BPF_CORE_READ(tcp, reord_seen);
	health->data_segs_out = BPF_CORE_READ(tcp, data_segs_out);
	health->data_segs_in = BPF_CORE_READ(tcp, data_segs_in);
	health->sent_bytes = BPF_CORE_READ(tcp, bytes_sent);
	health->retrans_bytes = BPF_CORE_READ(tcp, bytes_retrans);
	health->received_bytes = BPF_CORE_READ(tcp, bytes_received);
	health->since_sent_us = age_us(BPF_CORE_READ(tcp, lsndtime));
	health->since_received_us = age_us(BPF_CORE_READ(tcp, inet_conn.icsk_ack.lrcvtime));
	health->since_ack_us = age_us(BPF_CORE_READ(tcp, rcv_tstamp));
	limits_read(tcp, health);
	return 0;
}

/* tcp_fin_time() */
static __noinline int fin_timeout_read(struct sock *sk, struct health *health)
{
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	int linger2 = BPF_CORE_READ((struct tcp_sock *)sk, linger2);
	int jiffies = linger2 ?: BPF_CORE_READ(net, ipv4.sysctl_tcp_fin_timeout);

	health->linger2_set = linger2 != 0;
	health->fin_timeout_s = jiffies < 0 ? 0 : jiffies_us(jiffies) / 1000000;
	return 0;
}

static __noinline int settings_read(struct sock *sk, struct health *health)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	struct netns_ipv4 *ipv4 = __builtin_preserve_access_index(&net->ipv4);
	__u32 idle_jiffies = BPF_CORE_READ(tcp, keepalive_time); /* keepalive_time_when() */
	__u8 locks = BPF_CORE_READ_BITFIELD_PROBED(sk, sk_userlocks);

	health->ca_state = BPF_CORE_READ_BITFIELD_PROBED((struct inet_connection_sock *)sk, icsk_ca_state);
	health->timer = BPF_CORE_READ(tcp, inet_conn.icsk_pending);
	health->retransmits = BPF_CORE_READ(tcp, inet_conn.icsk_retransmits);
	health->backoff = BPF_CORE_READ(tcp, inet_conn.icsk_backoff);
	health->probes = BPF_CORE_READ(tcp, inet_conn.icsk_probes_out);
	health->nagle = !BPF_CORE_READ_BITFIELD_PROBED(tcp, nonagle);
	health->has_file = BPF_CORE_READ(sk, sk_socket) != NULL;
	health->has_fin = fin_received(sk);
	health->cwnd_limited = BPF_CORE_READ_BITFIELD_PROBED(tcp, is_cwnd_limited);
	health->keepalive =
		BPF_CORE_READ(sk, __sk_common.skc_flags) >> bpf_core_enum_value(enum sock_flags, SOCK_KEEPOPEN) & 1;
	health->keepalive_s =
		jiffies_us(idle_jiffies ?: (__u32)BPF_CORE_READ(ipv4, sysctl_tcp_keepalive_time)) / 1000000;
	health->user_timeout_ms = BPF_CORE_READ(tcp, inet_conn.icsk_user_timeout);
	health->mtu_probing = READ_ANY_WIDTH(ipv4, sysctl_tcp_mtu_probing);
	health->sndbuf_set = locks & SNDBUF_LOCK;
	health->rcvbuf_set = locks & RCVBUF_LOCK;
	health->sndbuf = BPF_CORE_READ(sk, sk_sndbuf);
	health->rcvbuf = BPF_CORE_READ(sk, sk_rcvbuf);
	health->memory = BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter) + BPF_CORE_READ(sk, sk_wmem_queued);
	return 0;
}

static __noinline int health_send(struct sock *sk, const struct connection *connection, __u8 state)
{
	struct identity id = {};
	struct health *health;

	ends_read(sk, connection, &id);
	health = event_begin(sizeof(*health), bpf_ktime_get_ns(), &id, connection_owner(connection));
	if (!health)
		return 0;
	health->state = state;
	health->role = connection->role;
	health->accepted = connection->accepted;
	__builtin_memset(health->padding2, 0, sizeof(health->padding2));
	health->socket = (__u64)sk;
	health->opened_ns = connection->opened_ns;
	settings_read(sk, health);
	fin_timeout_read(sk, health);
	window_and_queues_read((struct tcp_sock *)sk, health);
	times_and_totals_read((struct tcp_sock *)sk, health);
	return event_submit(health);
}

/* Does it wait: for an ACK, for room to send, for its application, for the other end's FIN, for accept(), for a SYN-ACK? */
static __always_inline bool waits(struct sock *sk, __u8 state)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;

	if (state == STATE_SYN_SENT)
		return BPF_CORE_READ(tcp, inet_conn.icsk_retransmits);
	if (state != STATE_ESTABLISHED || !BPF_CORE_READ(sk, sk_socket))
		return true;
	/* Most connections are idle: their buffers are empty. The rest is in further cache lines, three for each of them. */
	if (!BPF_CORE_READ(sk, sk_wmem_queued) && !BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter))
		return false;
	return BPF_CORE_READ(tcp, packets_out) || BPF_CORE_READ(tcp, write_seq) != BPF_CORE_READ(tcp, snd_nxt) ||
	       BPF_CORE_READ(tcp, rcv_nxt) != BPF_CORE_READ(tcp, copied_seq);
}

static __always_inline bool moves(struct tcp_sock *tcp)
{
	return age_us(BPF_CORE_READ(tcp, lsndtime)) <= moving_us ||
	       age_us(BPF_CORE_READ(tcp, inet_conn.icsk_ack.lrcvtime)) <= moving_us;
}

static long look_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct sock *sk = (struct sock *)*key;
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	if (state == STATE_LISTEN || state == STATE_CLOSE || state == STATE_SYN_RECV)
		return 0;
	looked_at++;
	if (!waits(sk, state)) {
		if (moving >= moving_at_most || !moves((struct tcp_sock *)sk))
			return 0;
		moving++;
	}
	health_send(sk, connection, state);
	return 0;
}

FOR_EACH_CONNECTION(look, look_entry)
