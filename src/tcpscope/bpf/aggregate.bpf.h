/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * An aggregate: what programs add up by key, so that no event leaves the kernel. aggregate.py takes it while they go on.
 *
 * It has two maps. An even `epoch` fills one, an odd one the other. User space raises the epoch, waits until no program runs
 * any more that may have read the old one, and empties the map that is not filled.
 */
#ifndef TCPSCOPE_AGGREGATE_BPF_H
#define TCPSCOPE_AGGREGATE_BPF_H

#include "kernel.bpf.h"
#include "output.bpf.h"

#define SHARDS 16 /* a power of two */

__u32 epoch;

/* The least and the greatest value, by processor: 5.10 has no compare-and-exchange. */
struct extremes {
	__u32 max[SHARDS];
	__u32 min[SHARDS]; /* stored plus one; 0: there was none */
};

static __always_inline __attribute__((unused)) void extremes_add(struct extremes *extremes, __u32 value)
{
	__u32 shard = bpf_get_smp_processor_id() & (SHARDS - 1);

	if (value > extremes->max[shard])
		extremes->max[shard] = value;
	if (!extremes->min[shard] || value + 1 < extremes->min[shard])
		extremes->min[shard] = value + 1;
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
 * The aggregate `name` of struct `value_type` by struct `key_type`, of so many keys. `name`_at(key) is the place of a key
 * to be added to, new ones being zero, or NULL where there is no room: what was to be added is lost, and counted. A program
 * calls it once for each thing that it adds. Different processors add to the same place at the same time.
 */
#define AGGREGATE(name, key_type, value_type, entries)                                                        \
	const struct key_type *name##_key_anchor __attribute__((unused));                                     \
	const struct value_type *name##_value_anchor __attribute__((unused));                                 \
	struct name##_map {                                                                                   \
		__uint(type, BPF_MAP_TYPE_HASH);                                                              \
		__uint(max_entries, entries);                                                                 \
		__type(key, struct key_type);                                                                 \
		__type(value, struct value_type);                                                             \
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
