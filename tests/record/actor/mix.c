/* SPDX-License-Identifier: BSD-2-Clause */
/* A mix of connections of all kinds, many at a time: what tools are held against the kernel's counters with. */
#define _GNU_SOURCE
#include "actor.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define AT_ONCE 100
#define GIVEN_UP 5 /* so many wait; then the oldest is given up */
#define ERRNOS 256
#define EVENTS 64

enum kind {
	CLIENT_CLOSES,
	SERVER_CLOSES,
	SERVER_RESETS,
	CLIENT_RESETS,
	UNREAD,
	KEPT,
	REFUSED,
	SILENT,
	ABANDONED,
	SHUT_DOWN,
	KINDS
};

static const struct {
	const char *name;
	int share; /* among a hundred */
	const char *says;
} kinds[KINDS] = {
	[CLIENT_CLOSES] = {"client_closes", 30, "hello"}, /* one exchange, then the client closes first */
	[SERVER_CLOSES] = {"server_closes", 20, "close"}, /* the client's "close" makes the server close first */
	[SERVER_RESETS] = {"server_resets", 10, "reset"},
	[CLIENT_RESETS] = {"client_resets", 10, "hello"},
	[UNREAD] = {"unread", 5, "hello"}, /* the client closes with data unread */
	[KEPT] = {"kept", 5, "hello"},     /* stays open until everything else has ended */
	[REFUSED] = {"refused", 10, ""},
	[SILENT] = {"silent", 5, ""},       /* nobody answers: times out */
	[ABANDONED] = {"abandoned", 3, ""}, /* nobody answers, and it is closed while it waits */
	[SHUT_DOWN] = {"shut_down", 2, ""}, /* nobody answers, and it is shut down while it waits */
};

static void watch(int poll, int operation, int fd, unsigned int events, void *what)
{
	struct epoll_event event = {.events = events, .data.ptr = what};

	epoll_ctl(poll, operation, fd, &event);
}

static void reset_at_close(int fd)
{
	struct linger linger = {.l_onoff = 1};

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
}

/* -- the server -------------------------------------------------------------------------------------------------- */

/* Whether the connection goes on at this end. */
static bool answer(int fd)
{
	char said[64];
	ssize_t size = recv(fd, said, sizeof(said), 0);

	if (size <= 0)
		return false;
	if (size == 5 && !memcmp(said, "reset", 5)) {
		reset_at_close(fd);
		return false;
	}
	if (send(fd, said, size, MSG_NOSIGNAL) < 0)
		return false;
	return size != 5 || memcmp(said, "close", 5);
}

#define DESCRIPTORS 65536
#define PATIENCE 60 /* seconds without anything */

/* mix_serve LISTENER NUMBER: accepts so many and does as it is told, until they have ended; returned is how many it accepted.
 *
 * It looks for itself when nothing has come for a second, and the data say how many connections that found to have something:
 * connections=NUMBER. When nothing comes any more it says what it waits for. */
static void serve(struct actor *a, int count, char **w, struct reply *r)
{
	int listener = *slot(a, w[0]), number = atoi(w[1]), poll = epoll_create1(EPOLL_CLOEXEC);
	int accepted = 0, open = 0, found = 0, idle = 0;
	bool is_open[DESCRIPTORS] = {};

	watch(poll, EPOLL_CTL_ADD, listener, EPOLLIN, &listener);
	while (accepted < number || open) {
		struct epoll_event events[EVENTS];
		int ready = epoll_wait(poll, events, EVENTS, 1000);

		idle = ready ? 0 : idle + 1;
		if (idle > PATIENCE || (ready < 0 && errno != EINTR)) {
			add(r, "accepted %d of %d, open %d", accepted, number, open);
			outcome(r, -1);
			return;
		}
		for (int fd = 0; !ready && open && fd < DESCRIPTORS; fd++) {
			char byte;

			if (!is_open[fd] || (recv(fd, &byte, 1, MSG_PEEK) < 0 && errno == EAGAIN))
				continue;
			found++;
			if (!answer(fd)) {
				is_open[fd] = false;
				open--;
				close(fd);
			}
		}
		for (int i = 0; i < ready; i++) {
			void *what = events[i].data.ptr;
			int child = (intptr_t)what;

			if (what == &listener) {
				child = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
				if (child < 0 || child >= DESCRIPTORS) {
					outcome(r, -1);
					return;
				}
				accepted++;
				open++;
				is_open[child] = true;
				watch(poll, EPOLL_CTL_ADD, child, EPOLLIN, (void *)(intptr_t)child);
			} else if (!answer(child)) {
				is_open[child] = false;
				open--;
				close(child);
			}
		}
	}
	outcome(r, accepted);
	if (found)
		add(r, "connections=%d", found);
	close(poll);
}

/* -- the client -------------------------------------------------------------------------------------------------- */

struct client {
	enum kind kind;
	int fd;
	bool connected;
	struct client *next;
};

struct clients {
	int poll, running, silent, number;
	struct client *kept, *waiting[GIVEN_UP + 1];
	int waits;
	int given_up, outcomes[ERRNOS];
};

static unsigned int chance(unsigned int *state)
{
	*state = *state * 1664525U + 1013904223U;
	return *state >> 8;
}

/* A number of each kind, by its share, in an order that is the same each time. */
static enum kind *shuffled(int number, unsigned int *state)
{
	enum kind *order = malloc(number * sizeof(*order));
	int at = 0;

	for (int kind = 0; kind < KINDS; kind++)
		for (int i = 0; i < number * kinds[kind].share / 100; i++)
			order[at++] = kind;
	while (at < number)
		order[at++] = CLIENT_CLOSES;
	for (int i = number - 1; i > 0; i--) {
		int other = chance(state) % (i + 1);
		enum kind kind = order[i];

		order[i] = order[other];
		order[other] = kind;
	}
	return order;
}

static bool is_unanswered(enum kind kind)
{
	return kind == SILENT || kind == ABANDONED || kind == SHUT_DOWN;
}

/* 0, or -1 with errno */
static int start(struct clients *all, enum kind kind, const char *address, const char *port)
{
	struct client *client = malloc(sizeof(*client));
	struct sockaddr_storage target;
	socklen_t size = to_address(address, port, &target);
	int tries = 1;

	*client = (struct client){.kind = kind,
				  .fd = socket(target.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
	if (client->fd < 0)
		return -1;
	if (kind == SILENT)
		setsockopt(client->fd, IPPROTO_TCP, TCP_SYNCNT, &tries, sizeof(tries));
	if (connect(client->fd, (void *)&target, size) && errno != EINPROGRESS)
		return -1;
	if (kind == ABANDONED || kind == SHUT_DOWN) {
		all->waiting[all->waits++] = client;
		return 0;
	}
	all->running++;
	all->silent += kind == SILENT;
	watch(all->poll, EPOLL_CTL_ADD, client->fd, EPOLLIN | EPOLLOUT, client);
	return 0;
}

static void give_up_oldest(struct clients *all)
{
	struct client *client = all->waiting[0];

	memmove(all->waiting, all->waiting + 1, --all->waits * sizeof(*all->waiting));
	if (client->kind == SHUT_DOWN)
		shutdown(client->fd, SHUT_RDWR);
	close(client->fd);
	free(client);
	all->given_up++;
}

/* Whether the connection goes on at this end. */
static bool move(struct clients *all, struct client *client)
{
	char heard[64];
	ssize_t size;

	if (!client->connected) {
		int error = 0;
		socklen_t room = sizeof(error);

		getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &room);
		all->outcomes[error < ERRNOS ? error : 0]++;
		if (error)
			return false;
		client->connected = true;
		send(client->fd, kinds[client->kind].says, strlen(kinds[client->kind].says), MSG_NOSIGNAL);
		watch(all->poll, EPOLL_CTL_MOD, client->fd, EPOLLIN, client);
		return true;
	}
	if (client->kind == UNREAD)
		return false;
	size = recv(client->fd, heard, sizeof(heard), 0);
	if (size >= 0 &&
	    client->kind == CLIENT_RESETS) /* not before: a RST may overtake the ACK that makes the child */
		reset_at_close(client->fd);
	return size > 0 && client->kind == SERVER_CLOSES;
}

static void end(struct clients *all, struct client *client)
{
	watch(all->poll, EPOLL_CTL_DEL, client->fd, 0, NULL);
	all->running--;
	all->silent -= client->kind == SILENT;
	if (client->kind == KEPT && client->connected) {
		client->next = all->kept;
		all->kept = client;
		return;
	}
	close(client->fd);
	free(client);
}

/* mix_connect NUMBER SEED PORT REFUSED_PORT ADDRESS4 ADDRESS6 SILENT4 SILENT6: makes so many connections; returns when all have
 * ended. The data: KIND=NUMBER of each, ERRNO=NUMBER of what the attempts came to, given_up=NUMBER */
static void connects(struct actor *a, int count, char **w, struct reply *r)
{
	struct clients all = {.poll = epoll_create1(EPOLL_CLOEXEC)};
	int number = atoi(w[0]), begun = 0, of_kind[KINDS] = {};
	unsigned int state = atoi(w[1]);
	enum kind *order = shuffled(number, &state);
	char mapped[2][64];

	for (int i = 0; i < 2; i++)
		snprintf(mapped[i], sizeof(mapped[i]), "::ffff:%s", w[4 + 2 * i]);
	while (begun < number || all.running || all.waits) {
		struct epoll_event events[EVENTS];
		int ready;

		while (begun < number && all.running - all.silent < AT_ONCE) {
			enum kind kind = order[begun++];
			int unanswered = is_unanswered(kind), family = chance(&state) % 3;
			const char *address = family == 2 ? mapped[unanswered] : w[4 + 2 * unanswered + family];

			of_kind[kind]++;
			if (start(&all, kind, address, kind == REFUSED ? w[3] : w[2])) {
				add(r, "%s %s", kinds[kind].name, address);
				outcome(r, -1);
				return;
			}
			if (all.waits > GIVEN_UP)
				give_up_oldest(&all);
		}
		while (all.waits && begun == number)
			give_up_oldest(&all);
		ready = all.running ? epoll_wait(all.poll, events, EVENTS, -1) : 0;
		for (int i = 0; i < ready; i++)
			if (!move(&all, events[i].data.ptr))
				end(&all, events[i].data.ptr);
	}
	while (all.kept) {
		struct client *client = all.kept;

		all.kept = client->next;
		close(client->fd);
		free(client);
	}
	outcome(r, number);
	for (int i = 0; i < KINDS; i++)
		add(r, "%s=%d ", kinds[i].name, of_kind[i]);
	for (int i = 0; i < ERRNOS; i++)
		if (all.outcomes[i])
			add(r, "%d=%d ", i, all.outcomes[i]);
	add(r, "given_up=%d", all.given_up);
	close(all.poll);
	free(order);
}

const struct entry mix_commands[] = {
	{"mix_serve", serve},
	{"mix_connect", connects},
	{},
};
