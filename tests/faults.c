/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * To be preloaded. The system calls that load, attach and map a BPF object can fail here, as if the kernel failed them:
 * bpf(), perf_event_open(), epoll_create1() and mmap() of what is shared.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>

static long calls, fails_from, fails_until;
static int fails_with;

/* Counts from zero again. The calls from `from` to before `until` fail with `error`. */
void faults_arm(long from, long until, int error)
{
	calls = 0;
	fails_from = from;
	fails_until = until;
	fails_with = error;
}

long faults_calls(void)
{
	return calls;
}

static bool fails(void)
{
	long call = calls++;

	if (call < fails_from || call >= fails_until)
		return false;
	errno = fails_with;
	return true;
}

long syscall(long number, ...)
{
	long (*real)(long, ...) = dlsym(RTLD_NEXT, "syscall");
	long given[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		given[i] = va_arg(list, long);
	va_end(list);
	if ((number == SYS_bpf || number == SYS_perf_event_open) && fails())
		return -1;
	return real(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}

static void *map(const char *name, void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
	void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, name);

	if (fd >= 0 && flags & MAP_SHARED && fails())
		return MAP_FAILED;
	return real(start, size, protection, flags, fd, offset);
}

void *mmap(void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
	return map("mmap", start, size, protection, flags, fd, offset);
}

void *mmap64(void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
	return map("mmap64", start, size, protection, flags, fd, offset);
}

int epoll_create1(int flags)
{
	int (*real)(int) = dlsym(RTLD_NEXT, "epoll_create1");

	return fails() ? -1 : real(flags);
}
