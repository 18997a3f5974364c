// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* Adds up the lengths that a test gives to lseek(), by the network that it names there: all that an aggregate takes. */
#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "aggregate.bpf.h"

#define NO_FILE -4242 /* what these calls have in place of a file descriptor */

struct network_key {
	__u32 network;
};

struct traffic {
	__u64 packets;
	__u64 bytes;
	struct extremes extremes;
};

AGGREGATE(traffics, network_key, traffic, 256)

SEC("tp_btf/sys_enter")
int TRACEPOINT_PROG_IF((int)syscall_descriptor(regs) == NO_FILE, entered, struct pt_regs *regs)
{
	struct network_key key = {};
	struct traffic *traffic;
	__u64 arguments[3], bytes;

	syscall_arguments(regs, arguments);
	bytes = arguments[1];
	key.network = arguments[2];
	COUNT(seen);
	traffic = traffics_at(&key);
	if (!traffic)
		return 0;
	__sync_fetch_and_add(&traffic->packets, 1);
	__sync_fetch_and_add(&traffic->bytes, bytes);
	extremes_add(&traffic->extremes, bytes);
	return 0;
}
