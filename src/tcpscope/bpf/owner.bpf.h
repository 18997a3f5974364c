/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* The owner of a socket: the process of a task. */
#ifndef TCPSCOPE_OWNER_BPF_H
#define TCPSCOPE_OWNER_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "filter.bpf.h"
#include "identity.bpf.h"

/* Is the task in a cgroup of the filter, or in one below it? Walks upwards, at most 32 levels. */
static __always_inline bool below_filter_cgroup(struct task_struct *task)
{
	struct cgroup *cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);

	for (int level = 0; level < 32 && cgroup; level++) {
		struct cgroup_subsys_state *parent;

		if (wanted_cgroup(BPF_CORE_READ(cgroup, kn, id)))
			return true;
		parent = BPF_CORE_READ(cgroup, self.parent);
		if (!parent)
			break;
		cgroup = BPF_CORE_READ(parent, cgroup);
	}
	return false;
}

#define PID_LEVELS 33 /* MAX_PID_NS_LEVEL, include/linux/pid_namespace.h, and the first namespace */

/* Does the filter want the PID that the task's process has in the filter's PID namespace? */
static __always_inline bool has_filter_pid(struct task_struct *task)
{
	struct pid *pid = BPF_CORE_READ(task, group_leader, thread_pid);
	char *numbers = (char *)__builtin_preserve_access_index(&pid->numbers);
	unsigned int level = BPF_CORE_READ(pid, level);

	for (unsigned int at = 1; at < PID_LEVELS && at <= level; at++) {
		struct upid *number = (struct upid *)(numbers + at * bpf_core_type_size(struct upid));

		if (BPF_CORE_READ(number, ns, ns.inum) == filter.pid_namespace)
			return wanted_pid(BPF_CORE_READ(number, nr));
	}
	return false;
}

/* What only a filter asks for. */
static __always_inline void owner_for_filter(struct task_struct *task, struct owner *owner)
{
	if (filter.cgroup_count)
		owner->in_cgroup = below_filter_cgroup(task);
	if (filter.pid_namespace)
		owner->has_filter_pid = has_filter_pid(task);
}

/* The name is the process's, as ps and ss show it, not that of one of its threads. */
static __always_inline void owner_name(struct task_struct *task, struct owner *owner)
{
	/* Up to the NUL: before 5.17 the bytes after it belong to an older name. */
	__builtin_memset(owner->comm, 0, sizeof(owner->comm));
	BPF_CORE_READ_STR_INTO(&owner->comm, task, group_leader, comm);
}

/* When the task's process was started. */
static __always_inline __u64 started_ns(struct task_struct *task)
{
	return BPF_CORE_READ(task, group_leader, start_time);
}

static __noinline __attribute__((unused)) int owner_of_task(struct task_struct *task, struct owner *owner)
{
	owner->pid = BPF_CORE_READ(task, tgid);
	owner->uid = BPF_CORE_READ(task, cred, uid.val);
	owner->cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	owner_name(task, owner);
	owner_for_filter(task, owner);
	return 0;
}

/* The same for the current task. The helpers take a third of the time. */
static __noinline __attribute__((unused)) int owner_of_current(struct owner *owner)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u64 process_and_thread = bpf_get_current_pid_tgid();

	owner->pid = process_and_thread >> 32;
	owner->uid = bpf_get_current_uid_gid();
	owner->cgroup = bpf_get_current_cgroup_id();
	if ((__u32)process_and_thread == owner->pid)
		bpf_get_current_comm(owner->comm, sizeof(owner->comm));
	else
		owner_name(task, owner);
	owner_for_filter(task, owner);
	return 0;
}

#endif
