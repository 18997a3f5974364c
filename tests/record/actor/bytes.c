/* SPDX-License-Identifier: BSD-2-Clause */
/* The ways of bytes into a socket and out of it. Each takes SLOT SIZE, and returns how many bytes have gone that way. */
#define _GNU_SOURCE
#include "actor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#define ANSWER 3 /* bytes of an answer of answer_all */
#define HALF 100 /* of a request of halves */

static char bytes[1 << 20];

/* Moves `size` bytes by calls of `move`; what is said is said by the first that fails. */
static void all(struct reply *r, long long size, ssize_t (*move)(int fd, size_t most), int fd)
{
	long long done = 0;

	r->begin = now_ns();
	while (done < size) {
		ssize_t more =
			move(fd, size - done < (long long)sizeof(bytes) ? size - done : (long long)sizeof(bytes));

		if (more <= 0) {
			done = more ? -1 : done;
			break;
		}
		done += more;
	}
	outcome(r, done);
}

static ssize_t by_sendmsg(int fd, size_t most)
{
	struct iovec parts[3] = {{bytes, most / 3}, {bytes, most / 3}, {bytes, most - most / 3 * 2}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};

	return sendmsg(fd, &message, MSG_NOSIGNAL);
}

static ssize_t by_write(int fd, size_t most)
{
	return write(fd, bytes, most);
}

static ssize_t by_zerocopy(int fd, size_t most)
{
	return send(fd, bytes, most, MSG_NOSIGNAL | MSG_ZEROCOPY);
}

static ssize_t by_sendfile(int fd, size_t most)
{
	int file = memfd_create("bytes", 0);
	ssize_t moved = file < 0 || ftruncate(file, most) ? -1 : sendfile(fd, file, NULL, most);
	int error = errno;

	close(file);
	errno = error;
	return moved;
}

/* Through a pipe, which may hold less. */
static ssize_t by_splice(int fd, size_t most)
{
	ssize_t moved = -1;
	int ends[2], error;

	if (pipe(ends))
		return -1;
	moved = write(ends[1], bytes, most < 4096 ? most : 4096);
	if (moved > 0)
		moved = splice(ends[0], NULL, fd, NULL, moved, 0);
	error = errno;
	close(ends[0]);
	close(ends[1]);
	errno = error;
	return moved;
}

static ssize_t out_by_splice(int fd, size_t most)
{
	int ends[2], nowhere = open("/dev/null", O_WRONLY), error;
	ssize_t moved = -1, gone;

	if (pipe(ends))
		return -1;
	moved = splice(fd, NULL, ends[1], NULL, most < 4096 ? most : 4096, 0);
	gone = moved > 0 ? splice(ends[0], NULL, nowhere, NULL, moved, 0) : moved;
	error = errno;
	close(ends[0]);
	close(ends[1]);
	close(nowhere);
	errno = error;
	return gone;
}

/* First looked at, then taken. */
static ssize_t out_by_peek(int fd, size_t most)
{
	ssize_t seen = recv(fd, bytes, most, MSG_PEEK);

	return seen > 0 && recv(fd, bytes, most, MSG_PEEK) > 0 ? recv(fd, bytes, seen, 0) : seen;
}

static ssize_t out_by_readv(int fd, size_t most)
{
	struct iovec parts[2] = {{bytes, most / 2}, {bytes, most - most / 2}};

	return readv(fd, parts, 2);
}

#define WAY(name, move)                                                         \
	static void name(struct actor *a, int count, char **w, struct reply *r) \
	{                                                                       \
		all(r, atoll(w[1]), move, *slot(a, w[0]));                      \
	}

WAY(sends_message, by_sendmsg)
WAY(writes, by_write)
WAY(sends_file, by_sendfile)
WAY(splices, by_splice)
WAY(splices_out, out_by_splice)
WAY(peeks, out_by_peek)
WAY(reads_vector, out_by_readv)

static void sends_pages(struct actor *a, int count, char **w, struct reply *r)
{
	int on = 1;

	if (setsockopt(*slot(a, w[0]), SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)))
		outcome(r, -1);
	else
		all(r, atoll(w[1]), by_zerocopy, *slot(a, w[0]));
}

/* ask_all ADDRESS PORT NUMBER: one short connection after the other; each sends some bytes and reads an answer. Returned is
 * how many bytes were sent. */
static void asks_all(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address;
	socklen_t size = to_address(w[0], w[1], &address);
	long long sent = 0;

	r->begin = now_ns();
	for (int i = 0; i < atoi(w[2]); i++) {
		int fd = socket(address.ss_family, SOCK_STREAM, 0);
		ssize_t more = -1;

		if (fd >= 0 && !connect(fd, (void *)&address, size))
			more = send(fd, bytes, 1 + i % 997, MSG_NOSIGNAL);
		if (more < 0 || shutdown(fd, SHUT_WR) || recv(fd, bytes, ANSWER, MSG_WAITALL) != ANSWER) {
			outcome(r, -1);
			return;
		}
		recv(fd, bytes, 1, 0); /* the end */
		close(fd);
		sent += more;
	}
	outcome(r, sent);
}

/* answer_all LISTENER NUMBER: accepts so many, reads each to its end, answers and closes. Returned is how many bytes were read */
static void answers_all(struct actor *a, int count, char **w, struct reply *r)
{
	long long got = 0;

	r->begin = now_ns();
	for (int i = 0; i < atoi(w[1]); i++) {
		int fd = accept(*slot(a, w[0]), NULL, NULL);
		ssize_t more = fd < 0 ? -1 : 1;

		while (more > 0) {
			more = recv(fd, bytes, sizeof(bytes), 0);
			got += more > 0 ? more : 0;
		}
		if (more < 0 || send(fd, bytes, ANSWER, MSG_NOSIGNAL) != ANSWER) {
			outcome(r, -1);
			return;
		}
		close(fd);
	}
	outcome(r, got);
}

#define PAGE 4000 /* bytes that answer gives */

/* ask SLOT NUMBER: so many times a byte, and a page for an answer. Returned is how many bytes came. */
static void asks(struct actor *a, int count, char **w, struct reply *r)
{
	long long got = 0;

	r->begin = now_ns();
	for (int i = 0; i < atoi(w[1]); i++) {
		if (send(*slot(a, w[0]), bytes, 1, MSG_NOSIGNAL) != 1 ||
		    recv(*slot(a, w[0]), bytes, PAGE, MSG_WAITALL) != PAGE) {
			outcome(r, -1);
			return;
		}
		got += PAGE;
	}
	outcome(r, got);
}

/* answer SLOT: each byte, up to the end. Returned is how many bytes were sent. */
static void answers(struct actor *a, int count, char **w, struct reply *r)
{
	long long sent = 0;

	r->begin = now_ns();
	while (recv(*slot(a, w[0]), bytes, 1, 0) == 1 && send(*slot(a, w[0]), bytes, PAGE, MSG_NOSIGNAL) == PAGE)
		sent += PAGE;
	outcome(r, sent);
}

/* halves SLOT NUMBER: so often, a request in two writes, and its answer. answer_halves is the other end */
static void asks_in_halves(struct actor *a, int count, char **w, struct reply *r)
{
	int fd = *slot(a, w[0]), done = 0;

	r->begin = now_ns();
	while (done < atoi(w[1]) && send(fd, bytes, HALF, MSG_NOSIGNAL) == HALF &&
	       send(fd, bytes, HALF, MSG_NOSIGNAL) == HALF && recv(fd, bytes, ANSWER, MSG_WAITALL) == ANSWER)
		done++;
	outcome(r, done == atoi(w[1]) ? done : -1);
}

static void answers_halves(struct actor *a, int count, char **w, struct reply *r)
{
	int fd = *slot(a, w[0]), done = 0;

	r->begin = now_ns();
	while (done < atoi(w[1]) && recv(fd, bytes, 2 * HALF, MSG_WAITALL) == 2 * HALF &&
	       send(fd, bytes, ANSWER, MSG_NOSIGNAL) == ANSWER)
		done++;
	outcome(r, done == atoi(w[1]) ? done : -1);
}

const struct entry byte_commands[] = {
	{"sendmsg", sends_message},
	{"write_all", writes},
	{"sendfile", sends_file},
	{"splice_in", splices},
	{"zerocopy", sends_pages},
	{"splice_out", splices_out},
	{"peek_and_read", peeks},
	{"readv", reads_vector},
	{"ask", asks},
	{"answer", answers},
	{"ask_all", asks_all},
	{"answer_all", answers_all},
	{"halves", asks_in_halves},
	{"answer_halves", answers_halves},
	{},
};
