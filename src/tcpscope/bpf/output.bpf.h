/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * How events leave the kernel, and the loss contract: seen = submitted + filtered + limited + lost.
 *
 * One object has one ring and one event struct. The tags below describe the struct's fields; user space reads them from
 * the object's own BTF. The ring wakes its reader when a quarter is full. Otherwise the reader looks at a timer, so no
 * event pays for a wake-up.
 */
#ifndef TCPSCOPE_OUTPUT_BPF_H
#define TCPSCOPE_OUTPUT_BPF_H

SEC("license")
char LICENSE[] = "Dual BSD/GPL";

#define UNIT(text) __attribute__((btf_decl_tag("unit:" text)))
#define TITLE(text) __attribute__((btf_decl_tag("title:" text))) /* heading of the column, if not the field's name */
#define WIDTH(number)                                                                                                 \
	__attribute__((btf_decl_tag("width:" #number))) /* of the column, if most values are shorter than the type */
#define DOC(text) __attribute__((btf_decl_tag("doc:" text)))
/* address, comm, time, stack, errno, function, tcp_flags */
#define KIND(text) __attribute__((btf_decl_tag("kind:" text)))
/* An enum of the running kernel names the value; `prefix` is left out. A value without a name is shown as a number. */
#define NAMED_BY(enum, prefix) __attribute__((btf_decl_tag("named_by:" enum " " prefix)))
/* After NAMED_BY: the upper half of a value is a subsystem, whose numbers have no names; another enum names that. */
#define SUBSYSTEMS(enum, prefix) __attribute__((btf_decl_tag("subsystems:" enum " " prefix)))
/* After NAMED_BY: a further enum, which names some of the values whose upper half is a subsystem. */
#define AND_BY(enum, prefix) __attribute__((btf_decl_tag("and_by:" enum " " prefix)))
/* On a struct in a struct: of this field of it, zero means "not known" here. */
#define MAY_LACK(field) __attribute__((btf_decl_tag("may_lack:" field)))
/* After NAMED_BY: an enum of the object, whose enumerators name values that the kernel has no name for. DERIVED: stands before them. */
#define DERIVED_BY(enum) __attribute__((btf_decl_tag("derived_by:" enum)))
/* Behind COUNTED_BYTES: no column to group by. */
#define NOT_COUNTED __attribute__((btf_decl_tag("not_counted:")))
#define UNKNOWN_IS(text) __attribute__((btf_decl_tag("unknown:" text))) /* zero, or max: all bits set */

/*
 * On the first way of a hook: the probe works without the hook; the text says what it does not know then. "": only newer kernels
 * have it, and no tool promises what it tells.
 */
#define OPTIONAL(text) __attribute__((btf_decl_tag("optional:" text)))

/*
 * On the first way of a hook: when the loader attaches, runs or detaches it.
 *   seeds    an iterator, run as soon as `forgets` is attached and once more at the end of the start
 *   forgets  deletes entries: attached before any are made, detached after everything else
 *   delays   may hold back an event: detached before `flushes` runs
 *   flushes  an iterator, run at the end: emits what was held back; also while the run lasts, as long as a variable
 *            `holds` of the object is not 0
 */
#define ROLE(text) __attribute__((btf_decl_tag("role:" text)))

/* On the first way of a hook: the loader omits the hook if one of these programs is attached. */
#define UNLESS(programs) __attribute__((btf_decl_tag("unless:" programs)))

/* On a way of a hook: the function must have at least so many arguments. Some kernels have fewer. */
#define ARGUMENTS(count) __attribute__((btf_decl_tag("arguments:" #count)))

/* On a way of a hook: it needs this enumerator of the kernel, such as the number of a helper, or this function. */
#define NEEDS(name) __attribute__((btf_decl_tag("needs:" name)))

/* On a way of a hook: the function is in this module, unless it is built in. All programs of an object name the same one. */
#define IN_MODULE(name) __attribute__((btf_decl_tag("module:" name)))

/* On the second copy of a program: recursion.bpf.h. */
#define AGAIN __attribute__((btf_decl_tag("again:")))

/* On an iterator over the entries of a map: which map. */
#define OVER_MAP(name) __attribute__((btf_decl_tag("map:" name)))

/* On a map: the object uses the map of another object, which a process loads once. */
#define SHARED(object) __attribute__((btf_decl_tag("shared:" object)))

/*
 * The size of a table with an entry for each socket. User space replaces it by the number of sockets that the machine may
 * come to have during the run. Where a tracing program must not allocate, the kernel allocates all entries at the start.
 */
#define PER_SOCKET 65536

#define CPU_SLOTS 128 /* power of two; more CPUs share slots, the counters are atomic */

struct counters {
	__u64 seen;       /* at the hook, before any filter */
	__u64 filtered;   /* not asked for */
	__u64 lost;       /* asked for, but the ring or an aggregate had no room */
	__u64 table_full; /* connections that found no place in a table: their later events lack owner and times */
	__u64 rescued;    /* handled by the second copy of a program, because the first was skipped: recursion.bpf.h */
	__u64 missed;     /* transitions that no program saw; several in a row count as one: missed.bpf.h */
	__u64 limited;    /* asked for, but more than --rate allows in this second */
} __attribute__((aligned(64)));

/* .bss is memory shared with user space: a reader needs no system call and no privilege. */
struct counters counters[CPU_SLOTS];

/* User space begins to detach the programs: from now on a transition may be unseen because of that. */
volatile bool ending;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} events SEC(".maps");

const volatile __u64 wakeup_bytes = 1 << 20; /* a power of two */

/* Atomic, because a softirq may interrupt the program and count on the same CPU. */
#define COUNT(what) COUNT_MANY(what, 1)
#define COUNT_MANY(what, number)                                                                   \
	__sync_fetch_and_add(&counters[bpf_get_smp_processor_id() & (CPU_SLOTS - 1)].what, number)

/* errno of the last insertion into a table of sockets that failed: E2BIG, the table is full; ENOMEM, the kernel had no memory. */
volatile __u32 table_error;

/* bpf_map_update_elem() of such a table. EEXIST is no failure: an interrupt was quicker. */
static __always_inline long table_put(void *table, const __u64 *key, const void *value, __u64 flags)
{
	long error = bpf_map_update_elem(table, key, value, flags);

	if (error && error != -EEXIST)
		table_error = -error;
	return error;
}

/* Deletes an entry, if there is one. Where most keys have none, to look first takes less: a deletion locks the bucket. */
static __always_inline bool table_take(void *table, const void *key)
{
	return bpf_map_lookup_elem(table, key) && !bpf_map_delete_elem(table, key);
}

/* Reserves room for one event of `size` bytes. NULL if the ring is full; that counts as lost. */
static __always_inline void *event_reserve(__u64 size)
{
	void *event = bpf_ringbuf_reserve(&events, size, 0);

	if (!event)
		COUNT(lost);
	return event;
}

/*
 * Submits a reserved event. Each time the ring has filled by another quarter, it wakes the reader. Two processors that submit at
 * once may both miss a quarter; the reader's timer makes up for that.
 */
static __always_inline void event_send(void *event, __u64 size)
{
	__u64 with = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	__u64 without = with - ((size + BPF_RINGBUF_HDR_SZ + 7) & ~7ULL);
	bool wake = (with ^ without) >= wakeup_bytes;

	bpf_ringbuf_submit(event, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

#endif
