/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * How events leave the kernel, and the loss contract: seen = submitted + filtered + lost.
 *
 * One object has one ring and one event struct; its fields describe themselves by the tags below, which user space
 * reads from the object's own BTF. The ring wakes its reader when a quarter is full; below that the reader's timer is
 * enough, and no event pays for a wake-up.
 */
#ifndef TCPSCOPE_OUTPUT_BPF_H
#define TCPSCOPE_OUTPUT_BPF_H

SEC("license")
char LICENSE[] = "Dual BSD/GPL";

#define UNIT(text) __attribute__((btf_decl_tag("unit:" text)))
#define TITLE(text) __attribute__((btf_decl_tag("title:" text))) /* above the column of a table, if not the name */
#define WIDTH(number)                                                                                         \
	__attribute__((btf_decl_tag("width:" #number))) /* of that column, where values are mostly shorter */
#define DOC(text) __attribute__((btf_decl_tag("doc:" text)))
#define KIND(text) __attribute__((btf_decl_tag("kind:" text)))          /* address, comm, time, stack, errno */
#define UNKNOWN_IS(text) __attribute__((btf_decl_tag("unknown:" text))) /* zero, or max: all bits set */

/* On the first way of a hook: the probe works without it, and the text says what is then not known. */
#define OPTIONAL(text) __attribute__((btf_decl_tag("optional:" text)))

/*
 * On the first way of a hook: when the loader attaches, runs or detaches it.
 *   seeds    an iterator, run as soon as `forgets` is attached and once more at the end of the start
 *   forgets  deletes entries: attached before any are made, detached after everything else
 *   delays   may hold back an event: detached before `flushes` runs
 *   flushes  an iterator, run at the end: emits what was held back
 */
#define ROLE(text) __attribute__((btf_decl_tag("role:" text)))

/* On the first way of a hook: it is not needed where one of these programs is attached. */
#define UNLESS(programs) __attribute__((btf_decl_tag("unless:" programs)))

/* How many arguments the hooked function must have at the least, where some kernels have fewer. */
#define ARGUMENTS(count) __attribute__((btf_decl_tag("arguments:" #count)))

/* On a way of a hook: an enumerator of the kernel's, such as a helper's number, without which it has no chance. */
#define NEEDS(enumerator) __attribute__((btf_decl_tag("needs:" enumerator)))

/* On the second copy of a program. */
#define AGAIN __attribute__((btf_decl_tag("again:")))

/* On an iterator over the entries of a map: which map. */
#define OVER_MAP(name) __attribute__((btf_decl_tag("map:" name)))

/* On a map: it is that of another object, which is loaded once in a process. */
#define SHARED(object) __attribute__((btf_decl_tag("shared:" object)))

/*
 * Of a table with an entry for each socket. User space puts in the place of this as many as the machine may come to have
 * while the tool runs, and has room made for all of them at once where tracing programs had better not allocate.
 */
#define PER_SOCKET 65536

#define CPU_SLOTS 128 /* power of two; CPUs beyond share slots, the counters are atomic */

struct counters {
	__u64 seen;       /* at the hook, before any filter */
	__u64 filtered;   /* not asked for */
	__u64 lost;       /* asked for, and the ring or an aggregate had no room */
	__u64 table_full; /* connections without a place in a table: their later events lack owner and times */
	__u64 rescued;    /* handled by the second copy of a program, as the first was skipped: recursion.bpf.h */
	__u64 missed;     /* transitions of a connection, one or several in a row, that no program saw: missed.bpf.h */
} __attribute__((aligned(64)));

/* A .bss map is memory shared with user space: reading the counters takes no system call and no privilege. */
struct counters counters[CPU_SLOTS];

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} events SEC(".maps");

const volatile __u64 wakeup_bytes = 1 << 20; /* a power of two */

/* Atomic, because a program may be interrupted by a softirq that counts on the same CPU. */
#define COUNT(what) __sync_fetch_and_add(&counters[bpf_get_smp_processor_id() & (CPU_SLOTS - 1)].what, 1)

/* Room for one event of `size` bytes, or NULL, counted. */
static __always_inline void *event_reserve(__u64 size)
{
	void *event = bpf_ringbuf_reserve(&events, size, 0);

	if (!event)
		COUNT(lost);
	return event;
}

/*
 * Wakes the reader when this event has filled a quarter of the ring, not with each one after that. Two processors that
 * submit at once may both miss a border; there are the next ones, and the reader's timer.
 */
#define event_submit(event) (event_submit_sized(event, sizeof(*(event))), 0)

static __always_inline void event_submit_sized(void *event, __u64 size)
{
	__u64 with = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	__u64 without = with - ((size + BPF_RINGBUF_HDR_SZ + 7) & ~7ULL);
	bool wake = (with ^ without) >= wakeup_bytes;

	bpf_ringbuf_submit(event, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

#endif
