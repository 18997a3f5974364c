// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* In which tasks this kernel runs programs: of those that a softirq has interrupted. */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#define TASKS (1 << 22) /* more numbers no kernel gives */

unsigned char ran[TASKS];

SEC("tp_btf/softirq_entry")
int entered(void *ctx)
{
	ran[(__u32)bpf_get_current_pid_tgid() & (TASKS - 1)] = 1;
	return 0;
}

SEC("license")
char LICENSE[] = "Dual BSD/GPL";
