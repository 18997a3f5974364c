/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * An aggregate: programs add up values by key, and no event leaves the kernel. aggregate.py reads it meanwhile.
 *
 * It has two maps. Programs fill one while `epoch` is even, the other while it is odd. User space raises the epoch, waits
 * until no program runs that may have read the old one, and empties the map that programs no longer fill.
 */
#ifndef TCPSCOPE_AGGREGATE_BPF_H
#define TCPSCOPE_AGGREGATE_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"

#define SHARDS 16 /* a power of two */

__u32 epoch;

/* The smallest and the largest value, by processor: BPF in 5.10 has no compare-and-exchange. */
struct extremes {
	__u32 max[SHARDS];
	__u32 min[SHARDS]; /* the value plus one, of the largest the value; 0: none */
};

static __always_inline __attribute__((unused)) void extremes_add(struct extremes *extremes, __u32 value)
{
	__u32 shard = bpf_get_smp_processor_id() & (SHARDS - 1), marked = value + 1 ?: value;

	if (value > extremes->max[shard])
		extremes->max[shard] = value;
	if (!extremes->min[shard] || marked < extremes->min[shard])
		extremes->min[shard] = marked;
}

static __always_inline void *aggregate_find_or_add(void *map, const void *key, const void *new_value)
{
	void *value = bpf_map_lookup_elem(map, key);

	if (value)
		return value;
	bpf_map_update_elem(map, key, new_value, BPF_NOEXIST);
	return bpf_map_lookup_elem(map, key);
}

/*
 * Defines the aggregate `name`: a struct `value_type` for each of at most `entries` struct `key_type`. `name`_at(key)
 * returns the value of a key; a new one is zero. If there is no room, it returns NULL and counts one lost. A program calls
 * it once for each sample. Several processors add to one value at the same time.
 */
#define AGGREGATE(name, key_type, value_type, entries)                                                        \
	const struct key_type *name##_key_anchor __attribute__((unused));                                     \
	const struct value_type *name##_value_anchor __attribute__((unused));                                 \
	struct name##_map {                                                                                   \
		__uint(type, BPF_MAP_TYPE_HASH);                                                              \
		__uint(max_entries, entries);                                                                 \
		__uint(key_size, sizeof(struct key_type));                                                    \
		__uint(value_size, sizeof(struct value_type));                                                \
	} name##_even SEC(".maps")                                                                            \
	, name##_odd SEC(".maps");                                                                            \
	static const struct value_type name##_new;                                                            \
	static __always_inline struct value_type *name##_at(const struct key_type *key)                       \
	{                                                                                                     \
		struct value_type *value = epoch & 1 ? aggregate_find_or_add(&name##_odd, key, &name##_new)   \
						     : aggregate_find_or_add(&name##_even, key, &name##_new); \
                                                                                                              \
		if (!value)                                                                                   \
			COUNT(lost);                                                                          \
		return value;                                                                                 \
	}

#endif
