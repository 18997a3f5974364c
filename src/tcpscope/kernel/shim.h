/* SPDX-License-Identifier: BSD-2-Clause */
/* What libbpf does not do, or not without one call into Python per item. Functions return 0 or a negative errno. */
#ifndef TCPSCOPE_SHIM_H
#define TCPSCOPE_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bpf_link;
struct bpf_object;
struct bpf_program;

struct btf;
struct tcpscope_btf;

/*
 * Writes a BTF with those types of the kernel that have a name of one in `local`, and with what they contain; of a module those
 * whose name the kernel does not have. Pointers lead to `void`. Returns 0 or a negative errno.
 */
int tcpscope_btf_excerpt(const struct tcpscope_btf *kernel, const struct btf *local, int fd);

void tcpscope_leave_modules(struct bpf_object *object);

/* Makes all global functions that are no programs static ones. Before the load. */
void tcpscope_make_static(struct bpf_object *object);

/* cffi */
/* libbpf's own messages since the last start, the last 64 KiB of them; with debug also all of them to stderr. */
void tcpscope_log_start(bool debug);
const char *tcpscope_log(void);

/*
 * Opens an object. libbpf is to find the kernel's types in the file `types_fd`, which this fills: keep it open until the
 * object is loaded. Without /proc the file has no path, and libbpf reads all types of the kernel. NULL and errno.
 */
struct tcpscope_btf;
struct bpf_object *tcpscope_open(const void *data, size_t size, const char *name, const struct tcpscope_btf *kernel,
				 int types_fd);

/* A reader of one ring buffer map. */
struct tcpscope_ring;
struct tcpscope_ring *tcpscope_ring_new(int map_fd);
void tcpscope_ring_free(struct tcpscope_ring *ring);
int tcpscope_ring_fd(const struct tcpscope_ring *ring);
size_t tcpscope_ring_bytes(const struct tcpscope_ring *ring);
/* Whether the next call of tcpscope_ring_drain will return an error. */
bool tcpscope_ring_fails(const struct tcpscope_ring *ring);
/* Copies whole records of `record_size` into the buffer until it is full or the ring is empty; returns bytes. */
long tcpscope_ring_drain(struct tcpscope_ring *ring, void *buffer, size_t size, size_t record_size);

/* A reader of a perf event array, with a buffer of `bytes`, a power of two, for each processor. */
struct tcpscope_perf;
struct tcpscope_perf *tcpscope_perf_new(int map_fd, size_t bytes);
void tcpscope_perf_free(struct tcpscope_perf *perf);
int tcpscope_perf_fd(const struct tcpscope_perf *perf);
/* As tcpscope_ring_drain, one processor after the other; each one's events are in their order. */
long tcpscope_perf_drain(struct tcpscope_perf *perf, void *buffer, size_t size, size_t record_size);
/* Events for which there was no room; without `counts` those that a later event of their processor has told. */
uint64_t tcpscope_perf_lost(const struct tcpscope_perf *perf);
size_t tcpscope_perf_bytes(const struct tcpscope_perf *perf);
bool tcpscope_perf_fails(const struct tcpscope_perf *perf);
bool tcpscope_perf_counts(const struct tcpscope_perf *perf);

/* Attaches an iterator program to the entries of a map; NULL and errno. */
struct bpf_link *tcpscope_attach_to_map(struct bpf_program *program, int map_fd);

/* An iterator's file, opened in the network namespace `netns_fd`, or in the current one when it is -1. */
int tcpscope_iterate(int link_fd, int netns_fd);

/* What the kernel says of its functions, types and enumerators. NULL and errno if it cannot be read. */
struct tcpscope_btf *tcpscope_btf_load(void);
/* The same with a module, which must have BTF (5.11). The kernel's has to outlive it. */
struct tcpscope_btf *tcpscope_btf_load_module(const struct tcpscope_btf *kernel, const char *module);
void tcpscope_btf_free(struct tcpscope_btf *btf);
int tcpscope_btf_parameters(const struct tcpscope_btf *btf, const char *function); /* their number, or -ENOENT */
int64_t tcpscope_btf_enumerator(const struct tcpscope_btf *btf, const char *name); /* its value, or -ENOENT */
/* Name of the enumerator at `index` of an enum, and its value; NULL if there is none. */
const char *tcpscope_btf_enumerator_at(const struct tcpscope_btf *btf, const char *enum_name, int index,
				       int64_t *value);
bool tcpscope_btf_has_type(const struct tcpscope_btf *btf, const char *name); /* struct, union or enum */
bool tcpscope_btf_has_typedef(const struct tcpscope_btf *btf, const char *name);
/*
 * The next function, after the type with the number `after`, that takes a pointer to the struct `name`. `after` becomes its number,
 * `parameter` which of its parameters that is, from 0. NULL: there is no more.
 */
const char *tcpscope_btf_function_with(const struct tcpscope_btf *btf, const char *name, uint32_t *after,
				       int *parameter);
/* Attaches an empty fentry program to `function` and takes it off again; 0, or why the kernel refuses. */
int tcpscope_try_fentry(const struct tcpscope_btf *btf, const char *function);

/* Writes all types of the kernel in C to a file, as `bpftool btf dump` does: vmlinux.h. 0 or a negative errno. */
int tcpscope_write_types(int fd);

struct tcpscope_program_info {
	uint64_t run_time_ns, run_count, missed;
};
int tcpscope_program_info(int program_fd, struct tcpscope_program_info *info);
/* Calls that a kernel probe has missed; 0 for every other link, and where the kernel does not tell. */
int64_t tcpscope_link_missed(int link_fd);

/* Capability sets of this thread as bit masks. */
int tcpscope_capabilities(uint64_t *effective, uint64_t *permitted);
int tcpscope_no_new_privileges(void); /* exec cannot bring them back */
int tcpscope_set_capabilities(uint64_t effective, uint64_t permitted);

/* The inode of the network namespace of a process's socket `fd`. The process is not disturbed. */
int64_t tcpscope_socket_netns(int pid, int fd);

/* Returns once every BPF program that was running when it was called has ended (membarrier). */
int tcpscope_wait_for_programs(void);
/* end */

#endif
