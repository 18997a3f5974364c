// SPDX-License-Identifier: BSD-2-Clause
#define _GNU_SOURCE
#include "kernel_btf.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/membarrier.h>
#include <linux/perf_event.h>
#include <linux/sockios.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* --- libbpf's messages ------------------------------------------------------------------------------------------ */

/* What matters stands at the end: the tail is kept. */
static char log_text[64 << 10];
static size_t log_used;
static bool log_debug;

static int log_print(enum libbpf_print_level level, const char *format, va_list arguments)
{
	size_t excess, skip = 0;
	char *text;
	int length;

	if (level == LIBBPF_DEBUG && !log_debug)
		return 0;
	length = vasprintf(&text, format, arguments);
	if (length < 0)
		return length;
	if (log_debug)
		fputs(text, stderr);
	if ((size_t)length > sizeof(log_text) - 1)
		skip = length - (sizeof(log_text) - 1);
	excess = log_used + (length - skip);
	excess = excess > sizeof(log_text) - 1 ? excess - (sizeof(log_text) - 1) : 0;
	memmove(log_text, log_text + excess, log_used - excess);
	log_used -= excess;
	memcpy(log_text + log_used, text + skip, length - skip + 1);
	log_used += length - skip;
	free(text);
	return length;
}

void tcpscope_log_start(bool debug)
{
	log_used = 0;
	log_text[0] = 0;
	log_debug = debug;
	libbpf_set_print(log_print);
}

const char *tcpscope_log(void)
{
	return log_text;
}

struct bpf_object *tcpscope_open(const void *data, size_t size, const char *name, const struct tcpscope_btf *kernel,
				 int types_fd)
{
	char path[sizeof("/proc/self/fd/") + 10];
	LIBBPF_OPTS(bpf_object_open_opts, options, .object_name = name, .btf_custom_path = path);
	struct bpf_object *object;
	bool has_path;
	int error;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", types_fd);
	has_path = !access(path, R_OK);
	if (!has_path) /* no /proc: libbpf reads the whole */
		options.btf_custom_path = KERNEL_BTF;
	object = bpf_object__open_mem(data, size, &options);
	if (!object || !has_path)
		return object;
	error = tcpscope_btf_excerpt(kernel, bpf_object__btf(object), types_fd);
	if (error) {
		bpf_object__close(object);
		errno = -error;
		return NULL;
	}
	return object;
}

/*
 * A kernel function that is declared weak and missing in the kernel proper is looked for in the modules too. Before 1.3
 * libbpf takes it for an error that it may not, but asks only once: here, in vain, where an error does no harm.
 */
void tcpscope_leave_modules(struct bpf_object *object)
{
	bpf_program__set_attach_target(bpf_object__next_program(object, NULL), 0, "no such function");
}

/* As libbpf makes those that are hidden. Such a function is verified for each way that leads to a call. */
void tcpscope_make_static(struct bpf_object *object)
{
	struct btf *types = bpf_object__btf(object);

	for (__u32 id = 1; id < btf__type_cnt(types); id++) {
		struct btf_type *type = (struct btf_type *)btf__type_by_id(types, id);

		if (btf_is_func(type) && btf_vlen(type) == BTF_FUNC_GLOBAL &&
		    !bpf_object__find_program_by_name(object, btf__name_by_offset(types, type->name_off)))
			type->info = BTF_KIND_FUNC << 24 | BTF_FUNC_STATIC;
	}
}

/* --- the kernel's types in C ------------------------------------------------------------------------------------ */

static void write_text(void *file, const char *format, va_list arguments)
{
	vfprintf(file, format, arguments);
}

int tcpscope_write_types(int fd)
{
	struct btf *types = btf__parse(KERNEL_BTF, NULL);
	struct btf_dump *dump = NULL;
	FILE *file = NULL;
	int copy, error = 0;

	if (!types)
		return -errno;
	copy = dup(fd);
	file = copy < 0 ? NULL : fdopen(copy, "w");
	if (file)
		dump = btf_dump__new(types, write_text, file, NULL);
	if (!dump) {
		error = -errno;
		goto out;
	}
	fprintf(file, "#ifndef __VMLINUX_H__\n#define __VMLINUX_H__\n\n"
		      "#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)\n\n");
	for (__u32 id = 1; id < btf__type_cnt(types) && !error; id++)
		error = btf_dump__dump_type(dump, id);
	fprintf(file, "#pragma clang attribute pop\n\n#endif\n");
out:
	btf_dump__free(dump);
	if (file) {
		if (!error)
			error = fflush(file) ? -errno : ferror(file) ? -EIO : 0;
		fclose(file);
	} else if (copy >= 0) {
		close(copy);
	}
	btf__free(types);
	return error;
}

/* --- ring buffer ------------------------------------------------------------------------------------------------ */

struct tcpscope_ring {
	struct ring_buffer *buffer;
	char *to, *end;
	size_t record_size, bytes;
	int error; /* that stands behind the records of the last call */
};

/* libbpf has consumed the record when this returns, whatever it returns; -ENOBUFS stops it before the next one. */
static int ring_copy(void *context, void *data, size_t size)
{
	struct tcpscope_ring *ring = context;

	if (size != ring->record_size)
		return -EBADMSG;
	memcpy(ring->to, data, size);
	ring->to += size;
	return (size_t)(ring->end - ring->to) < size ? -ENOBUFS : 0;
}

/* What a call returns that found an error: the bytes before it, if there are any. Then the next call has the error. */
static long after_records(int error, int *later, long bytes)
{
	if (bytes)
		*later = error;
	return bytes ?: error;
}

struct tcpscope_ring *tcpscope_ring_new(int map_fd)
{
	struct tcpscope_ring *ring = calloc(1, sizeof(*ring));
	struct bpf_map_info info = {};
	uint32_t size = sizeof(info);

	if (!ring)
		return NULL;
	if (!bpf_obj_get_info_by_fd(map_fd, &info, &size))
		ring->buffer = ring_buffer__new(map_fd, ring_copy, ring, NULL);
	ring->bytes = info.max_entries;
	if (!ring->buffer) {
		int error = errno;

		free(ring);
		errno = error;
		return NULL;
	}
	return ring;
}

void tcpscope_ring_free(struct tcpscope_ring *ring)
{
	if (!ring)
		return;
	ring_buffer__free(ring->buffer);
	free(ring);
}

size_t tcpscope_ring_bytes(const struct tcpscope_ring *ring)
{
	return ring->bytes;
}

bool tcpscope_ring_fails(const struct tcpscope_ring *ring)
{
	return ring->error;
}

int tcpscope_ring_fd(const struct tcpscope_ring *ring)
{
	return ring_buffer__epoll_fd(ring->buffer);
}

long tcpscope_ring_drain(struct tcpscope_ring *ring, void *buffer, size_t size, size_t record_size)
{
	int error = ring->error;

	if (size < record_size)
		return -EINVAL;
	ring->error = 0;
	if (error)
		return error;
	ring->to = buffer;
	ring->end = ring->to + size;
	ring->record_size = record_size;
	error = ring_buffer__consume(ring->buffer);
	if (error >= 0 || error == -ENOBUFS)
		return ring->to - (char *)buffer;
	return after_records(error, &ring->error, ring->to - (char *)buffer);
}

/* --- perf event array ------------------------------------------------------------------------------------------- */

struct tcpscope_perf {
	struct perf_buffer *buffer;
	size_t pages; /* of each processor's buffer, without that of the positions */
	size_t next;  /* the processor whose events are read first */
	char *to, *end;
	size_t record_size;
	uint64_t lost; /* that events of their own have told */
	bool counts, full;
	int error, later; /* of this call; that stands behind the records of the last one */
};

struct sample {
	struct perf_event_header header;
	uint32_t size;
	char data[];
};

struct lost {
	struct perf_event_header header;
	uint64_t id, lost;
};

/*
 * libbpf has consumed the record when this returns, whatever it returns. The kernel fills a record up to 8 bytes. Of a
 * record of 64 KB and more `header.size` has only the lower 16 bits, and only that much of it can be read here.
 */
static enum bpf_perf_event_ret perf_copy(void *context, int cpu, struct perf_event_header *header)
{
	const struct sample *sample = (void *)header;
	struct tcpscope_perf *perf = context;

	if (header->size < sizeof(*header)) {
		perf->error = -EBADMSG;
		return LIBBPF_PERF_EVENT_ERROR;
	}
	if (header->type == PERF_RECORD_LOST)
		perf->lost += ((struct lost *)header)->lost;
	if (header->type != PERF_RECORD_SAMPLE)
		return LIBBPF_PERF_EVENT_CONT;
	if (sample->size < perf->record_size || sample->size - perf->record_size >= 8 ||
	    header->size < sizeof(*sample) + perf->record_size) {
		perf->error = -EBADMSG;
		return LIBBPF_PERF_EVENT_ERROR;
	}
	memcpy(perf->to, sample->data, perf->record_size);
	perf->to += perf->record_size;
	perf->full = (size_t)(perf->end - perf->to) < perf->record_size;
	return perf->full ? LIBBPF_PERF_EVENT_DONE : LIBBPF_PERF_EVENT_CONT;
}

struct tcpscope_perf *tcpscope_perf_new(int map_fd, size_t bytes)
{
	const uint64_t format_lost = 1 << 4; /* PERF_FORMAT_LOST, "perf: Add PERF_FORMAT_LOST" (6.0) */
	struct perf_event_attr attr = {
		.type = PERF_TYPE_SOFTWARE,
		.size = sizeof(attr),
		.config = PERF_COUNT_SW_BPF_OUTPUT,
		.sample_period = 1,
		.sample_type = PERF_SAMPLE_RAW,
		.read_format = format_lost,
		.watermark = 1,
		.wakeup_watermark = bytes / 4,
	};
	struct tcpscope_perf *perf = calloc(1, sizeof(*perf));
	size_t pages = bytes / sysconf(_SC_PAGESIZE);
	int error;

	if (!perf)
		return NULL;
	perf->counts = true;
	perf->pages = pages;
	perf->buffer = perf_buffer__new_raw(map_fd, pages, &attr, perf_copy, perf, NULL);
	if (!perf->buffer && errno == EINVAL) {
		perf->counts = false;
		attr.read_format = 0;
		perf->buffer = perf_buffer__new_raw(map_fd, pages, &attr, perf_copy, perf, NULL);
	}
	if (!perf->buffer) {
		error = errno;
		free(perf);
		errno = error;
		return NULL;
	}
	return perf;
}

void tcpscope_perf_free(struct tcpscope_perf *perf)
{
	if (!perf)
		return;
	perf_buffer__free(perf->buffer);
	free(perf);
}

int tcpscope_perf_fd(const struct tcpscope_perf *perf)
{
	return perf_buffer__epoll_fd(perf->buffer);
}

size_t tcpscope_perf_bytes(const struct tcpscope_perf *perf)
{
	return perf_buffer__buffer_cnt(perf->buffer) * (perf->pages + 1) * sysconf(_SC_PAGESIZE);
}

bool tcpscope_perf_fails(const struct tcpscope_perf *perf)
{
	return perf->later;
}

bool tcpscope_perf_counts(const struct tcpscope_perf *perf)
{
	return perf->counts;
}

uint64_t tcpscope_perf_lost(const struct tcpscope_perf *perf)
{
	uint64_t sum = 0, answer[2];

	if (!perf->counts)
		return perf->lost;
	for (size_t i = 0; i < perf_buffer__buffer_cnt(perf->buffer); i++)
		if (read(perf_buffer__buffer_fd(perf->buffer, i), answer, sizeof(answer)) == sizeof(answer))
			sum += answer[1];
	return sum;
}

long tcpscope_perf_drain(struct tcpscope_perf *perf, void *buffer, size_t size, size_t record_size)
{
	size_t count = perf_buffer__buffer_cnt(perf->buffer), first = perf->next;

	if (size < record_size)
		return -EINVAL;
	perf->to = buffer;
	perf->end = perf->to + size;
	perf->record_size = record_size;
	perf->full = false;
	perf->error = perf->later;
	perf->later = 0;
	for (size_t i = 0; i < count && !perf->full && !perf->error; i++) {
		perf->next = (first + i) % count;
		perf_buffer__consume_buffer(perf->buffer, perf->next);
	}
	if (!perf->error)
		return perf->to - (char *)buffer;
	return after_records(perf->error, &perf->later, perf->to - (char *)buffer);
}

/* --- iterators, maps, programs ---------------------------------------------------------------------------------- */

struct bpf_link *tcpscope_attach_to_map(struct bpf_program *program, int map_fd)
{
	union bpf_iter_link_info info = {.map.map_fd = map_fd};
	LIBBPF_OPTS(bpf_iter_attach_opts, options, .link_info = &info, .link_info_len = sizeof(info));

	return bpf_program__attach_iter(program, &options);
}

int tcpscope_iterate(int link_fd, int netns_fd)
{
	int home, fd, error;

	if (netns_fd < 0) {
		fd = bpf_iter_create(link_fd);
		return fd < 0 ? -errno : fd;
	}
	home = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	if (home < 0)
		return -errno;
	if (setns(netns_fd, CLONE_NEWNET)) {
		error = -errno;
		close(home);
		return error;
	}
	fd = bpf_iter_create(link_fd);
	error = errno;
	if (setns(home, CLONE_NEWNET))
		abort(); /* this thread would go on in a foreign namespace */
	close(home);
	return fd < 0 ? -error : fd;
}

int tcpscope_program_info(int program_fd, struct tcpscope_program_info *info)
{
	struct bpf_prog_info kernel_info = {};
	uint32_t length = sizeof(kernel_info);

	if (bpf_obj_get_info_by_fd(program_fd, &kernel_info, &length))
		return -errno;
	info->run_time_ns = kernel_info.run_time_ns;
	info->run_count = kernel_info.run_cnt;
	info->missed = kernel_info.recursion_misses;
	return 0;
}

int64_t tcpscope_link_missed(int link_fd)
{
	/*
	 * struct bpf_link_info, include/uapi/linux/bpf.h, as far as `missed` of a kernel probe. It came with "bpf: Add missed
	 * value to kprobe perf link info" (6.7), after libbpf 1.1. A kernel that does not know it leaves it zero.
	 */
	struct {
		uint32_t type, id, prog_id, padding;
		uint32_t perf_event_type, padding2;
		uint64_t func_name;
		uint32_t name_len, offset;
		uint64_t addr, missed;
	} info = {};
	const uint32_t perf_event = 7, kprobe = 3, kretprobe = 4;
	uint32_t length = sizeof(info);

	if (bpf_obj_get_info_by_fd(link_fd, &info, &length))
		return -errno;
	if (info.type != perf_event || (info.perf_event_type != kprobe && info.perf_event_type != kretprobe))
		return 0;
	return info.missed;
}

/* --- other processes -------------------------------------------------------------------------------------------- */

int64_t tcpscope_socket_netns(int pid, int fd)
{
	int process, socket = -1, netns = -1;
	struct stat status;
	int64_t result;

	process = syscall(SYS_pidfd_open, pid, 0);
	if (process >= 0)
		socket = syscall(SYS_pidfd_getfd, process, fd, 0);
	if (socket >= 0)
		netns = ioctl(socket, SIOCGSKNS);
	result = netns >= 0 && !fstat(netns, &status) ? (int64_t)status.st_ino : -errno;
	for (int *fds = (int[]){process, socket, netns, -1}; *fds >= 0; fds++)
		close(*fds);
	return result;
}

/* --- this process ----------------------------------------------------------------------------------------------- */

int tcpscope_capabilities(uint64_t *effective, uint64_t *permitted)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];

	if (syscall(SYS_capget, &header, data))
		return -errno;
	*effective = data[0].effective | (uint64_t)data[1].effective << 32;
	*permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
	return 0;
}

int tcpscope_set_capabilities(uint64_t effective, uint64_t permitted)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {
		{.effective = effective, .permitted = permitted},
		{.effective = effective >> 32, .permitted = permitted >> 32},
	};

	return syscall(SYS_capset, &header, data) ? -errno : 0;
}

int tcpscope_no_new_privileges(void)
{
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -errno : 0;
}

int tcpscope_wait_for_programs(void)
{
	return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) ? -errno : 0;
}
