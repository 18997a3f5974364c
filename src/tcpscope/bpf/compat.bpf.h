/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * What differs between kernels, in one place. The newest kernel is the straight path.
 * Which of several hooks is used is not decided here but by user space: see kernel/loaded.py.
 */
#ifndef TCPSCOPE_COMPAT_BPF_H
#define TCPSCOPE_COMPAT_BPF_H

#include "kernel.bpf.h"

/*
 * An argument or the return value of a traced function, at a constant place of the context. The verifier wants the
 * offset in the instruction; without the asm the compiler joins two such reads into one with a computed offset.
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
 * "tcp: trace retransmit failures in tcp_retransmit_skb" (6.17) gave the tracepoint a third argument and an event class of
 * its own: 0, or why the attempt was not sent. Before, it is passed only when something was sent.
 */
#define RETRANSMIT_ERROR(ctx)                                                                               \
	(bpf_core_field_exists(struct trace_event_raw_tcp_retransmit_skb, err) ? (int)CTX_SLOT(ctx, 2) : 0)

/*
 * "bpf: Expose bpf_get_socket_cookie to tracing programs" (5.12). Below, the cookie is there only if somebody asked
 * for it before (ss -e, SO_COOKIE). BPF_FUNC_check_mtu came in the same release and can be seen in the BTF.
 */
static __always_inline bool have_cookie_helper(void)
{
	return bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_check_mtu);
}

/*
 * What is written before it is seen by whoever sees what is written after it, on any processor. x86 keeps the order of
 * stores and that of loads by itself. Elsewhere an exchange does it, which BPF's JITs make a full barrier.
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

/* From here to `processor_release` the task is not preempted. Before 6.10 a program cannot ask for that. */
static __always_inline void processor_keep(bool preemptible)
{
	if (preemptible && bpf_preempt_disable)
		bpf_preempt_disable();
}

/*
 * preempt_enable() preempts a task whose time slice is over, still within the program. With interrupts off it does not
 * (preempt_schedule() asks preemptible()): the kernel preempts the task after the program. A task can still be preempted in
 * the few instructions at both ends. Kernels 6.10 to 6.13 have no call to turn interrupts off.
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
 * kernel's own code is). A task that is preempted within a program makes the kernel skip the program on that CPU, and
 * shares what the program writes there. With _IF `matters`, of the arguments, is asked before: most runs end with that.
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

/* The cookie as it stands, 0 if the kernel has not given one yet. For sockets that are only known by address. */
static __always_inline __u64 cookie_if_any(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
}

/* The cookie, given now if need be. For sockets that the verifier knows as such: tp_btf, fentry, iterators. */
#define COOKIE_OF(sk) (have_cookie_helper() ? bpf_get_socket_cookie(sk) : cookie_if_any((struct sock *)(sk)))

/* Numbers of accept, accept4 and connect: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h. */
#if defined(__TARGET_ARCH_x86)
#define SYSCALL_NUMBER(regs) ((int)((struct pt_regs___kernel *)(regs))->orig_ax)
#define SYSCALL_IS_ACCEPT(regs) (SYSCALL_NUMBER(regs) == 43 || SYSCALL_NUMBER(regs) == 288)
#define SYSCALL_IS_CONNECT(regs) (SYSCALL_NUMBER(regs) == 42)
#define SYSCALL_ARGUMENT_1(regs) (((struct pt_regs___kernel *)(regs))->di)
#define SYSCALL_ARGUMENT_2(regs) (((struct pt_regs___kernel *)(regs))->si)
#define SYSCALL_ARGUMENT_3(regs) (((struct pt_regs___kernel *)(regs))->dx)
#elif defined(__TARGET_ARCH_arm64)
#define SYSCALL_ARGUMENT_1(regs) (((struct pt_regs___kernel *)(regs))->orig_x0)
#define SYSCALL_NUMBER(regs) (((struct pt_regs___kernel *)(regs))->syscallno)
#define SYSCALL_IS_ACCEPT(regs) (SYSCALL_NUMBER(regs) == 202 || SYSCALL_NUMBER(regs) == 242)
#define SYSCALL_IS_CONNECT(regs) (SYSCALL_NUMBER(regs) == 203)
#define SYSCALL_ARGUMENT_2(regs) (((struct pt_regs___kernel *)(regs))->regs[1])
#define SYSCALL_ARGUMENT_3(regs) (((struct pt_regs___kernel *)(regs))->regs[2])
#endif

/*
 * "mptcp: avoid additional __inet_stream_connect() call" (6.6) and "mptcp: get rid of msk->subflow" came together. Before,
 * the first subflow is connected as a socket of its own, by the same function within that of the MPTCP socket.
 */
static __always_inline bool subflow_is_connected_apart(struct socket *socket)
{
	return bpf_core_field_exists(struct mptcp_sock, subflow) &&
	       BPF_CORE_READ(socket, sk, sk_protocol) == IPPROTO_MPTCP;
}

/* Value of a small integer field whose width differs between kernels, read by address. */
#define READ_ANY_WIDTH(pointer, field) BPF_CORE_READ_BITFIELD_PROBED(pointer, field)

#endif
