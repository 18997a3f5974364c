/* SPDX-License-Identifier: BSD-2-Clause */
/* connect(), accept(), send() and recv() through io_uring, with the bare system calls: man io_uring_setup, io_uring_enter. */
#define _GNU_SOURCE
#include "actor.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* One request, asked for and waited for; what it returned, or -1 with errno. */
static long long enter(struct io_uring_sqe *request, struct reply *reply)
{
	struct io_uring_params p = {};
	int ring = syscall(SYS_io_uring_setup, 4, &p), result, error;
	char *questions, *answers;
	struct io_uring_sqe *slots;

	if (ring < 0)
		return -1;
	questions = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
			 IORING_OFF_SQ_RING);
	answers = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
		       MAP_SHARED, ring, IORING_OFF_CQ_RING);
	slots = mmap(NULL, p.sq_entries * sizeof(*slots), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	if (questions == MAP_FAILED || answers == MAP_FAILED || slots == MAP_FAILED)
		return -1;
	slots[0] = *request;
	*(unsigned int *)(questions + p.sq_off.array) = 0;
	__atomic_store_n((unsigned int *)(questions + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	reply->begin = now_ns();
	result = syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
	error = errno;
	reply->end = now_ns();
	if (result >= 0) {
		result = ((struct io_uring_cqe *)(answers + p.cq_off.cqes))->res;
		error = result < 0 ? -result : 0;
	}
	close(ring);
	errno = error;
	return result < 0 ? -1 : result;
}

/* uring_connect SLOT ADDRESS PORT */
static void uring_connect(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address;
	socklen_t size = to_address(w[1], w[2], &address);
	struct io_uring_sqe request = {
		.opcode = IORING_OP_CONNECT, .fd = *slot(a, w[0]), .addr = (unsigned long)&address, .off = size};

	r->ret = enter(&request, r);
	r->error = r->ret < 0 ? errno : 0;
}

/* uring_accept LISTENER SLOT FLAGS: flags of the request (IOSQE_ASYNC is 16) */
static void uring_accept(struct actor *a, int count, char **w, struct reply *r)
{
	struct io_uring_sqe request = {.opcode = IORING_OP_ACCEPT, .fd = *slot(a, w[0]), .flags = atoi(w[2])};

	r->ret = enter(&request, r);
	r->error = r->ret < 0 ? errno : 0;
	*slot(a, w[1]) = r->ret;
}

/* uring_send SLOT SIZE, uring_receive SLOT SIZE: in one request, of at most 64 KB */
static void transfer(struct actor *a, int opcode, char **w, struct reply *r)
{
	static char bytes[1 << 16];
	struct io_uring_sqe request = {
		.opcode = opcode, .fd = *slot(a, w[0]), .addr = (unsigned long)bytes, .len = atoi(w[1])};

	r->ret = request.len > sizeof(bytes) ? -1 : enter(&request, r);
	r->error = r->ret < 0 ? errno : 0;
}

static void uring_send(struct actor *a, int count, char **w, struct reply *r)
{
	transfer(a, IORING_OP_SEND, w, r);
}

static void uring_receive(struct actor *a, int count, char **w, struct reply *r)
{
	transfer(a, IORING_OP_RECV, w, r);
}

const struct entry uring_commands[] = {
	{"uring_connect", uring_connect},
	{"uring_accept", uring_accept},
	{"uring_send", uring_send},
	{"uring_receive", uring_receive},
	{},
};
