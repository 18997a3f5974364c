/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* How many CPUs there are, and where one CPU's copy of the kernel's per-CPU data is. */
#ifndef TCPSCOPE_PROCESSOR_BPF_H
#define TCPSCOPE_PROCESSOR_BPF_H

#include "kernel.bpf.h"

/*
 * User space sets it before loading, and the verifier walks through as many turns of the loop. 0: the mask of possible CPUs
 * has gaps, which x86 never makes (prefill_possible_map(), topology_init_possible_cpus()). For a CPU in a gap the look-up
 * returns something that is no copy of a CPU. So the counters cannot be read there.
 */
const volatile __u32 possible_cpus;

/*
 * The offset from a per-CPU pointer to the copy of one CPU: the CPU of this element of a per-CPU array of ours. The BTF of 5.10
 * lacks the kernel's variable for it, and its address in kallsyms needs CAP_SYSLOG. But our array holds a per-CPU pointer, and
 * a look-up returns the CPU's copy: the difference is the same offset. The code reads the pointers back from the stack, so
 * that the verifier takes them as numbers.
 */
static __always_inline __u64 cpu_offset(void *array, void *element)
{
	void *copy = element;
	__u64 array_address = 0, copy_address = 0, base = 0;

	bpf_probe_read_kernel(&array_address, sizeof(array_address), &array);
	bpf_probe_read_kernel(&copy_address, sizeof(copy_address), &copy);
	bpf_probe_read_kernel(&base, sizeof(base),
			      (void *)(array_address + bpf_core_field_offset(struct bpf_array, pptrs)));
	return copy_address - base;
}

#endif
