/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * With "bpf: Prevent bpf program recursion for raw tracepoint probes" (6.1) the kernel does not start a program on a CPU
 * where it runs already: a softirq that interrupts it and passes the same tracepoint is left out. So such a program is
 * attached twice. The first one notes each event that it takes; the second, which the tracepoint calls after it, takes
 * those that it does not find noted. That is exact for one interruption, and there are not more: softirqs do not nest.
 * Where two runs for one event do what one does, no note is needed: the end of a socket, a look at a segment.
 *
 * Processes do not nest either, as long as none loses the processor within the programs. Before 7.0 none does. Since then
 * one may, in a few instructions of each copy (processor_release). If both copies are held so, or one is and a softirq
 * interrupts the other, an event is lost: a gap, where states are followed.
 *
 * Only the first makes notes and only the second wipes them. A note stays when the second was left out, until the next
 * change of its socket: each has one note, and no change of state comes twice without another between. What is left
 * at a socket's end goes with it, or, where each processor has its own notes, is in time replaced. More sockets than
 * there are places, in one interruption of the second, would take the note from it that it looks for: its event would come
 * twice.
 */
#ifndef TCPSCOPE_ONCE_BPF_H
#define TCPSCOPE_ONCE_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"

#define NOTES 8

struct note {
	__u64 sk; /* 0: free */
	__u64 what;
};

struct notes {
	struct note note[NOTES];
	__u64 next; /* to be given up when none is free: its second program was left out */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct notes);
} noted SEC(".maps");

/* The same where the second program may run on another processor, which costs more: socket -> what. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u64);
} noted_anywhere SEC(".maps");

static __always_inline struct note *note_of(struct notes *notes, __u64 sk)
{
#pragma unroll
	for (int i = 0; i < NOTES; i++)
		if (notes->note[i].sk == sk)
			return &notes->note[i];
	return NULL;
}

/* For the first of the two programs: something has happened at a socket, `what` in a word. */
static __always_inline void once_note(struct sock *sk, __u64 what)
{
	__u64 key = (__u64)sk;
	__u32 zero = 0;
	struct notes *notes;
	struct note *note;

	if (tracepoints_are_preemptible()) {
		if (bpf_map_update_elem(&noted_anywhere, &key, &what, BPF_ANY))
			COUNT(table_full);
		return;
	}
	notes = bpf_map_lookup_elem(&noted, &zero);
	if (!notes)
		return;
	note = note_of(notes, key);
	if (!note)
		note = note_of(notes, 0);
	if (!note)
		note = &notes->note[notes->next++ % NOTES];
	/* Taken first: whatever interrupts this then, with a note of its own to make, looks for another place. */
	note->sk = key;
	barrier();
	note->what = what;
}

/* For the second: was the first one left out? */
static __always_inline bool once_missed(struct sock *sk, __u64 what)
{
	__u64 key = (__u64)sk, *found;
	bool taken = false;
	__u32 zero = 0;
	struct notes *notes;
	struct note *note;

	if (tracepoints_are_preemptible()) {
		found = bpf_map_lookup_elem(&noted_anywhere, &key);
		if (found) {
			taken = *found == what;
			bpf_map_delete_elem(&noted_anywhere, &key);
		}
	} else {
		notes = bpf_map_lookup_elem(&noted, &zero);
		if (!notes)
			return false;
		note = note_of(notes, key);
		if (note) {
			taken = note->what == what;
			note->sk = 0;
		}
	}
	if (!taken)
		COUNT(rescued);
	return !taken;
}

/* For the second program of a socket's end: its note may have stayed. */
static __always_inline void once_forget(struct sock *sk)
{
	__u64 key = (__u64)sk;

	if (tracepoints_are_preemptible())
		bpf_map_delete_elem(&noted_anywhere, &key);
}

#endif
