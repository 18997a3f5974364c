/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * All differences between kernels but one: kernel/ways.py decides in user space which way of a hook is used.
 */
#ifndef TCPSCOPE_COMPAT_BPF_H
#define TCPSCOPE_COMPAT_BPF_H

#include "kernel.bpf.h"

/*
 * An argument or the return value of a traced function, at a constant offset in the context. The verifier requires a
 * constant offset. Without the asm, the compiler may join two such reads into one with a computed offset.
 */
#define CTX_SLOT(ctx, slot)                                                                       \
	({                                                                                        \
		__u64 value;                                                                      \
		asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(value) : "r"(ctx), "i"((slot) * 8)); \
		value;                                                                            \
	})

/*
 * "net: have do_accept() take a struct proto_accept_arg argument" (6.10) cut inet_csk_accept() from four arguments to
 * two; an fexit program finds the return value behind the arguments.
 */
#define ACCEPTED_CHILD(ctx)                                                                                    \
	((struct sock *)(bpf_core_type_exists(struct proto_accept_arg) ? CTX_SLOT(ctx, 2) : CTX_SLOT(ctx, 4)))

/*
 * "tcp: trace retransmit failures in tcp_retransmit_skb" (6.17) gave the tracepoint a third argument, and its own event
 * class. The argument is 0 or the error of an attempt that was not sent. Before 6.17 such attempts do not pass it.
 */
#define RETRANSMIT_ERROR(ctx)                                                                               \
	(bpf_core_field_exists(struct trace_event_raw_tcp_retransmit_skb, err) ? (int)CTX_SLOT(ctx, 2) : 0)

/*
 * Whether the retransmission timer, or another that takes its place, has run out. Between 6.12 and 6.16 the kernel dropped
 * icsk_timeout, its own note of when that is. In 6.19 the timer moved to struct sock.
 */
static __always_inline bool retransmit_timer_is_due(struct tcp_sock *tcp)
{
	struct sock *sk = (struct sock *)tcp;
	__u64 due;

	if (bpf_core_field_exists(struct inet_connection_sock, icsk_timeout))
		due = BPF_CORE_READ(tcp, inet_conn.icsk_timeout);
	else if (bpf_core_field_exists(struct inet_connection_sock, icsk_retransmit_timer))
		due = BPF_CORE_READ(tcp, inet_conn.icsk_retransmit_timer.expires);
	else
		due = BPF_CORE_READ(sk, tcp_retransmit_timer.expires);
	return (__s64)(bpf_jiffies64() - due) >= 0;
}

/*
 * "net: skb: introduce kfree_skb_reason()" (5.17) gave the tracepoint kfree_skb a reason; -1: there is none. "net: add rx_sk to
 * trace_kfree_skb" (6.11) gave it the socket that was to receive the packet; NULL: it is not known.
 */
#define DROP_REASON(ctx)                                                                                          \
	(bpf_core_field_exists(struct trace_event_raw_kfree_skb, reason) ? (__u32)CTX_SLOT(ctx, 2) : (__u32) - 1)
#define DROP_RECEIVER(ctx)                                                                                       \
	((struct sock *)(bpf_core_field_exists(struct trace_event_raw_kfree_skb, rx_sk) ? CTX_SLOT(ctx, 3) : 0))

/*
 * "bpf: Expose bpf_get_socket_cookie to tracing programs" (5.12). Before 5.12 a socket has a cookie only if somebody asked
 * for it (ss -e, SO_COOKIE). BPF_FUNC_check_mtu came in the same release, and the BTF has it.
 */
static __always_inline bool have_cookie_helper(void)
{
	return bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_check_mtu);
}

/*
 * A processor that sees a store after the barrier also sees all stores before it. x86 keeps stores in order, and loads too.
 * Elsewhere an atomic exchange does it: BPF's JITs make it a full barrier.
 */
#if defined(__TARGET_ARCH_x86)
#define memory_barrier() barrier()
#else
#define memory_barrier()                                     \
	({                                                   \
		__u64 nothing = 0;                           \
		(void)__sync_lock_test_and_set(&nothing, 1); \
		barrier();                                   \
	})
#endif

/*
 * "net: initialize net->net_cookie at netns setup" (5.12) made it a number that every namespace has. Before, it is an
 * atomic64_t, which CO-RE does not take for this field.
 */
static __always_inline __u64 net_cookie_of(struct sock *sk)
{
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);

	return bpf_core_field_exists(struct net, net_cookie) ? BPF_CORE_READ(net, net_cookie) : 0;
}

extern void bpf_preempt_disable(void) __ksym __weak; /* since 6.10 */
extern void bpf_preempt_enable(void) __ksym __weak;
extern void bpf_local_irq_save(unsigned long *flags) __ksym __weak; /* since 6.14 */
extern void bpf_local_irq_restore(unsigned long *flags) __ksym __weak;

/*
 * Before "tracing: Guard __DECLARE_TRACE() use of __DO_TRACE_CALL() with SRCU-fast" (7.0) no task is preempted within a
 * program of a tracepoint. The field came with it.
 */
static __always_inline bool tracepoints_are_preemptible(void)
{
	return bpf_core_field_exists(struct tp_transition_snapshot, srcu_gp);
}

/* Disables preemption until processor_release(). Before 6.10 a program cannot do that. */
static __always_inline void processor_keep(bool preemptible)
{
	if (preemptible && bpf_preempt_disable)
		bpf_preempt_disable();
}

/*
 * If the task's time slice is over, preempt_enable() preempts it, inside the program. With interrupts off it does not
 * (preempt_schedule() tests preemptible()), and the kernel preempts the task after the program. A task can still be
 * preempted in the few instructions at both ends. In 6.10 to 6.13 a program cannot turn interrupts off.
 */
static __always_inline void processor_release(bool preemptible)
{
	unsigned long flags;

	if (!preemptible || !bpf_preempt_disable)
		return;
	if (bpf_local_irq_save) {
		bpf_local_irq_save(&flags);
		bpf_preempt_enable();
		bpf_local_irq_restore(&flags);
	} else {
		bpf_preempt_enable();
	}
}

/*
 * BPF_PROG() of libbpf without preemption, for tracepoints (tp_btf) and for functions (fentry, fexit: preemptible where the
 * kernel's own code is). If a task is preempted inside a program, the kernel skips the program on that CPU, and other
 * programs see its half-written per-CPU data. _IF first evaluates `matters`, an expression of the arguments: most runs end
 * there.
 */
#define TRACEPOINT_PROG(name, args...) PROG_WITHOUT_PREEMPTION(tracepoints_are_preemptible(), true, name, ##args)
#define TRACEPOINT_PROG_IF(matters, name, args...)                                    \
	PROG_WITHOUT_PREEMPTION(tracepoints_are_preemptible(), matters, name, ##args)
#define FUNCTION_PROG(name, args...) PROG_WITHOUT_PREEMPTION(true, true, name, ##args)

#define POINTERS_FROM_INTEGERS _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wint-conversion\"")
#define POINTERS_FROM_INTEGERS_END _Pragma("GCC diagnostic pop")

#define PROG_WITHOUT_PREEMPTION(preemptible, matters, name, args...)                         \
	name(unsigned long long *ctx);                                                       \
	static __always_inline bool matters_##name(unsigned long long *ctx, ##args);         \
	static __always_inline typeof(name(0)) kept_##name(unsigned long long *ctx, ##args); \
	typeof(name(0)) name(unsigned long long *ctx)                                        \
	{                                                                                    \
		typeof(name(0)) result;                                                      \
                                                                                             \
		POINTERS_FROM_INTEGERS                                                       \
		if (!matters_##name(___bpf_ctx_cast(args)))                                  \
			return 0;                                                            \
		processor_keep(preemptible);                                                 \
		result = kept_##name(___bpf_ctx_cast(args));                                 \
		POINTERS_FROM_INTEGERS_END                                                   \
		processor_release(preemptible);                                              \
		return result;                                                               \
	}                                                                                    \
	static __always_inline bool matters_##name(unsigned long long *ctx, ##args)          \
	{                                                                                    \
		return matters;                                                              \
	}                                                                                    \
	static __always_inline typeof(name(0)) kept_##name(unsigned long long *ctx, ##args)

union unknown {
	__u64 whole;
	__u8 bytes[8];
};

/*
 * Hides a value from the verifier. The verifier forgets what it knows of a value on the stack when the program writes one byte of it.
 * Ways that led to different values are then one way. A pointer becomes a number. The highest byte of the result is 0.
 */
static __always_inline __u64 forgotten_in(volatile union unknown *slot, __u64 number)
{
	slot->whole = number;
	slot->bytes[7] = 0;
	return slot->whole;
}

static __always_inline __u64 forgotten(__u64 number)
{
	volatile union unknown slot;

	return forgotten_in(&slot, number);
}

/* The cookie, 0 if the kernel has not given it one yet. For a socket of which only the address is known. */
static __always_inline __u64 cookie_if_any(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
}

/* The cookie; the kernel gives one if there is none. For pointers that the verifier trusts: tp_btf, fentry, iterators. */
#define COOKIE_OF(sk) (have_cookie_helper() ? bpf_get_socket_cookie(sk) : cookie_if_any((struct sock *)(sk)))

/*
 * The system calls accept(), accept4(), connect() and bind() at their exit. A kernel with 32-bit calls has two tables of numbers:
 * 43 is accept() in one and times() in the other. The caller chooses the table for each call: on x86 any process may use
 * "int 0x80", the table of 32 bits.
 */
#if defined(__TARGET_ARCH_x86)
#define TS_COMPAT 2 /* arch/x86/include/asm/thread_info.h: in a 32-bit call, and until it has returned */

static __always_inline bool syscall_is_32bit(const struct pt_regs *regs)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();

	return BPF_CORE_READ(task, thread_info.status) & TS_COMPAT;
}

/* arch/x86/entry/syscalls/syscall_64.tbl, syscall_32.tbl; the calls of socketcall(): include/uapi/linux/net.h */
#define SYSCALL_NUMBER(regs) ((int)((const struct pt_regs___kernel *)(regs))->orig_ax)
#define SOCKETCALL_32 102
#define SOCKETCALL_CALL(regs) ((int)((const struct pt_regs___kernel *)(regs))->bx)
#define SOCKETCALL_BIND 2
#define SOCKETCALL_CONNECT 3
#define SOCKETCALL_ACCEPT 5
#define SOCKETCALL_ACCEPT4 18
#define ACCEPT_64 43
#define ACCEPT4_64 288
#define ACCEPT4_32 364
#define CONNECT_64 42
#define CONNECT_32 362
#define BIND_64 49
#define BIND_32 361

static __always_inline bool syscall_is_accept(const struct pt_regs *regs)
{
	switch (SYSCALL_NUMBER(regs)) {
	case ACCEPT_64:
	case ACCEPT4_64:
		return !syscall_is_32bit(regs);
	case ACCEPT4_32:
		return syscall_is_32bit(regs);
	case SOCKETCALL_32:
		return syscall_is_32bit(regs) &&
		       (SOCKETCALL_CALL(regs) == SOCKETCALL_ACCEPT || SOCKETCALL_CALL(regs) == SOCKETCALL_ACCEPT4);
	}
	return false;
}

static __always_inline bool syscall_is_connect(const struct pt_regs *regs)
{
	switch (SYSCALL_NUMBER(regs)) {
	case CONNECT_64:
		return !syscall_is_32bit(regs);
	case CONNECT_32:
		return syscall_is_32bit(regs);
	case SOCKETCALL_32:
		return syscall_is_32bit(regs) && SOCKETCALL_CALL(regs) == SOCKETCALL_CONNECT;
	}
	return false;
}

static __always_inline bool syscall_is_bind(const struct pt_regs *regs)
{
	switch (SYSCALL_NUMBER(regs)) {
	case BIND_64:
		return !syscall_is_32bit(regs);
	case BIND_32:
		return syscall_is_32bit(regs);
	case SOCKETCALL_32:
		return syscall_is_32bit(regs) && SOCKETCALL_CALL(regs) == SOCKETCALL_BIND;
	}
	return false;
}

/* The first three arguments. Those of socketcall() are in the process's memory. */
static __always_inline void syscall_arguments(const struct pt_regs *registers, __u64 arguments[3])
{
	const struct pt_regs___kernel *regs = (const struct pt_regs___kernel *)registers;
	__u32 narrow[3] = {regs->bx, regs->cx, regs->dx};

	if (!syscall_is_32bit(registers)) {
		arguments[0] = regs->di;
		arguments[1] = regs->si;
		arguments[2] = regs->dx;
		return;
	}
	if (SYSCALL_NUMBER(registers) == SOCKETCALL_32)
		bpf_probe_read_user(narrow, sizeof(narrow), (void *)(__u64)narrow[1]);
	for (int i = 0; i < 3; i++)
		arguments[i] = narrow[i];
}
#elif defined(__TARGET_ARCH_arm64)
#define PSR_MODE32_BIT 0x10 /* arch/arm64/include/uapi/asm/ptrace.h */

/* include/uapi/asm-generic/unistd.h, arch/arm/tools/syscall.tbl */
static __always_inline bool syscall_is(const struct pt_regs *regs, int number_64, int number_32)
{
	const struct pt_regs___kernel *registers = (const struct pt_regs___kernel *)regs;

	return registers->syscallno == (registers->pstate & PSR_MODE32_BIT ? number_32 : number_64);
}

static __always_inline bool syscall_is_accept(const struct pt_regs *regs)
{
	return syscall_is(regs, 202, 285) || syscall_is(regs, 242, 366);
}

static __always_inline bool syscall_is_connect(const struct pt_regs *regs)
{
	return syscall_is(regs, 203, 283);
}

static __always_inline bool syscall_is_bind(const struct pt_regs *regs)
{
	return syscall_is(regs, 200, 282);
}

static __always_inline void syscall_arguments(const struct pt_regs *registers, __u64 arguments[3])
{
	const struct pt_regs___kernel *regs = (const struct pt_regs___kernel *)registers;

	arguments[0] = regs->orig_x0;
	arguments[1] = regs->regs[1];
	arguments[2] = regs->regs[2];
}
#endif

static __always_inline __u32 syscall_descriptor(const struct pt_regs *regs)
{
	__u64 arguments[3];

	syscall_arguments(regs, arguments);
	return arguments[0];
}

/*
 * Before "mptcp: avoid additional __inet_stream_connect() call" (6.6) the function calls itself: for the MPTCP socket, and
 * inside that for the first subflow. "mptcp: get rid of msk->subflow" came in the same release.
 */
static __always_inline bool subflow_is_connected_apart(struct socket *socket)
{
	return bpf_core_field_exists(struct mptcp_sock, subflow) &&
	       BPF_CORE_READ(socket, sk, sk_protocol) == IPPROTO_MPTCP;
}

/*
 * The first and, in the upper half, the last port that the namespace gives to connect() and bind(). In 6.8 one number took the
 * place of an array.
 */
static __always_inline __u32 local_ports_of(struct net *net)
{
	struct local_ports___pair *pair;
	int range[2] = {};

	if (bpf_core_field_exists(struct local_ports, range))
		return BPF_CORE_READ(net, ipv4.ip_local_ports.range);
	pair = (void *)__builtin_preserve_access_index(&net->ipv4.ip_local_ports);
	bpf_probe_read_kernel(range, sizeof(range), __builtin_preserve_access_index(&pair->range));
	return range[0] | range[1] << 16;
}

/* IP_LOCAL_PORT_RANGE of a socket (6.3), in the same form; 0: it has none, or the kernel has no such option. */
static __always_inline __u32 own_ports_of(struct sock *sk)
{
	struct inet_sock___pair *pair = (struct inet_sock___pair *)sk;
	struct inet_sock *inet = (struct inet_sock *)sk;
	__u32 range = 0;

	if (bpf_core_field_exists(struct inet_sock, local_port_range))
		return BPF_CORE_READ(inet, local_port_range);
	if (bpf_core_field_exists(struct inet_sock___pair, local_port_range))
		bpf_core_read(&range, sizeof(range), &pair->local_port_range);
	return range;
}

/* The sysctl ip_local_port_step_width (7.1); -1: the kernel has none. */
static __always_inline __u32 port_step_of(struct net *net)
{
	if (!bpf_core_field_exists(struct netns_ipv4, sysctl_ip_local_port_step_width))
		return -1;
	return BPF_CORE_READ(net, ipv4.sysctl_ip_local_port_step_width);
}

/* Reads a small integer field whose width differs between kernels, by address. */
#define READ_ANY_WIDTH(pointer, field) BPF_CORE_READ_BITFIELD_PROBED(pointer, field)

#endif
