// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * Listeners: their SYN queue and accept queue, and every handshake that the kernel refuses because one of them is full.
 *
 * No packet tracepoint shows all of these refusals. But the kernel counts them, on the CPU that handles the packet and
 * inside one function call. The programs read the counters of that CPU when the function is entered and when it returns:
 * the counter that has grown tells why the kernel refused this packet. So nothing is guessed from queue lengths, and the
 * events sum to the counters exactly. Where no function can be hooked: refused.bpf.h.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "activity.bpf.h"
#include "connection.bpf.h"
#include "overflow.bpf.h"
#include "queues.bpf.h"
#include "snapshot.bpf.h"
#include "recursion.bpf.h"
#include "visit.bpf.h"

#define WITHOUT_REFUSALS "refusals one by one, with peer and step; they are sampled instead"

/* By tracepoints alone: refused.bpf.h, which is included below. */
#define FOLLOWS_LISTENERS
static __noinline int listening_begin(struct sock *sk);
static __noinline int listening_end(struct sock *sk);
static __always_inline bool by_tracepoints(void)
{
	/* Without the helper (5.19) they are not called, but the object has these functions on every kernel. */
	return bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_map_lookup_percpu_elem) && hooked_syn_exit_again;
}

UNLESS("syn_exit__consume")
OPTIONAL(WITHOUT_REFUSALS)
SEC("fentry/tcp_conn_request")
int FUNCTION_PROG(syn_enter__fentry, void *rsk_ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	handshake_enter(FUNCTION_SYN, sk, skb, NULL);
	return 0;
}

SEC("kprobe/tcp_conn_request")
int BPF_KPROBE(syn_enter__kprobe, void *rsk_ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	handshake_enter(FUNCTION_SYN, sk, skb, NULL);
	return 0;
}

OPTIONAL(WITHOUT_REFUSALS)
SEC("fexit/tcp_conn_request")
int FUNCTION_PROG(syn_exit__fexit)
{
	handshake_exit(ctx, FUNCTION_SYN);
	return 0;
}

SEC("kretprobe/tcp_conn_request")
int syn_exit__kretprobe(void *ctx)
{
	handshake_exit(ctx, FUNCTION_SYN);
	return 0;
}

UNLESS("ack4_exit__free")
OPTIONAL(WITHOUT_REFUSALS)
SEC("fentry/tcp_v4_syn_recv_sock")
int FUNCTION_PROG(ack4_enter__fentry, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(FUNCTION_ACK4, sk, skb, req);
	return 0;
}

SEC("kprobe/tcp_v4_syn_recv_sock")
int BPF_KPROBE(ack4_enter__kprobe, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(FUNCTION_ACK4, sk, skb, req);
	return 0;
}

OPTIONAL(WITHOUT_REFUSALS)
SEC("fexit/tcp_v4_syn_recv_sock")
int FUNCTION_PROG(ack4_exit__fexit)
{
	handshake_exit(ctx, FUNCTION_ACK4);
	return 0;
}

SEC("kretprobe/tcp_v4_syn_recv_sock")
int ack4_exit__kretprobe(void *ctx)
{
	handshake_exit(ctx, FUNCTION_ACK4);
	return 0;
}

UNLESS("ack4_exit__free")
OPTIONAL(WITHOUT_REFUSALS)
SEC("fentry/tcp_v6_syn_recv_sock")
int FUNCTION_PROG(ack6_enter__fentry, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(FUNCTION_ACK6, sk, skb, req);
	return 0;
}

SEC("kprobe/tcp_v6_syn_recv_sock")
int BPF_KPROBE(ack6_enter__kprobe, struct sock *sk, struct sk_buff *skb, struct request_sock *req)
{
	handshake_enter(FUNCTION_ACK6, sk, skb, req);
	return 0;
}

UNLESS("ack4_exit__free")
OPTIONAL(WITHOUT_REFUSALS)
SEC("fexit/tcp_v6_syn_recv_sock")
int FUNCTION_PROG(ack6_exit__fexit)
{
	handshake_exit(ctx, FUNCTION_ACK6);
	return 0;
}

SEC("kretprobe/tcp_v6_syn_recv_sock")
int ack6_exit__kretprobe(void *ctx)
{
	handshake_exit(ctx, FUNCTION_ACK6);
	return 0;
}

OPTIONAL("accepts per second and the time of the last one")
SEC("fexit/inet_csk_accept")
int FUNCTION_PROG(accept__fexit)
{
	accepted_from((struct sock *)CTX_SLOT(ctx, 0), ACCEPTED_CHILD(ctx));
	return 0;
}

SEC("tp_btf/sys_exit")
int TRACEPOINT_PROG_IF(fd >= 0 && syscall_is_accept(regs), accept__syscall, struct pt_regs *regs, long fd)
{
	struct sock *child = tcp_sock_of_fd(fd);

	if (child)
		accepted_from(tcp_sock_of_fd(syscall_descriptor(regs)), child);
	return 0;
}

static __always_inline bool of_listener(int old_state, int new_state)
{
	return new_state == STATE_LISTEN || (old_state == STATE_LISTEN && new_state == STATE_CLOSE);
}

static __noinline int state_changed(struct sock *sk, int old_state, int new_state)
{
	struct connection *connection;
	__u64 key = (__u64)sk;

	/* The activity of an earlier socket at this address: one CPU handled a packet while another destroyed the socket. */
	if (new_state == STATE_LISTEN)
		bpf_map_delete_elem(&activities, &key);
	connection = connection_transition(sk, old_state, new_state);
	if (connection && new_state == STATE_LISTEN)
		connection->opened_ns = bpf_ktime_get_ns();
	if (by_tracepoints() && new_state == STATE_LISTEN)
		listening_begin(sk);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(of_listener(old_state, new_state), state, struct sock *sk, int old_state, int new_state)
{
	if (sk->sk_protocol == IPPROTO_TCP) {
		COOKIE_OF(sk);
		state_changed(sk, old_state, new_state);
	}
	return 0;
}

AGAIN
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG_IF(of_listener(old_state, new_state), state_again, struct sock *sk, int old_state, int new_state)
{
	if (sk->sk_protocol == IPPROTO_TCP && was_skipped(sk, new_state, new_state == STATE_LISTEN)) {
		COOKIE_OF(sk);
		state_changed(sk, old_state, new_state);
	}
	return 0;
}

/* 1 if there was an entry to delete. */
static __noinline int destroyed(struct sock *sk)
{
	__u64 key = (__u64)sk;
	bool was_active = table_take(&activities, &key);
	bool listened = by_tracepoints() && listening_end(sk);

	return table_take(&connections, &key) || was_active || listened;
}

#include "destroy.bpf.h"

static __always_inline void listener_seed(struct bpf_iter__task_file *ctx, struct task_struct *task, struct file *file)
{
	struct sock *sk = tcp_sock_of_file(file);

	if (!sk || BPF_CORE_READ(sk, __sk_common.skc_state) != STATE_LISTEN)
		return;
	connection_seed(task, file, STATE_LISTEN);
	cookie_give(file, STATE_LISTEN);
	holder_write(ctx->meta->seq, task, sk, ctx->fd);
}

/*
 * Seeds the listeners that are older than the tool, and writes a record for each process that holds a listener, in all
 * network namespaces.
 */
ROLE("seeds")
SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (task && file)
		listener_seed(ctx, task, file);
	return walk_on(ctx);
}

#include "refused.bpf.h"

static __noinline int thrown_away(void *ctx, struct sk_buff *skb, struct sock *listener)
{
	struct net *net = BPF_CORE_READ(listener, __sk_common.skc_net.net);
	struct look grown = {};
	struct in_hand *packet;
	__u32 zero = 0;

	listening_explain(listener);
	if (!look_again(net, true, &grown) || !grown.mib.drops)
		return 0;
	packet = bpf_map_lookup_elem(&in_hand, &zero);
	if (!packet)
		return 0;
	count_missed(grown.mib.drops);
	packet->sk = listener;
	packet->skb = skb;
	packet->req = NULL;
	packet->reset = grown.resets;
	packet->fast_open = packet->unnamed = false;
	return refusal(ctx, skb, STEP_ACK, cause_of(&grown.mib, STEP_ACK, listener));
}

/*
 * The listener of a packet that is thrown away, NULL if it has none. From the context by address: before 6.13 the verifier
 * takes the argument for a pointer that is never NULL, and would remove the test.
 */
static __always_inline struct sock *listener_of(unsigned long long *ctx)
{
	struct sock *sk = NULL;

	bpf_probe_read_kernel(&sk, sizeof(sk), &ctx[RX_SK]);
	if (!sk || BPF_CORE_READ(sk, __sk_common.skc_state) != STATE_LISTEN)
		return NULL;
	return BPF_CORE_READ(sk, sk_protocol) == IPPROTO_TCP ? sk : NULL;
}

HAS_RX_SK
SEC("tp_btf/kfree_skb")
int TRACEPOINT_PROG(ack4_exit__free, struct sk_buff *skb)
{
	struct sock *listener = listener_of(ctx);

	return listener ? thrown_away(ctx, skb, listener) : 0;
}

AGAIN
UNLESS_FUNCTIONS
HAS_RX_SK
SEC("tp_btf/kfree_skb")
int TRACEPOINT_PROG(ack4_exit_again__free, struct sk_buff *skb)
{
	struct sock *listener = listener_of(ctx);

	return listener ? thrown_away(ctx, skb, listener) : 0;
}

/* Writes every listener of the table into `found`. */
FOR_EACH_CONNECTION(look, look_entry)
