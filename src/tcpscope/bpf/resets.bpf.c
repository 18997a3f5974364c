// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * A RST that the kernel sends or receives: both ends, the state of the connection, and why. On request also the end of a
 * connection whose peer answers no more, for which the kernel sends none.
 */
#define HAS_GROUPS
#include "socket_event.bpf.h"

#define STACK_DEPTH 24
#define CLOSED 8192
#define HELD 4096
#define HELD_NS 20000000 /* the kernel answers a segment long before that */

enum direction { DIRECTION_SENT, DIRECTION_RECEIVED, DIRECTION_NONE } __attribute__((packed));

enum cause {
	CAUSE_UNKNOWN,
	CAUSE_NO_LISTENER,
	CAUSE_NO_CONNECTION,
	CAUSE_DATA_AFTER_CLOSE,
	CAUSE_BAD_SEGMENT,
	CAUSE_ABORT_ON_OVERFLOW,
	CAUSE_UNREAD_DATA,
	CAUSE_LINGER,
	CAUSE_LINGER2,
	CAUSE_DISCONNECT,
	CAUSE_LISTENER_CLOSED,
	CAUSE_KEEPALIVE,
	CAUSE_NO_MEMORY,
	CAUSE_KILLED,
	CAUSE_TIMEOUT,
	CAUSE_MPTCP,
} __attribute__((packed));

struct resets {
	struct event event;
	enum direction direction TITLE("DIR") DOC("SENT or RECEIVED; NONE: it ended without a RST (--timeouts)");
	enum cause cause UNKNOWN_IS("zero") WIDTH(16) DOC("why this host sent it, or why it ended");
	enum tcp_state state UNKNOWN_IS("zero") DOC("state of the connection before; LISTEN if a listener answers");
	__u8 reason NAMED_BY("sk_rst_reason", "SK_RST_REASON_") UNKNOWN_IS("max") WIDTH(20)
	DOC("the kernel's own reason, since Linux 6.10");
	__u8 unanswered KIND("bool") UNKNOWN_IS("max")
	DOC("whether this host had sent data, and received none since; null: not received");
	__u8 padding[3];
	__u64 stack[STACK_DEPTH] KIND("stack") NOT_COUNTED DOC("kernel stack, innermost first") UNKNOWN_IS("zero");
};
const struct resets *resets_anchor __attribute__((unused));

const volatile bool send_stacks;
const volatile bool send_timeouts;

/* A RST, before the filter. */
struct reset {
	__u64 time_ns;
	struct identity id;
	struct owner owner;
	enum direction direction;
	enum cause cause;
	enum tcp_state state;
	__u8 reason;
	__u8 unanswered;
	__u8 padding[3];
};

/*
 * What a connection was at its last transition to CLOSE. The kernel may send the RST after it, after the end of the socket,
 * or from a timewait socket, which has no owner. The kernel may give the socket's address to another one, so the key is both
 * ends, without a cookie.
 */
struct closed {
	struct owner owner;
	__u64 time_ns;
	enum tcp_state state; /* before */
	__u8 padding[7];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, CLOSED);
	__type(key, struct identity);
	__type(value, struct closed);
} closed_ones SEC(".maps");

/* A received RST that may be none: may_be_data(). Deleted in answers_data() and flush_entry(). */
struct held {
	struct reset reset;
	__u64 stack[STACK_DEPTH];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HELD);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct held);
} held SEC(".maps");

__u64 holds; /* entries of `held` */

static const struct held nothing_held;

static __always_inline void fill(struct resets *event, const struct reset *reset)
{
	event->direction = reset->direction;
	event->cause = reset->cause;
	event->state = reset->state;
	event->reason = reset->reason;
	event->unanswered = reset->unanswered;
	__builtin_memset(event->padding, 0, sizeof(event->padding));
}

/* With --count the event has no stack: there is no room for one in the program's own memory. */
static __always_inline int count(const struct reset *reset)
{
	char room[offsetof(struct resets, stack)] __attribute__((aligned(8)));
	struct resets *event = event_begin_in(room, sizeof(room), reset->time_ns, &reset->id, &reset->owner);

	if (!event)
		return 0;
	fill(event, reset);
	return event_submit(event);
}

/* `stack`: that of a RST that was held back, NULL for the present one. */
static __noinline int emit(void *ctx, const struct reset *reset, const __u64 *stack)
{
	struct resets *event;

	if (IS_GROUPING)
		return count(reset);
	event = event_begin(sizeof(*event), reset->time_ns, &reset->id, &reset->owner);
	if (!event)
		return 0;
	fill(event, reset);
	if (stack) {
		__builtin_memcpy(event->stack, stack, sizeof(event->stack));
		return event_submit(event);
	}
	__builtin_memset(event->stack, 0, sizeof(event->stack));
	if (send_stacks)
		bpf_get_stack(ctx, event->stack, sizeof(event->stack), 0);
	return event_submit(event);
}

static __always_inline bool sock_flag(struct sock *sk, int flag)
{
	return BPF_CORE_READ(sk, __sk_common.skc_flags) >> flag & 1;
}

#define SOCK_FLAG(sk, flag) sock_flag(sk, bpf_core_enum_value(enum sock_flags, flag))

static __always_inline bool is_mptcp(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	return bpf_core_field_exists(struct tcp_sock, is_mptcp) && BPF_CORE_READ_BITFIELD_PROBED(tp, is_mptcp);
}

/*
 * Does MPTCP end this subflow, not TCP? mptcp_do_fastclose(), mptcp_subflow_reset(), get_mapping_status(). Before 6.10 a
 * mark tells it, since then the reason, which is that of close() for MP_FASTCLOSE.
 */
static __always_inline bool ended_by_mptcp(struct sock *sk, __u8 reason)
{
	struct mptcp_subflow_context *context = BPF_CORE_READ((struct tcp_sock *)sk, inet_conn.icsk_ulp_data);

	if (bpf_core_enum_value_exists(enum sk_rst_reason, SK_RST_REASON_MPTCP_RST_EUNSPEC) &&
	    reason >= bpf_core_enum_value(enum sk_rst_reason, SK_RST_REASON_MPTCP_RST_EUNSPEC) &&
	    reason <= bpf_core_enum_value(enum sk_rst_reason, SK_RST_REASON_MPTCP_RST_EMIDDLEBOX))
		return true;
	if (bpf_core_field_exists(struct mptcp_subflow_context, send_fastclose) &&
	    BPF_CORE_READ_BITFIELD_PROBED(context, send_fastclose))
		return true;
	if (bpf_core_field_exists(struct mptcp_subflow_context, resetting) &&
	    BPF_CORE_READ_BITFIELD_PROBED(context, resetting))
		return true;
	return bpf_core_field_exists(struct mptcp_subflow_context, reset_reason) &&
	       BPF_CORE_READ_BITFIELD_PROBED(context, reset_reason);
}

/* Neither a timewait socket nor a request: these are no struct sock. */
static __always_inline bool is_full(int state)
{
	return state != STATE_TIME_WAIT && state != STATE_NEW_SYN_RECV;
}

/*
 * Has a timer of retransmissions, or of probes for a zero window, given up? tcp_write_err() leaves the socket an error: the
 * soft one if there is one. The keepalive timer calls it, too, when nothing waits to be sent or acknowledged.
 */
static __always_inline bool times_out(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	int error = BPF_CORE_READ(sk, sk_err);

	if (error != ETIMEDOUT && (!error || error != BPF_CORE_READ(sk, sk_err_soft)))
		return false;
	return BPF_CORE_READ(tp, write_seq) != BPF_CORE_READ(tp, snd_una);
}

#define SAME_END_NS 100000000 /* no timeout is so short: TCP_RTO_MIN */

/* It ends without a RST. The note of it tells the second copy: SAME_END_NS. */
static __noinline int timed_out(void *ctx, const struct identity *id, const struct closed *note, __u64 cookie)
{
	const struct closed *told = bpf_map_lookup_elem(&closed_ones, id);
	struct reset reset = {
		.time_ns = note->time_ns,
		.id = *id,
		.owner = note->owner,
		.direction = DIRECTION_NONE,
		.cause = CAUSE_TIMEOUT,
		.state = note->state,
		.reason = -1,
		.unanswered = -1,
	};

	if (told && note->time_ns - told->time_ns < SAME_END_NS)
		return 0;
	reset.id.cookie = cookie;
	return emit(ctx, &reset, NULL);
}

#include "resets_cause.bpf.h"

/* In LAST_ACK it gets a RST from itself only if it was shut down, and then closed with unread data, or disconnected. */
static __always_inline bool may_reset_in_last_ack(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;

	return has_unread_data(sk) || BPF_CORE_READ(tp, snd_nxt) != BPF_CORE_READ(tp, write_seq);
}

static __always_inline int closing(void *ctx, struct sock *sk, int old_state)
{
	bool in_vain = send_timeouts && was_established(old_state) && times_out(sk);
	struct closed note = {.state = old_state};
	struct identity id = {};
	const struct owner *owner;

	if (old_state == STATE_LAST_ACK && !in_vain && !may_reset_in_last_ack(sk))
		return 0;
	identity_read(sk, &id);
	owner = connection_owner(connection_find(sk));
	if (owner)
		note.owner = *owner;
	note.time_ns = bpf_ktime_get_ns();
	if (in_vain)
		timed_out(ctx, &id, &note, COOKIE_OF(sk));
	bpf_map_update_elem(&closed_ones, &id, &note, BPF_ANY);
	return 0;
}

static __always_inline bool may_reset_later(int old_state, int new_state)
{
	return new_state == STATE_CLOSE && old_state != STATE_SYN_SENT && old_state != STATE_LISTEN;
}

/* On this CPU, the last socket of which the first copy has written a note. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} noted SEC(".maps");

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(may_reset_later(old_state, new_state), close, struct sock *sk, int old_state, int new_state)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&noted, &zero);

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	closing(ctx, sk, old_state);
	if (last)
		*last = (__u64)sk;
	return 0;
}

/* If a softirq comes between the copies, this one may write the same note again, and sees from it what was told. */
AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(may_reset_later(old_state, new_state), close_again, struct sock *sk, int old_state,
		       int new_state)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&noted, &zero);

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (last && *last == (__u64)sk)
		*last = 0;
	else
		closing(ctx, sk, old_state);
	return 0;
}

/* Was a "received RST" of this socket held back? Then it was the data that the kernel now answers. */
static __always_inline bool answers_data(struct sock *sk, const struct identity *id)
{
	__u64 key = (__u64)sk;
	struct held *found = bpf_map_lookup_elem(&held, &key);

	if (!found || found->reset.id.lport != id->lport || found->reset.id.rport != id->rport)
		return false;
	if (!bpf_map_delete_elem(&held, &key))
		__sync_fetch_and_add(&holds, -1);
	return true;
}

/* tcp_v4_send_reset() and tcp_v6_send_reset() begin with these tests. */
static __always_inline bool is_answered(struct sock *sk, const struct segment *segment)
{
	struct rt6_info *v6 = (struct rt6_info *)segment->dst;
	struct rtable *v4 = (struct rtable *)segment->dst;

	if (segment->flags & FLAG_RST)
		return false;
	if (sk)
		return true;
	return segment->version == 6 ? BPF_CORE_READ(v6, rt6i_flags) & RTF_LOCAL
				     : BPF_CORE_READ(v4, rt_type) == RTN_LOCAL;
}

/* `skb`: the segment that is answered, NULL for none. `may_be`: the kernel has not decided yet whether it answers. */
static __always_inline int sent(void *ctx, struct sock *sk, struct sk_buff *skb, bool may_be, __u64 cookie, __u8 reason)
{
	int state = sk ? BPF_CORE_READ(sk, __sk_common.skc_state) : 0;
	struct reset reset = {
		.time_ns = bpf_ktime_get_ns(),
		.direction = DIRECTION_SENT,
		.state = state,
		.reason = reason,
		.unanswered = -1,
	};
	const struct connection *connection = sk ? connection_find(sk) : NULL;
	const struct closed *closed = NULL;
	struct segment segment = {};

	if (skb)
		segment_read(sk, skb, &segment, &reset.id);
	else if (sk)
		identity_read(sk, &reset.id);
	if (may_be && !is_answered(sk, &segment))
		return 0;
	if (state == STATE_CLOSE || state == STATE_TIME_WAIT)
		closed = bpf_map_lookup_elem(&closed_ones, &reset.id);
	if (state == STATE_CLOSE)
		reset.state = closed ? closed->state : 0;
	else if (state == STATE_TIME_WAIT)
		reset.state = BPF_CORE_READ((struct inet_timewait_sock *)sk, tw_substate);
	reset.id.cookie = cookie;
	if (connection)
		reset.owner = *connection_owner(connection);
	else if (closed)
		reset.owner = closed->owner;
	if (skb)
		reset.cause = cause_of_answer(sk, &segment, state, reset.state,
					      state == STATE_CLOSE && answers_data(sk, &reset.id), reason);
	else if (sk)
		reset.cause = cause_of_active(sk, state, reset.state, reason);
	return emit(ctx, &reset, NULL);
}

/*
 * An argument that may be NULL. Before "bpf: Augment raw_tp arguments with PTR_MAYBE_NULL" (6.13) the verifier takes it for
 * a pointer that is none, and removes the test. Read from memory it is a number.
 */
static __always_inline void *nullable(void *ctx, int argument)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), ctx + argument * sizeof(value));
	return (void *)value;
}

/* The cookie of a connection's socket. A listener that answers is not the connection. */
#define COOKIE_IF_CONNECTION(sk, trusted)                                                          \
	({                                                                                         \
		int state = sk ? BPF_CORE_READ(sk, __sk_common.skc_state) : 0;                     \
                                                                                                   \
		sk && trusted && is_full(state) && state != STATE_LISTEN ? COOKIE_OF(trusted) : 0; \
	})

NEEDS("SK_RST_REASON_NO_SOCKET")
SEC("tp_btf/tcp_send_reset")
int TRACEPOINT_PROG(send__all, struct sock *trusted, struct sk_buff *unused, int reason)
{
	struct sock *sk = nullable(ctx, 0);

	return sent(ctx, sk, nullable(ctx, 1), false, COOKIE_IF_CONNECTION(sk, trusted), reason);
}

/* Before "trace: tcp: fully support trace_tcp_send_reset" (6.10) it fires for full sockets only. The reason is of 6.10, too. */
SEC("tp_btf/tcp_send_reset")
int TRACEPOINT_PROG(send__sockets, struct sock *trusted)
{
	struct sock *sk = nullable(ctx, 0);

	return sent(ctx, sk, nullable(ctx, 1), false, COOKIE_IF_CONNECTION(sk, trusted), -1);
}

/* Before 6.10: a segment without a full socket, which the function is called to answer. */
static __always_inline int answered(void *ctx, struct sock *sk, struct sk_buff *skb)
{
	return sk && is_full(BPF_CORE_READ(sk, __sk_common.skc_state)) ? 0 : sent(ctx, sk, skb, true, 0, -1);
}

UNLESS("send__all")
OPTIONAL("RSTs for segments without a connection")
SEC("fentry/tcp_v4_send_reset")
int FUNCTION_PROG(answer4__fentry)
{
	return answered(ctx, nullable(ctx, 0), nullable(ctx, 1));
}

SEC("kprobe/tcp_v4_send_reset")
int BPF_KPROBE(answer4__kprobe, struct sock *sk, struct sk_buff *skb)
{
	return answered(ctx, sk, skb);
}

UNLESS("send__all")
OPTIONAL("RSTs for segments without a connection")
SEC("fentry/tcp_v6_send_reset")
int FUNCTION_PROG(answer6__fentry)
{
	return answered(ctx, nullable(ctx, 0), nullable(ctx, 1));
}

SEC("kprobe/tcp_v6_send_reset")
int BPF_KPROBE(answer6__kprobe, struct sock *sk, struct sk_buff *skb)
{
	return answered(ctx, sk, skb);
}

static __always_inline int hold(void *ctx, struct sock *sk, const struct reset *reset)
{
	__u64 key = (__u64)sk;
	struct held *place = bpf_map_lookup_elem(&held, &key);

	if (place)
		emit(NULL, &place->reset, place->stack);
	else if (!bpf_map_update_elem(&held, &key, &nothing_held, BPF_NOEXIST))
		__sync_fetch_and_add(&holds, 1);
	place = bpf_map_lookup_elem(&held, &key);
	if (!place) {
		COUNT(seen);
		COUNT(lost);
		return 0;
	}
	place->reset = *reset;
	if (send_stacks)
		bpf_get_stack(ctx, place->stack, sizeof(place->stack), 0);
	return 0;
}

/*
 * tcp_rcv_state_process() calls tcp_reset() also for data that comes after close() and shutdown(), in FIN_WAIT1 and
 * FIN_WAIT2. No RST was received then: the kernel sends one, in the same softirq, a moment later. Nothing in the socket tells
 * the two apart. So the program keeps such an event in `held`. An iterator sends it later, if the kernel has sent no RST.
 */
static __always_inline bool may_be_data(struct sock *sk, int state)
{
	return (state == STATE_FIN_WAIT1 || state == STATE_FIN_WAIT2) && BPF_CORE_READ(sk, sk_shutdown) & RCV_SHUTDOWN;
}

/*
 * Has it sent data, and received none since? Both times are in jiffies: in the same one it is not known which came last, and
 * the answer is no, unless nothing has ever been received.
 */
static __always_inline bool is_unanswered(struct tcp_sock *tp)
{
	__u32 sent = BPF_CORE_READ(tp, lsndtime), received = BPF_CORE_READ(tp, inet_conn.icsk_ack.lrcvtime);

	if (!BPF_CORE_READ(tp, data_segs_out))
		return false;
	return !BPF_CORE_READ(tp, data_segs_in) || (__s32)(sent - received) > 0;
}

ROLE("delays")
SEC("tp_btf/tcp_receive_reset")
int TRACEPOINT_PROG(receive, struct sock *sk)
{
	const struct connection *connection = connection_find(sk);
	struct reset reset = {
		.time_ns = bpf_ktime_get_ns(),
		.id.cookie = COOKIE_OF(sk),
		.direction = DIRECTION_RECEIVED,
		.state = BPF_CORE_READ(sk, __sk_common.skc_state),
		.reason = -1,
		.unanswered = is_unanswered((struct tcp_sock *)sk),
	};

	identity_read(sk, &reset.id);
	if (connection)
		reset.owner = *connection_owner(connection);
	return may_be_data(sk, reset.state) ? hold(ctx, sk, &reset) : emit(ctx, &reset, NULL);
}

static long flush_entry(struct bpf_map *table, __u64 *key, struct held *entry, void *unused)
{
	__u64 sk = *key;

	if (!entry->reset.time_ns) /* hold() is about to fill it */
		return 0;
	if (!ending && bpf_ktime_get_ns() - entry->reset.time_ns < HELD_NS)
		return 0;
	emit(NULL, &entry->reset, entry->stack);
	if (!bpf_map_delete_elem(&held, &sk))
		__sync_fetch_and_add(&holds, -1);
	return 0;
}

ROLE("flushes")
NEEDS("BPF_FUNC_for_each_map_elem")
SEC("iter/bpf_map")
int flush__each(struct bpf_iter__bpf_map *ctx)
{
	if (!ctx->map)
		bpf_for_each_map_elem(&held, flush_entry, NULL, 0);
	return 0;
}

OVER_MAP("held")
SEC("iter/bpf_map_elem")
int flush__element(struct bpf_iter__bpf_map_elem *ctx)
{
	__u64 *key = ctx->key, sk = key ? *key : 0;
	struct held *entry = bpf_map_lookup_elem(&held, &sk);

	return entry ? flush_entry(NULL, &sk, entry, NULL) : 0;
}
