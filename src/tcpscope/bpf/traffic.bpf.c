// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * What each connection has sent and received, as its socket counts it. No program runs when data is sent or received. A look
 * reads the sockets of all connections, and the end of a connection is one more reading.
 *
 * The entry of a connection says what the last look has sent. So a look sends only those that have moved something since.
 * A look and the end may read a connection at the same time, on two processors. Then both events begin at the same number,
 * and user space counts what overlaps once: traffic.py. The end does not write what the last look has sent.
 *
 * To add up by network (subnet) the end of a connection that no look has sent adds to the sums of its network. All others
 * send events.
 */
#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"
#include "state.bpf.h"

#define CHRONO_KINDS 3 /* enum tcp_chrono without TCP_CHRONO_UNSPEC, include/net/tcp.h */

/* Bytes of data, each once. */
struct moved {
	__u64 tx;
	__u64 rx;
	__u64 retrans;
};

struct scratch {
	__u64 sent, received;        /* the socket's own counters at the last look: if they are the same, all are */
	__u32 busy;                  /* at the last look there was data to send, or to be acknowledged */
	__u32 limited[CHRONO_KINDS]; /* as limits_read() says, at the last look */
	struct moved told;           /* what user space knows; at first, where the count begins */
	__u64 told_of;               /* the connection's opened_ns, if `told` is set: see told_read() */
	__u64 looked, ended;         /* 0: no look has sent it; it has not ended */
};
#define HAS_SCRATCH
#define FOLLOWED 0

#include "follow.bpf.h"
#include "accept_hooks.bpf.h"
#include "child.bpf.h"
#include "visit.bpf.h"

struct traffic {
	struct event event;
	__u64 tx_bytes TITLE("TX_BYTES") WIDTH(10) DOC("data sent for the first time") UNIT("bytes");
	__u64 rx_bytes TITLE("RX_BYTES") WIDTH(10) DOC("data received, once and in order") UNIT("bytes");
	__u64 retrans_bytes TITLE("RETRANS") DOC("data sent again") UNIT("bytes");
	struct moved told;
	__u64 socket;    /* its address */
	__u64 opened_ns; /* 0: not seen. With the address it tells a connection from all others */
	__u64 busy_us; /* since the last look, as tcp_get_info_chrono_stats() divides it; the three exclude each other */
	__u64 rwnd_us;
	__u64 sndbuf_us;
	__u32 srtt_us TITLE("RTT(us)") UNIT("us") UNKNOWN_IS("zero") DOC("smoothed round-trip time");
	__u32 network; /* its number in `network_sums` */
	bool cwnd_limited;
	bool app_limited;
	bool ended;
	__u8 padding[5];
};
const struct traffic *traffic_anchor __attribute__((unused));

const volatile bool by_network;
const volatile __u64 jiffy_ns;

/* User space sets it after the first look, at which the count of all connections begins. */
volatile bool begun;

struct network_key {
	__u32 bits; /* that count, of all that follows */
	__u32 family;
	__u8 address[16];
};

#define NETWORK_KEY_BITS (8 * (sizeof(struct network_key) - sizeof(__u32)))

/* Networks -> their numbers. User space fills it before it attaches a program. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct network_key);
	__type(value, __u32);
} networks SEC(".maps");

/* What connections have moved that no look has sent. Memory shared with user space, which subtracts. */
struct network_sum {
	__u64 readings;
	struct moved moved;
};
const struct network_sum *network_sum_anchor __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct network_sum);
} network_sums SEC(".maps");

/* The number of the network that has the remote address: of several, of the smallest. 0: none has it. */
static __always_inline __u32 network_of(const struct identity *id)
{
	struct network_key key = {.bits = NETWORK_KEY_BITS, .family = id->family};
	__u32 *number;

	__builtin_memcpy(key.address, id->raddr, sizeof(key.address));
	number = bpf_map_lookup_elem(&networks, &key);
	return number ? *number : 0;
}

/* The second number may have been read later, and have grown meanwhile. */
static __always_inline __u64 minus(__u64 number, __u64 later)
{
	return number > later ? number - later : 0;
}

/*
 * bytes_received has the FIN, and tcp_fin() tells only after it: so the FIN is asked for last. bytes_sent has what was sent
 * again, and is read before bytes_retrans, which grows first.
 */
static __always_inline void moved_read(struct sock *sk, struct moved *now, __u64 sent, __u64 received)
{
	now->retrans = BPF_CORE_READ((struct tcp_sock *)sk, bytes_retrans);
	now->tx = minus(sent, now->retrans);
	now->rx = minus(received, fin_received(sk));
}

static __always_inline void at_least(__u64 *number, __u64 least)
{
	if (*number < least)
		*number = least;
}

/*
 * While another processor sends data again, bytes_retrans has it, and the bytes_sent that was read has it not. Then `tx` is
 * too small by that. If a look noted it, the next one would tell those bytes once more.
 */
static __always_inline void moved_at_least(struct moved *now, const struct moved *told)
{
	at_least(&now->tx, told->tx);
	at_least(&now->rx, told->rx);
	at_least(&now->retrans, told->retrans);
}

static __always_inline bool moved_same(const struct moved *a, const struct moved *b)
{
	return a->tx == b->tx && a->rx == b->rx && a->retrans == b->retrans;
}

/*
 * A look may be interrupted between its last glance at the entry and its note in it. Meanwhile the connection may end, and its
 * entry's memory become that of another one. So the note says whose it is; one of another connection is none.
 */
static __always_inline void told_read(const struct connection *connection, struct moved *told)
{
	__builtin_memset(told, 0, sizeof(*told));
	if (connection->scratch.told_of == connection->opened_ns)
		*told = connection->scratch.told;
}

static __always_inline __u8 chrono_of(struct sock *sk)
{
	return BPF_CORE_READ_BITFIELD_PROBED((struct tcp_sock *)sk, chrono_type);
}

/*
 * Jiffies for which data was under way, the peer's window was full, the send buffer was full: tcp_get_info_chrono_stats().
 * Another processor may run tcp_chrono_set() meanwhile, which moves the time since chrono_start to chrono_stat: then again.
 */
static __always_inline void limits_read(struct sock *sk, __u32 limited[CHRONO_KINDS])
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	__u32 start;
	__u8 now;

	for (int i = 0; i < 2; i++) {
		start = BPF_CORE_READ(tp, chrono_start);
		now = chrono_of(sk);
		bpf_probe_read_kernel(limited, CHRONO_KINDS * sizeof(__u32),
				      __builtin_preserve_access_index(&tp->chrono_stat));
		if (start == BPF_CORE_READ(tp, chrono_start) && now == chrono_of(sk))
			break;
	}
	for (int kind = 0; kind < CHRONO_KINDS; kind++)
		if (now == kind + 1)
			limited[kind] += (__u32)bpf_jiffies64() - start;
}

/* It never falls, unless it was read in vain before. */
static __always_inline __u64 limited_us(__u32 now, __u32 before)
{
	__s32 jiffies = now - before;

	return jiffies > 0 ? jiffies * jiffy_ns / 1000 : 0;
}

/*
 * Sends the bytes of a connection to user space. A look notes them only when the event has its place in the ring. So if the
 * end, on another processor, sees the new numbers, its own event comes after that of the look.
 */
static __noinline int moved_send(struct sock *sk, struct connection *connection, const struct moved *now, bool ended)
{
	struct scratch *scratch = &connection->scratch;
	__u64 opened_ns = connection->opened_ns;
	__u32 limited[CHRONO_KINDS] = {};
	struct identity id = {};
	struct traffic *event;
	struct moved told;

	told_read(connection, &told);
	ends_read(sk, connection, &id);
	event = event_begin(sizeof(*event), bpf_ktime_get_ns(), &id, connection_owner(connection));
	if (!event)
		return 0;
	event->tx_bytes = now->tx;
	event->rx_bytes = now->rx;
	event->retrans_bytes = now->retrans;
	event->told = told;
	event->socket = (__u64)sk;
	event->opened_ns = opened_ns;
	event->ended = ended;
	__builtin_memset(event->padding, 0, sizeof(event->padding));
	event->busy_us = event->rwnd_us = event->sndbuf_us = event->srtt_us = event->network = 0;
	event->cwnd_limited = event->app_limited = false;
	if (by_network) {
		event->network = network_of(&id);
	} else {
		limits_read(sk, limited);
		event->busy_us = limited_us(limited[0], scratch->limited[0]);
		event->rwnd_us = limited_us(limited[1], scratch->limited[1]);
		event->sndbuf_us = limited_us(limited[2], scratch->limited[2]);
		event->srtt_us = BPF_CORE_READ((struct tcp_sock *)sk, srtt_us) >> 3;
		event->cwnd_limited = BPF_CORE_READ_BITFIELD_PROBED((struct tcp_sock *)sk, is_cwnd_limited);
		event->app_limited = BPF_CORE_READ((struct tcp_sock *)sk, app_limited) != 0;
	}
	if (!ended) {
		/* First the times: an end that sees what was told sees from when on they count. */
		__builtin_memcpy(scratch->limited, limited, sizeof(limited));
		memory_barrier();
		scratch->told = *now;
		memory_barrier();
		scratch->told_of = opened_ns;
	}
	return event_submit(event);
}

/* Adds what a connection has moved to its network. */
static __noinline int moved_add(struct sock *sk, const struct connection *connection, const struct moved *now)
{
	struct network_sum *sum;
	struct identity id = {};
	struct moved told;
	__u32 number;

	COUNT(seen);
	ends_read(sk, connection, &id);
	if (!filter_pass(&id, connection_owner(connection))) {
		COUNT(filtered);
		return 0;
	}
	told_read(connection, &told);
	number = network_of(&id);
	sum = bpf_map_lookup_elem(&network_sums, &number);
	if (!sum)
		return 0;
	__sync_fetch_and_add(&sum->moved.tx, now->tx - told.tx);
	__sync_fetch_and_add(&sum->moved.rx, now->rx - told.rx);
	__sync_fetch_and_add(&sum->moved.retrans, now->retrans - told.retrans);
	__sync_fetch_and_add(&sum->readings, 1);
	return 0;
}

/*
 * Each of a look and the end first sets its own flag, then reads the other's, with a full barrier between. So at least one
 * of the two sees the other. The look leaves a connection alone that has ended. The end sends an event if there may be one
 * of a look, and adds to the sums if there is none.
 */
static __always_inline bool set_and_see(__u64 *own, const __u64 *other)
{
	__sync_fetch_and_add(own, 1);
	memory_barrier();
	return *(const volatile __u64 *)other;
}

static __noinline int connection_ended(struct sock *sk, struct connection *connection)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	struct moved now, told;
	bool looked;

	moved_read(sk, &now, BPF_CORE_READ(tp, bytes_sent), BPF_CORE_READ(tp, bytes_received));
	looked = set_and_see(&connection->scratch.ended, &connection->scratch.looked);
	told_read(connection, &told);
	moved_at_least(&now, &told);
	if (!begun || moved_same(&now, &told))
		return 0;
	return by_network && !looked ? moved_add(sk, connection, &now) : moved_send(sk, connection, &now, true);
}

static __always_inline bool matters(int old_state, int new_state)
{
	return begins_or_ends(old_state, new_state);
}

static __always_inline bool makes_entry(int old_state, int new_state)
{
	return new_state != STATE_CLOSE;
}

static __always_inline int state_changed(struct sock *sk, const struct change *change)
{
	struct followed now;

	follow_find(&now, sk, change);
	if (now.connection)
		follow_update(&now, sk, change);
	else if (is_birth(change->old_state, change->new_state))
		connection_born(sk, NULL);
	if (now.connection && change->new_state == STATE_CLOSE && change->old_state != STATE_LISTEN)
		connection_ended(sk, now.connection);
	return 0;
}

static __always_inline void child_known(struct sock *child, struct connection *connection)
{
}

/* What the connection has moved so far does not count. */
static __noinline int count_from_now(struct sock *sk, struct connection *connection)
{
	struct scratch *scratch = &connection->scratch;
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	scratch->sent = BPF_CORE_READ(tp, bytes_sent);
	scratch->received = BPF_CORE_READ(tp, bytes_received);
	moved_read(sk, &scratch->told, scratch->sent, scratch->received);
	scratch->told_of = connection->opened_ns;
	limits_read(sk, scratch->limited);
	scratch->busy = chrono_of(sk);
	return 0;
}

/* One that waited in an accept queue when the tool began had no entry. */
static __always_inline void accepted(struct sock *child, struct connection *connection, struct sock *listener)
{
	if (connection && !connection->opened_ns)
		count_from_now(child, connection);
}

/* No program has seen the transition to CLOSE. */
static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
	if (!connection->scratch.ended)
		connection_ended(sk, connection);
}

/* Somebody works at the socket: its lock is held, by a process or by a softirq of another processor. */
static __always_inline bool in_use(struct sock *sk)
{
	__u32 lock = 0;

	bpf_probe_read_kernel(&lock, sizeof(lock), __builtin_preserve_access_index(&sk->sk_lock.slock));
	return lock || BPF_CORE_READ(sk, sk_lock.owned);
}

/* A look at a connection whose counters have changed, or which was or is busy. `opened_ns` was read before them. */
static __noinline int look_at(struct sock *sk, struct connection *connection, __u64 sent, __u64 received,
			      __u64 opened_ns)
{
	struct scratch *scratch = &connection->scratch;
	__u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);
	bool may_be_fin = in_use(sk);
	struct moved now, told;

	if (state == STATE_CLOSE || state == STATE_LISTEN)
		return 0;
	if (!begun)
		return count_from_now(sk, connection);
	moved_read(sk, &now, sent, received);
	/* The last byte may be a FIN that tcp_fin() is about to tell. The next look knows. */
	if (may_be_fin && received && now.rx == received)
		now.rx = --received;
	/* The socket may be gone, and its place be another's, in the same entry. */
	if (connection_find(sk) != connection || *(const volatile __u64 *)&connection->opened_ns != opened_ns)
		return 0;
	told_read(connection, &told);
	moved_at_least(&now, &told);
	if (!moved_same(&now, &told)) {
		if (set_and_see(&scratch->looked, &scratch->ended))
			return 0;
		moved_send(sk, connection, &now, false);
	} else if (!by_network) {
		limits_read(sk, scratch->limited);
	}
	told_read(connection, &told);
	if (!moved_same(&now, &told))
		return 0; /* the event was lost, or the filter does not want the connection; the next look tries again */
	scratch->sent = sent;
	scratch->received = received;
	scratch->busy = !by_network && chrono_of(sk);
	return 0;
}

static long look_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	struct scratch *scratch = &connection->scratch;
	struct tcp_sock *tp = (struct tcp_sock *)*key;
	__u64 opened_ns = *(const volatile __u64 *)&connection->opened_ns;
	__u64 sent = BPF_CORE_READ(tp, bytes_sent), received = BPF_CORE_READ(tp, bytes_received);

	if (sent == scratch->sent && received == scratch->received && !scratch->busy)
		return 0;
	look_at((struct sock *)tp, connection, sent, received, opened_ns);
	return 0;
}

FOR_EACH_CONNECTION(look, look_entry)

SEED(ANY_STATE)
