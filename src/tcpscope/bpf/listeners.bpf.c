// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Listeners: their SYN queue and accept queue, and every handshake that is refused because one of them is full.
 *
 * No packet tracepoint shows all of these refusals. The kernel counts them, though, on the CPU that handles the packet and in
 * the middle of one function call. So the counters of that CPU are read when the function is entered and when it has
 * returned: what has grown in between is what this very packet was refused for. Nothing is guessed from queue lengths,
 * and the events sum to the counters exactly.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "connection.bpf.h"

#define STACK_DEPTH 24
#define MAX_CPUS 1024
#define CAUSES (CAUSE_OTHER + 1)
#define STEPS (STEP_ACK + 1)

enum cause {
	CAUSE_UNKNOWN,
	CAUSE_ACCEPT_QUEUE_FULL,  /* ListenOverflows */
	CAUSE_SYN_QUEUE_FULL,     /* TCPReqQFullDrop */
	CAUSE_COOKIE_SENT,        /* SyncookiesSent: answered, not refused */
	CAUSE_SYN_QUEUE_RESERVED, /* only ListenDrops; no cookies, and the last quarter is for peers known before */
	CAUSE_OTHER,              /* only ListenDrops: no route, no memory, a security module */
} __attribute__((packed));

enum step {
	STEP_UNKNOWN,
	STEP_SYN, /* tcp_conn_request */
	STEP_ACK, /* tcp_v4_syn_recv_sock, tcp_v6_syn_recv_sock */
} __attribute__((packed));

enum answer {
	ANSWER_UNKNOWN,
	ANSWER_NONE,
	ANSWER_SYN_COOKIE,
	ANSWER_RST,
} __attribute__((packed));

/* The two queues of a listener and what limits them. */
struct queues {
	__u32 accept_queue DOC("connections that wait for accept()");
	__u32 accept_limit DOC("accept queue limit: listen()'s backlog, cut to somaxconn; it holds one more");
	__u32 syn_queue DOC("handshakes that wait for the final ACK; their limit is the accept queue's");
	__u32 somaxconn DOC("net.core.somaxconn of the namespace");
	__u32 max_syn_backlog DOC("net.ipv4.tcp_max_syn_backlog of the namespace");
	__u8 syncookies DOC("net.ipv4.tcp_syncookies of the namespace");
	bool abort_on_overflow DOC("net.ipv4.tcp_abort_on_overflow of the namespace");
	__u8 padding[2];
};

/* What user space reads: one refusal. */
struct overflow {
	__u64 time_ns KIND("time") UNIT("ns") DOC("when it happened");
	struct identity id;
	struct owner owner;
	struct queues queues;
	enum cause cause DOC("what was full; UNKNOWN when sampled");
	enum step step DOC("at which step of the handshake") UNKNOWN_IS("zero");
	enum answer answer DOC("what the peer got") UNKNOWN_IS("zero");
	__u8 padding;
	__u32 count DOC("how many; 1 unless sampled");
	__u32 padding2;
	__u64 stack[STACK_DEPTH] KIND("stack") DOC("kernel stack, innermost first") UNKNOWN_IS("zero");
};

const struct overflow *overflow_anchor __attribute__((unused));

/* Per listener: what it accepted and refused. Inserted at the first of either, deleted at tcp_destroy_sock. */
struct activity {
	__u64 accepts;
	__u64 last_accept_ns;
	__u64 refused[STEPS][CAUSES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct activity);
} activities SEC(".maps");

static const struct activity new_activity;

/* What the snapshot gives: one process that holds one listener. */
struct listener {
	struct identity id;
	struct owner owner;
	struct queues queues;
	__u32 fd DOC("file descriptor of the process");
	__u64 socket; /* address, to join the holders of one listener */
	__u32 drops DOC("SYNs and final ACKs refused since listen(), for any reason (sk_drops)");
	bool wanted;  /* this holder passes the filter */
	__u8 padding[3];
	__u64 accepts;
	__u64 last_accept_ns;
	__u64 net_overflows;    /* the counters of the namespace, for samples; all bits set if they cannot be read */
	__u64 net_drops;
	__u64 net_full;
	__u64 oldest_synack_us; /* when the SYN-ACK of the connection at the head of the accept queue was sent */
	__u64 now_ns;
	__u64 refused[STEPS][CAUSES];
};

const struct listener *listener_anchor __attribute__((unused));

/* Filled by user space before loading. The numbers of the counters are an anonymous enum: CO-RE cannot name it. */
const volatile __u32 mib_listen_overflows;
const volatile __u32 mib_listen_drops;
const volatile __u32 mib_reqq_full_cookies;
const volatile __u32 mib_reqq_full_drop;
const volatile bool send_events;
const volatile bool send_stacks;
const volatile bool hooked_syn_exit, hooked_ack4_exit, hooked_ack6_exit; /* without one of them user space samples */

/* --- the kernel's counters of this CPU -------------------------------------------------------------------------- */

struct mib {
	__u64 overflows, drops, cookies, full;
};

/* The packet in hand on this CPU. Softirqs do not nest, so one place per CPU is enough. */
struct in_hand {
	struct sock *sk;
	struct sk_buff *skb;
	struct request_sock *req;
	struct mib before;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct in_hand);
} in_hand SEC(".maps");

/*
 * The distance from a per-CPU pointer to the copy of the CPU whose element of `in_hand` this is. The kernel's own variable for it is not in the BTF of 5.10,
 * and reading its address from kallsyms would need CAP_SYSLOG. But the same distance lies between what our per-CPU
 * array holds and what a look-up of it returns. Pointers become numbers by being read back from the stack.
 */
static __always_inline __u64 cpu_offset(struct in_hand *element)
{
	void *array = &in_hand, *copy = element;
	__u64 array_address = 0, copy_address = 0, base = 0;

	bpf_probe_read_kernel(&array_address, sizeof(array_address), &array);
	bpf_probe_read_kernel(&copy_address, sizeof(copy_address), &copy);
	bpf_probe_read_kernel(&base, sizeof(base),
			      (void *)(array_address + bpf_core_field_offset(struct bpf_array, pptrs)));
	return copy_address - base;
}

static __noinline int mib_read(struct in_hand *mine, struct mib *mib)
{
	struct sock *sk = mine->sk;
	char *counters = (char *)BPF_CORE_READ(sk, __sk_common.skc_net.net, mib.net_statistics) + cpu_offset(mine);

	bpf_probe_read_kernel(&mib->overflows, 8, counters + mib_listen_overflows * 8);
	bpf_probe_read_kernel(&mib->drops, 8, counters + mib_listen_drops * 8);
	bpf_probe_read_kernel(&mib->cookies, 8, counters + mib_reqq_full_cookies * 8);
	bpf_probe_read_kernel(&mib->full, 8, counters + mib_reqq_full_drop * 8);
	return 0;
}

static __noinline int queues_read(struct sock *sk, struct queues *queues)
{
	struct inet_connection_sock *icsk = (struct inet_connection_sock *)sk;
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);
	struct netns_ipv4 *ipv4 = __builtin_preserve_access_index(&net->ipv4);

	queues->accept_queue = BPF_CORE_READ(sk, sk_ack_backlog);
	queues->accept_limit = BPF_CORE_READ(sk, sk_max_ack_backlog);
	queues->syn_queue = BPF_CORE_READ(icsk, icsk_accept_queue.qlen.counter);
	queues->somaxconn = BPF_CORE_READ(net, core.sysctl_somaxconn);
	queues->max_syn_backlog = BPF_CORE_READ(net, ipv4.sysctl_max_syn_backlog);
	queues->syncookies = READ_ANY_WIDTH(ipv4, sysctl_tcp_syncookies);
	queues->abort_on_overflow = READ_ANY_WIDTH(ipv4, sysctl_tcp_abort_on_overflow);
	return 0;
}

/* --- one refusal ------------------------------------------------------------------------------------------------ */

/* The remote end of a handshake: from the packet, because at the SYN there is no request yet. */
static __always_inline void peer_read(struct sk_buff *skb, struct identity *id)
{
	unsigned char *head = BPF_CORE_READ(skb, head);
	unsigned char *ip = head + BPF_CORE_READ(skb, network_header);
	__be16 port = 0;
	__be32 v4 = 0;
	__u8 version = 0;

	bpf_probe_read_kernel(&port, 2, head + BPF_CORE_READ(skb, transport_header));
	bpf_probe_read_kernel(&version, 1, ip);
	id->rport = bpf_ntohs(port);
	if (version >> 4 == 6) {
		bpf_probe_read_kernel(id->raddr, 16, ip + 8);
		id->family = 6;
	} else {
		bpf_probe_read_kernel(&v4, 4, ip + 12);
		map_v4(id->raddr, v4);
		id->family = 4;
	}
}

static __always_inline struct activity *activity_of(struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct activity *found = bpf_map_lookup_elem(&activities, &key);

	if (found)
		return found;
	bpf_map_update_elem(&activities, &key, &new_activity, BPF_NOEXIST);
	found = bpf_map_lookup_elem(&activities, &key);
	if (!found)
		COUNT(table_full);
	return found;
}

/*
 * tcp_abort_on_overflow is looked at by tcp_check_req(), where the final ACK of a request goes. The ACK that answers a
 * SYN cookie has only a request that was made for the occasion and knows no listener; it is dropped in silence.
 */
static __always_inline enum answer answer_to(struct in_hand *packet, int step, int cause, bool abort_on_overflow)
{
	struct request_sock *req = packet->req; /* outside of BPF_CORE_READ, which would look for our struct in the kernel */

	if (cause == CAUSE_COOKIE_SENT)
		return ANSWER_SYN_COOKIE;
	if (step == STEP_ACK && cause == CAUSE_ACCEPT_QUEUE_FULL && abort_on_overflow &&
	    BPF_CORE_READ(req, __req_common.skc_listener))
		return ANSWER_RST;
	return ANSWER_NONE;
}

static __noinline int refusal(void *ctx, struct in_hand *packet, int step, int cause)
{
	struct connection *connection = connection_find(packet->sk);
	const struct owner *owner = connection_owner(connection);
	struct activity *activity = activity_of(packet->sk);
	struct identity id = {};
	struct overflow *event;

	if (activity && step > 0 && step < STEPS && cause > 0 && cause < CAUSES)
		__sync_fetch_and_add(&activity->refused[step][cause], 1);
	if (!send_events)
		return 0;
	COUNT(seen);
	identity_read(packet->sk, &id);
	peer_read(packet->skb, &id);
	if (!filter_pass(&id, owner)) {
		COUNT(filtered);
		return 0;
	}
	event = event_reserve(sizeof(*event));
	if (!event)
		return 0;
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->id = id;
	event->id.cookie = cookie_if_any(packet->sk);
	if (owner)
		event->owner = *owner;
	if (!event->owner.pid)
		event->owner.uid = -1;
	queues_read(packet->sk, &event->queues);
	event->cause = cause;
	event->step = step;
	event->count = 1;
	event->answer = answer_to(packet, step, cause, event->queues.abort_on_overflow);
	if (send_stacks)
		bpf_get_stack(ctx, event->stack, sizeof(event->stack), 0);
	event_submit(event);
	return 0;
}

static __always_inline void handshake_enter(struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);

	if (!packet)
		return;
	packet->sk = sk;
	packet->skb = skb;
	packet->req = req;
	mib_read(packet, &packet->before);
}

/* Without cookies the last quarter of tcp_max_syn_backlog is kept for peers that were seen before: tcp_conn_request. */
static __always_inline bool reserved_quarter(struct sock *sk)
{
	struct queues queues = {};

	queues_read(sk, &queues);
	return !queues.syncookies &&
	       (int)(queues.max_syn_backlog - queues.syn_queue) < (int)(queues.max_syn_backlog >> 2);
}

/*
 * A v4-mapped handshake passes tcp_v6_syn_recv_sock and, inside, tcp_v4_syn_recv_sock. The inner one reports and puts
 * the packet down, so the outer one finds none. Nor does an exit whose entry was missed.
 */
static __always_inline void handshake_exit(void *ctx, int step)
{
	__u32 zero = 0;
	struct in_hand *packet = bpf_map_lookup_elem(&in_hand, &zero);
	struct mib before, now = {};

	if (!packet || !packet->sk)
		return;
	before = packet->before;
	mib_read(packet, &now);
	if (now.drops != before.drops)
		refusal(ctx, packet, step,
			now.overflows != before.overflows                  ? CAUSE_ACCEPT_QUEUE_FULL
			: now.full != before.full                          ? CAUSE_SYN_QUEUE_FULL
			: step == STEP_SYN && reserved_quarter(packet->sk) ? CAUSE_SYN_QUEUE_RESERVED
									   : CAUSE_OTHER);
	else if (now.cookies != before.cookies)
		refusal(ctx, packet, step, CAUSE_COOKIE_SENT);
	packet->sk = NULL;
}

/* --- hooks ------------------------------------------------------------------------------------------------------ */

OPTIONAL("overflow events, their peers and steps; overflows are sampled instead")
SEC("fentry/tcp_conn_request")
int BPF_PROG(syn_enter__fentry, void *rsk_ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	handshake_enter(sk, skb, NULL);
	return 0;
}

SEC("kprobe/tcp_conn_request")
int BPF_KPROBE(syn_enter__kprobe, void *rsk_ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	handshake_enter(sk, skb, NULL);
	return 0;
}

OPTIONAL("overflow events at the SYN")
SEC("fexit/tcp_conn_request")
int syn_exit__fexit(void *ctx)
{
	handshake_exit(ctx, STEP_SYN);
	return 0;
}

SEC("kretprobe/tcp_conn_request")
int syn_exit__kretprobe(void *ctx)
{
	handshake_exit(ctx, STEP_SYN);
	return 0;
}

OPTIONAL("overflow events at the final ACK, IPv4")
SEC("fentry/tcp_v4_syn_recv_sock")
int BPF_PROG(ack4_enter__fentry, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(sk, skb, req);
	return 0;
}

SEC("kprobe/tcp_v4_syn_recv_sock")
int BPF_KPROBE(ack4_enter__kprobe, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(sk, skb, req);
	return 0;
}

OPTIONAL("overflow events at the final ACK, IPv4")
SEC("fexit/tcp_v4_syn_recv_sock")
int ack4_exit__fexit(void *ctx)
{
	handshake_exit(ctx, STEP_ACK);
	return 0;
}

SEC("kretprobe/tcp_v4_syn_recv_sock")
int ack4_exit__kretprobe(void *ctx)
{
	handshake_exit(ctx, STEP_ACK);
	return 0;
}

OPTIONAL("overflow events at the final ACK, IPv6")
SEC("fentry/tcp_v6_syn_recv_sock")
int BPF_PROG(ack6_enter__fentry, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(sk, skb, req);
	return 0;
}

SEC("kprobe/tcp_v6_syn_recv_sock")
int BPF_KPROBE(ack6_enter__kprobe, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(sk, skb, req);
	return 0;
}

OPTIONAL("overflow events at the final ACK, IPv6")
SEC("fexit/tcp_v6_syn_recv_sock")
int ack6_exit__fexit(void *ctx)
{
	handshake_exit(ctx, STEP_ACK);
	return 0;
}

SEC("kretprobe/tcp_v6_syn_recv_sock")
int ack6_exit__kretprobe(void *ctx)
{
	handshake_exit(ctx, STEP_ACK);
	return 0;
}

static __always_inline void accepted_from(struct sock *listener, struct sock *child)
{
	struct activity *activity;

	if (!listener || !child)
		return;
	activity = activity_of(listener);
	if (!activity)
		return;
	__sync_fetch_and_add(&activity->accepts, 1);
	activity->last_accept_ns = bpf_ktime_get_ns();
}

OPTIONAL("accepts per second and the time of the last one")
SEC("fexit/inet_csk_accept")
int accept__fexit(__u64 *ctx)
{
	accepted_from((struct sock *)CTX_SLOT(ctx, 0), ACCEPTED_CHILD(ctx));
	return 0;
}

SEC("tp_btf/sys_exit")
int BPF_PROG(accept__syscall, struct pt_regs *regs, long fd)
{
	struct sock *child = sock_of_accept(regs, fd);

	if (child)
		accepted_from(tcp_sock_of_fd(SYSCALL_ARGUMENT_1(regs)), child);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state, struct sock *sk, int old_state, int new_state)
{
	__u64 key = (__u64)sk;

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (new_state == STATE_LISTEN) {
		/* A packet in hand while the socket before at this address was destroyed may have left its activity. */
		bpf_map_delete_elem(&activities, &key);
		COOKIE_OF(sk);
		connection_transition(sk, old_state, new_state);
	} else if (old_state == STATE_LISTEN && new_state == STATE_CLOSE) {
		connection_transition(sk, old_state, new_state);
	}
	return 0;
}

SEC("tp_btf/tcp_destroy_sock")
int BPF_PROG(destroy, struct sock *sk)
{
	__u64 key = (__u64)sk;

	bpf_map_delete_elem(&activities, &key);
	connection_forget(sk);
	return 0;
}

/* --- what exists now -------------------------------------------------------------------------------------------- */

SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (task && file) {
		connection_seed(task, file, STATE_LISTEN);
		cookie_give(file, STATE_LISTEN);
	}
	return 0;
}

/* Then the events are made from snapshots, which needs every listener of a namespace beside its counters. */
static __always_inline bool sampled(void)
{
	return send_events && !(hooked_syn_exit && hooked_ack4_exit && hooked_ack6_exit);
}

/*
 * The namespace's counters over all CPUs. A loop, not bpf_loop(): 5.10 refuses an object with callbacks, used or not.
 */
static __noinline int net_counters_read(struct sock *sk, struct listener *record)
{
	char *counters = (char *)BPF_CORE_READ(sk, __sk_common.skc_net.net, mib.net_statistics);
	__u32 zero = 0;

	record->net_drops = 0;
	for (__u32 cpu = 0; cpu < MAX_CPUS; cpu++) {
		struct in_hand *copy = bpf_map_lookup_percpu_elem(&in_hand, &zero, cpu);
		__u64 value = 0, offset;

		if (!copy)
			break;
		offset = cpu_offset(copy);
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_listen_overflows * 8);
		record->net_overflows += value;
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_listen_drops * 8);
		record->net_drops += value;
		bpf_probe_read_kernel(&value, 8, counters + offset + mib_reqq_full_drop * 8);
		record->net_full += value;
	}
	return 0;
}

/* A listener on :: takes IPv4 too, unless it is for IPv6 only (IPV6_V6ONLY, net.ipv6.bindv6only): -4 and -6 mean it. */
static __always_inline bool listener_wanted(struct sock *sk, struct identity *id)
{
	struct sock_common *common = &sk->__sk_common;
	const __u64 *address = (const __u64 *)id->laddr;
	__u8 family = id->family;
	bool wanted;

	if (filter.family == 4 && family == 6 && !address[0] && !address[1] &&
	    !BPF_CORE_READ_BITFIELD_PROBED(common, skc_ipv6only))
		id->family = 4;
	wanted = filter_identity(id);
	id->family = family;
	return wanted;
}

/* A record has no room on the stack of 512 bytes. Snapshots are read one after the other, so one place is enough. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct listener);
} scratch SEC(".maps");

/* A record for each process that holds a listener, in whatever network namespace: files know no namespaces. */
SEC("iter/task_file")
int snapshot(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct listener *record;
	__u32 zero = 0;
	struct activity *activity;
	struct inet_connection_sock *icsk;
	struct request_sock *oldest;
	struct sock *sk;
	__u64 key;

	if (!task || !file)
		return 0;
	sk = tcp_sock_of_file(file);
	if (!sk || BPF_CORE_READ(sk, __sk_common.skc_state) != STATE_LISTEN)
		return 0;
	record = bpf_map_lookup_elem(&scratch, &zero);
	if (!record)
		return 0;
	__builtin_memset(record, 0, sizeof(*record));
	cookie_give(file, STATE_LISTEN);
	identity_read(sk, &record->id);
	record->id.cookie = cookie_if_any(sk);
	record->wanted = listener_wanted(sk, &record->id);
	if (!record->wanted && !sampled())
		return 0;
	owner_of_task(task, &record->owner);
	record->wanted = record->wanted && filter_owner(&record->owner);
	queues_read(sk, &record->queues);
	record->fd = ctx->fd;
	record->socket = key = (__u64)sk;
	record->net_drops = -1;
	if (sampled() && bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_map_lookup_percpu_elem))
		net_counters_read(sk, record);
	record->drops = BPF_CORE_READ(sk, sk_drops.counter);
	record->now_ns = bpf_ktime_get_ns();
	icsk = (struct inet_connection_sock *)sk;
	oldest = BPF_CORE_READ(icsk, icsk_accept_queue.rskq_accept_head);
	if (oldest)
		record->oldest_synack_us = BPF_CORE_READ((struct tcp_request_sock *)oldest, snt_synack);
	activity = bpf_map_lookup_elem(&activities, &key);
	if (activity) {
		record->accepts = activity->accepts;
		record->last_accept_ns = activity->last_accept_ns;
		__builtin_memcpy(record->refused, activity->refused, sizeof(record->refused));
	}
	bpf_seq_write(ctx->meta->seq, record, sizeof(*record));
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
