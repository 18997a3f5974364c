/* SPDX-License-Identifier: BSD-2-Clause */
/* The commands of a process: its system calls. SLOT is the place of a socket, a number. */
#define _GNU_SOURCE
#include "actor.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SO_COOKIE_ 57

socklen_t to_address(const char *text, const char *port, struct sockaddr_storage *address)
{
	struct sockaddr_in6 *six = (void *)address;
	struct sockaddr_in *four = (void *)address;

	memset(address, 0, sizeof(*address));
	if (strchr(text, ':')) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(atoi(port));
		inet_pton(AF_INET6, text, &six->sin6_addr);
		return sizeof(*six);
	}
	four->sin_family = AF_INET;
	four->sin_port = htons(atoi(port));
	inet_pton(AF_INET, text, &four->sin_addr);
	return sizeof(*four);
}

size_t from_hex(const char *text, void *bytes, size_t room)
{
	size_t size = 0;
	unsigned int byte;

	for (; size < room && sscanf(text, "%2x", &byte) == 1; text += 2)
		((unsigned char *)bytes)[size++] = byte;
	return size;
}

/* The port is what is returned, the address is the data. */
static void add_end(struct reply *reply, int failed, struct sockaddr_storage *address)
{
	char text[INET6_ADDRSTRLEN] = "";
	const struct sockaddr_in6 *six = (void *)address;
	const struct sockaddr_in *four = (void *)address;

	outcome(reply, failed ? -1 : ntohs(four->sin_port));
	if (failed)
		return;
	inet_ntop(address->ss_family, address->ss_family == AF_INET6 ? (const void *)&six->sin6_addr : &four->sin_addr,
		  text, sizeof(text));
	add(reply, "%s", text);
}

/* socket SLOT FAMILY TYPE PROTOCOL */
static void make(struct actor *a, int count, char **w, struct reply *r)
{
	int made = socket(atoi(w[1]), atoi(w[2]), atoi(w[3]));

	outcome(r, made);
	*slot(a, w[0]) = made;
}

/* fd SLOT */
static void descriptor(struct actor *a, int count, char **w, struct reply *r)
{
	outcome(r, *slot(a, w[0]));
}

/* option SLOT LEVEL NAME INTEGER|xHEX */
static void option(struct actor *a, int count, char **w, struct reply *r)
{
	char bytes[256];
	int number = atoi(w[3]);

	if (w[3][0] == 'x') {
		size_t size = from_hex(w[3] + 1, bytes, sizeof(bytes));

		outcome(r, setsockopt(*slot(a, w[0]), atoi(w[1]), atoi(w[2]), bytes, size));
	} else {
		outcome(r, setsockopt(*slot(a, w[0]), atoi(w[1]), atoi(w[2]), &number, sizeof(number)));
	}
}

/* get SLOT LEVEL NAME SIZE: the bytes in hex; returned is their first integer */
static void get(struct actor *a, int count, char **w, struct reply *r)
{
	unsigned char bytes[512] = {};
	socklen_t size = atoi(w[3]) < 512 ? atoi(w[3]) : 512;
	int failed = getsockopt(*slot(a, w[0]), atoi(w[1]), atoi(w[2]), bytes, &size);
	unsigned int first;

	memcpy(&first, bytes, sizeof(first));
	outcome(r, failed ? -1LL : size >= 4 ? (long long)first : bytes[0]);
	if (!failed)
		add_hex(r, bytes, size);
}

/* info SLOT [OFFSET SIZE]: TCP_INFO in hex; returned is the state, or that field of it */
static void info(struct actor *a, int count, char **w, struct reply *r)
{
	unsigned char bytes[512] = {};
	socklen_t size = sizeof(bytes);
	int failed = getsockopt(*slot(a, w[0]), IPPROTO_TCP, TCP_INFO, bytes, &size);
	unsigned long long field = 0;

	memcpy(&field, bytes + (count > 2 ? atoi(w[1]) : 0), count > 2 ? atoi(w[2]) : 1);
	outcome(r, failed ? -1 : (long long)field);
	if (!failed)
		add_hex(r, bytes, size);
}

/* cookie SLOT */
static void cookie(struct actor *a, int count, char **w, struct reply *r)
{
	unsigned long long number = 0;
	socklen_t size = sizeof(number);
	int failed = getsockopt(*slot(a, w[0]), SOL_SOCKET, SO_COOKIE_, &number, &size);

	outcome(r, failed ? -1 : (long long)number);
}

/* ioctl SLOT REQUEST: the integer that it gives */
static void control(struct actor *a, int count, char **w, struct reply *r)
{
	int number = 0, failed = ioctl(*slot(a, w[0]), strtoul(w[1], NULL, 0), &number);

	outcome(r, failed ? -1 : number);
}

/* bind SLOT ADDRESS PORT */
static void bind_to(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address;
	socklen_t size = to_address(w[1], w[2], &address);

	outcome(r, bind(*slot(a, w[0]), (void *)&address, size));
}

/* listen SLOT BACKLOG */
static void listens(struct actor *a, int count, char **w, struct reply *r)
{
	outcome(r, listen(*slot(a, w[0]), atoi(w[1])));
}

/* connect SLOT ADDRESS PORT */
static void connects(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address;
	socklen_t size = to_address(w[1], w[2], &address);
	int fd = *slot(a, w[0]);

	r->begin = now_ns();
	outcome(r, connect(fd, (void *)&address, size));
}

/* connect_raw SLOT HEX SIZE: a sockaddr byte by byte; disconnect() is one of AF_UNSPEC */
static void connects_raw(struct actor *a, int count, char **w, struct reply *r)
{
	char address[128] = {};

	from_hex(w[1], address, sizeof(address));
	outcome(r, connect(*slot(a, w[0]), (void *)address, atoi(w[2])));
}

/* connect_at_edge SLOT ADDRESS PORT: behind the address there is no memory */
static void connects_at_edge(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address;
	socklen_t size = to_address(w[1], w[2], &address);
	size_t page = sysconf(_SC_PAGESIZE);
	char *pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (pages == MAP_FAILED || mprotect(pages + page, page, PROT_NONE)) {
		outcome(r, -1);
		return;
	}
	memcpy(pages + page - size, &address, size);
	r->begin = now_ns();
	outcome(r, connect(*slot(a, w[0]), (void *)(pages + page - size), size));
	munmap(pages, 2 * page);
}

/* accept LISTENER SLOT [FLAGS]: without flags by accept(), with them by accept4(); returned is the remote port */
static void accepts(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address = {};
	socklen_t size = sizeof(address);
	int listener = *slot(a, w[0]), made;

	r->begin = now_ns();
	made = count > 2 ? accept4(listener, (void *)&address, &size, atoi(w[2]))
			 : accept(listener, (void *)&address, &size);
	add_end(r, made < 0, &address);
	*slot(a, w[1]) = made;
}

/* blocking SLOT 0|1 */
static void blocking(struct actor *a, int count, char **w, struct reply *r)
{
	int fd = *slot(a, w[0]), flags = fcntl(fd, F_GETFL);

	outcome(r, fcntl(fd, F_SETFL, atoi(w[1]) ? flags & ~O_NONBLOCK : flags | O_NONBLOCK));
}

/* send SLOT TEXT FLAGS */
static void sends(struct actor *a, int count, char **w, struct reply *r)
{
	int fd = *slot(a, w[0]);

	r->begin = now_ns();
	outcome(r, send(fd, w[1], strlen(w[1]), atoi(w[2]) | MSG_NOSIGNAL));
}

static struct {
	int userfaultfd;
	void *page;
} stuck; /* made by send_stuck, unmade there when unstuck has let it go on */

/* send_stuck SLOT: sends a byte that is not there yet. The kernel waits for it, and the socket stays locked. */
static void sends_stuck(struct actor *a, int count, char **w, struct reply *r)
{
	size_t size = sysconf(_SC_PAGESIZE);
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING, .range.len = size};

	stuck.userfaultfd = syscall(SYS_userfaultfd, O_CLOEXEC);
	stuck.page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	range.range.start = (uintptr_t)stuck.page;
	if (stuck.userfaultfd < 0 || stuck.page == MAP_FAILED || ioctl(stuck.userfaultfd, UFFDIO_API, &api) ||
	    ioctl(stuck.userfaultfd, UFFDIO_REGISTER, &range)) {
		outcome(r, -1);
		return;
	}
	r->begin = now_ns();
	outcome(r, send(*slot(a, w[0]), stuck.page, 1, MSG_NOSIGNAL));
	munmap(stuck.page, size);
	close(stuck.userfaultfd);
}

/* unstuck: of another thread of that process: the byte is there, a zero */
static void frees_stuck(struct actor *a, int count, char **w, struct reply *r)
{
	struct uffdio_zeropage zero = {.range = {.start = (uintptr_t)stuck.page, .len = sysconf(_SC_PAGESIZE)}};

	outcome(r, ioctl(stuck.userfaultfd, UFFDIO_ZEROPAGE, &zero));
}

/* send_to SLOT TEXT FLAGS ADDRESS PORT: with MSG_FASTOPEN it connects */
static void sends_to(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address;
	socklen_t size = to_address(w[3], w[4], &address);
	int fd = *slot(a, w[0]);

	r->begin = now_ns();
	outcome(r, sendto(fd, w[1], strlen(w[1]), atoi(w[2]) | MSG_NOSIGNAL, (void *)&address, size));
}

/* send_all SLOT SIZE: so many bytes, in one call as long as they fit */
static void sends_all(struct actor *a, int count, char **w, struct reply *r)
{
	long long size = atoll(w[1]), sent = 0;
	char *bytes = calloc(1, size);

	r->begin = now_ns();
	while (sent < size) {
		ssize_t more = send(*slot(a, w[0]), bytes + sent, size - sent, MSG_NOSIGNAL);

		if (more < 0) {
			sent = -1;
			break;
		}
		sent += more;
	}
	outcome(r, sent);
	free(bytes);
}

/* receive SLOT ROOM FLAGS: the bytes in hex, 128 at most */
static void receives(struct actor *a, int count, char **w, struct reply *r)
{
	static __thread char bytes[1 << 16];
	size_t asked = strtoul(w[1], NULL, 0), room = asked < sizeof(bytes) ? asked : sizeof(bytes);
	int fd = *slot(a, w[0]);
	ssize_t got;

	r->begin = now_ns();
	got = recv(fd, bytes, room, atoi(w[2]));
	outcome(r, got);
	if (got > 0)
		add_hex(r, bytes, got < 128 ? got : 128);
}

/* read SLOT SIZE: until so many have come, or the end; returned is how many did */
static void reads(struct actor *a, int count, char **w, struct reply *r)
{
	static __thread char bytes[1 << 16];
	size_t left = strtoul(w[1], NULL, 0), asked = left;
	ssize_t more = 1;

	r->begin = now_ns();
	while (left && more > 0) {
		more = recv(*slot(a, w[0]), bytes, left < sizeof(bytes) ? left : sizeof(bytes), MSG_WAITALL);
		left -= more > 0 ? more : 0;
	}
	outcome(r, more < 0 ? -1 : (long long)(asked - left));
}

/* splice SLOT SIZE: into a pipe of its own, in one call; at most as much as a pipe holds */
static void splices(struct actor *a, int count, char **w, struct reply *r)
{
	int ends[2];

	if (pipe(ends)) {
		outcome(r, -1);
		return;
	}
	r->begin = now_ns();
	outcome(r, splice(*slot(a, w[0]), NULL, ends[1], NULL, strtoul(w[1], NULL, 0), 0));
	close(ends[0]);
	close(ends[1]);
}

/* shutdown SLOT HOW */
static void shuts(struct actor *a, int count, char **w, struct reply *r)
{
	int fd = *slot(a, w[0]);

	r->begin = now_ns();
	outcome(r, shutdown(fd, atoi(w[1])));
}

/* close SLOT */
static void closes(struct actor *a, int count, char **w, struct reply *r)
{
	int fd = *slot(a, w[0]);

	*slot(a, w[0]) = -1;
	r->begin = now_ns();
	outcome(r, close(fd));
}

/* name SLOT, peer SLOT */
static void name(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address = {};
	socklen_t size = sizeof(address);

	add_end(r, getsockname(*slot(a, w[0]), (void *)&address, &size), &address);
}

static void peer(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage address = {};
	socklen_t size = sizeof(address);

	add_end(r, getpeername(*slot(a, w[0]), (void *)&address, &size), &address);
}

/* poll SLOT EVENTS MILLISECONDS: returned is what has happened */
static void polls(struct actor *a, int count, char **w, struct reply *r)
{
	struct pollfd polled = {.fd = *slot(a, w[0]), .events = atoi(w[1])};
	int found;

	if (polled.fd < 0) { /* poll() would wait without it */
		errno = EBADF;
		outcome(r, -1);
		return;
	}
	r->begin = now_ns();
	found = poll(&polled, 1, atoi(w[2]));
	outcome(r, found < 0 ? -1 : polled.revents);
}

/* give SLOT, take SLOT: a socket from one process to another; only as parts of `pass` */
static void gives(struct actor *a, int count, char **w, struct reply *r)
{
	r->fd = *slot(a, w[0]);
	outcome(r, r->fd);
}

static void takes(struct actor *a, int count, char **w, struct reply *r)
{
	*slot(a, w[0]) = a->given;
	outcome(r, a->given);
}

/* pause MICROSECONDS */
static void pauses(struct actor *a, int count, char **w, struct reply *r)
{
	long long us = atoll(w[0]);
	struct timespec time = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000};

	outcome(r, clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL) ? -1 : 0);
}

/* now: the clock, before and after */
static void nothing(struct actor *a, int count, char **w, struct reply *r)
{
	outcome(r, 0);
}

/* wait PID: until a child has ended */
static void waits(struct actor *a, int count, char **w, struct reply *r)
{
	outcome(r, waitpid(atoi(w[0]), NULL, 0));
}

/* become UID */
static void becomes(struct actor *a, int count, char **w, struct reply *r)
{
	int uid = atoi(w[0]);

	outcome(r, setresuid(uid, uid, uid));
}

/* processor NUMBER: runs there from now on */
static void processor(struct actor *a, int count, char **w, struct reply *r)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(atoi(w[0]), &set);
	outcome(r, sched_setaffinity(0, sizeof(set), &set));
}

static void woken(int number)
{
}

/* interrupt MILLISECONDS: a signal comes again and again after so long, until it is 0; the call that it meets is not begun
 * again */
static void interrupt(struct actor *a, int count, char **w, struct reply *r)
{
	static timer_t timer;
	static bool made;
	struct sigaction action = {.sa_handler = woken};
	int ms = atoi(w[0]);
	struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
	struct itimerspec when = {.it_value = time, .it_interval = time};
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};

	event._sigev_un._tid = syscall(SYS_gettid);
	sigaction(SIGALRM, &action, NULL);
	made = made || !timer_create(CLOCK_MONOTONIC, &event, &timer);
	outcome(r, made ? timer_settime(timer, 0, &when, NULL) : -1);
}

const struct entry socket_commands[] = {
	{"socket", make},
	{"fd", descriptor},
	{"option", option},
	{"get", get},
	{"info", info},
	{"cookie", cookie},
	{"ioctl", control},
	{"bind", bind_to},
	{"listen", listens},
	{"connect", connects},
	{"connect_raw", connects_raw},
	{"connect_at_edge", connects_at_edge},
	{"accept", accepts},
	{"blocking", blocking},
	{"send", sends},
	{"send_to", sends_to},
	{"send_all", sends_all},
	{"send_stuck", sends_stuck},
	{"unstuck", frees_stuck},
	{"receive", receives},
	{"read", reads},
	{"splice", splices},
	{"shutdown", shuts},
	{"close", closes},
	{"name", name},
	{"peer", peer},
	{"poll", polls},
	{"give", gives},
	{"take", takes},
	{"pause", pauses},
	{"now", nothing},
	{"wait", waits},
	{"become", becomes},
	{"processor", processor},
	{"interrupt", interrupt},
	{},
};
