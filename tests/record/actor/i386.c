/* SPDX-License-Identifier: BSD-2-Clause */
/* System calls of the 32-bit table, by "int 0x80". The error is ENOSYS where the kernel has none. */
#define _GNU_SOURCE
#include "actor.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SOCKETCALL 102
#define KEYCTL 288
#define KEYCTL_CAPABILITIES 31

static sigjmp_buf before;

static void refused(int number)
{
	siglongjmp(before, 1);
}

/* The arguments are in the registers of the 32-bit table (bx, cx, dx), then in those of the other one (di, si, dx). */
static long long call(int number, long bx, long cx, long dx, long si, long di)
{
	long ret = -ENOSYS;
#ifdef __x86_64__
	struct sigaction action = {.sa_handler = refused}, old;

	sigaction(SIGSEGV, &action, &old);
	if (!sigsetjmp(before, 1))
		asm volatile("int $0x80"
			     : "=a"(ret)
			     : "a"((long)number), "b"(bx), "c"(cx), "d"(dx), "S"(si), "D"(di)
			     : "memory", "r8", "r9", "r10", "r11");
	sigaction(SIGSEGV, &old, NULL);
#endif
	if (ret >= 0)
		return ret;
	errno = -ret;
	return -1;
}

/* Memory that has a 32-bit address. */
static void *low(void)
{
	static void *page;

	if (!page)
		page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	return page;
}

/* i386_connect SLOT NUMBER ADDRESS PORT: connect() (362), socketcall() (102); 42 is pipe(), which fails */
static void i386_connect(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage *address = low();
	socklen_t size = to_address(w[2], w[3], address);
	int fd = *slot(a, w[0]), number = atoi(w[1]);
	uint32_t *arguments = (uint32_t *)(address + 1);
	long at = (long)address;

	arguments[0] = fd;
	arguments[1] = at;
	arguments[2] = size;
	r->begin = now_ns();
	if (number == SOCKETCALL)
		outcome(r, call(number, 3, (long)arguments, 0, 0, 0));
	else
		outcome(r, call(number, number == 42 ? 0 : fd, at, size, at, fd));
}

/* i386_accept LISTENER SLOT NUMBER: accept4() (364), socketcall() (102) */
static void i386_accept(struct actor *a, int count, char **w, struct reply *r)
{
	int listener = *slot(a, w[0]), number = atoi(w[2]);
	uint32_t *arguments = memset(low(), 0, 16);

	arguments[0] = listener;
	r->begin = now_ns();
	if (number == SOCKETCALL)
		outcome(r, call(number, 5, (long)arguments, 0, 0, 0));
	else
		outcome(r, call(number, listener, 0, 0, 0, 0));
	*slot(a, w[1]) = r->ret;
}

/* i386_keyctl LISTENER SLOT: keyctl(), which has the number of accept4() in the other table, and returns 2. SLOT is 2 */
static void i386_keyctl(struct actor *a, int count, char **w, struct reply *r)
{
	if (dup2(*slot(a, w[1]), 2) < 0) {
		outcome(r, -1);
		return;
	}
	r->begin = now_ns();
	outcome(r, call(KEYCTL, KEYCTL_CAPABILITIES, (long)low(), 2, 0, *slot(a, w[0])));
}

const struct entry i386_commands[] = {
	{"i386_connect", i386_connect},
	{"i386_accept", i386_accept},
	{"i386_keyctl", i386_keyctl},
	{},
};
