/* SPDX-License-Identifier: BSD-2-Clause */
/* A process that plays, or a thread of one: it takes a command from its control, runs it and answers. */
#define _GNU_SOURCE
#include "actor.h"

#include <err.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

long long now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* -- answers ----------------------------------------------------------------------------------------------------- */

void add(struct reply *reply, const char *format, ...)
{
	va_list list;
	int size, room = MESSAGE - reply->size;

	va_start(list, format);
	size = vsnprintf(reply->data + reply->size, room, format, list);
	va_end(list);
	reply->size += size < room ? size : room - 1;
}

void add_hex(struct reply *reply, const void *bytes, size_t size)
{
	for (size_t i = 0; i < size; i++)
		add(reply, "%02x", ((const unsigned char *)bytes)[i]);
}

/* The answer of a system call; to be called at once after it. */
void outcome(struct reply *reply, long long ret)
{
	int error = errno;

	reply->end = now_ns();
	reply->ret = ret;
	reply->error = ret < 0 ? error : 0;
}

int *slot(struct actor *actor, const char *word)
{
	int number = atoi(word);

	if (number < 0 || number >= SLOTS)
		errx(1, "slot %s", word);
	return &actor->slots[number];
}

ssize_t send_with(int socket, const void *data, size_t size, int fd)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control = {};
	struct iovec piece = {.iov_base = (void *)data, .iov_len = size};
	struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};

	if (fd >= 0) {
		control.header = (struct cmsghdr){
			.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
		message.msg_control = &control;
		message.msg_controllen = sizeof(control);
	}
	return TEMP_FAILURE_RETRY(sendmsg(socket, &message, MSG_NOSIGNAL));
}

ssize_t receive_with(int socket, void *data, size_t size, int *fd)
{
	char control[CMSG_SPACE(sizeof(int))] = {};
	struct iovec piece = {.iov_base = data, .iov_len = size};
	struct msghdr message = {
		.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	ssize_t got = TEMP_FAILURE_RETRY(recvmsg(socket, &message, 0)); /* `interrupt` goes on between two commands */
	struct cmsghdr *header = got < 0 ? NULL : CMSG_FIRSTHDR(&message);

	*fd = -1;
	if (header && header->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(header), sizeof(*fd));
	return got;
}

/* -- commands ---------------------------------------------------------------------------------------------------- */

void decode(char *word)
{
	char *to = word;

	for (; *word; word++) {
		unsigned int byte;

		if (*word == '%' && sscanf(word + 1, "%2x", &byte) == 1) {
			*to++ = byte;
			word += 2;
		} else {
			*to++ = *word;
		}
	}
	*to = 0;
}

int split(char *line, char **words)
{
	char *rest;
	int count = 0;

	for (char *word = strtok_r(line, " ", &rest); word && count < WORDS; word = strtok_r(NULL, " ", &rest))
		words[count++] = word;
	return count;
}

static command *find(const char *name)
{
	const struct entry *tables[] = {socket_commands, host_commands, mix_commands, row_commands,
					uring_commands,  i386_commands, byte_commands};

	for (size_t i = 0; i < sizeof(tables) / sizeof(*tables); i++)
		for (const struct entry *entry = tables[i]; entry->name; entry++)
			if (!strcmp(entry->name, name))
				return entry->run;
	return NULL;
}

static void run(struct actor *actor, int count, char **words, struct reply *reply)
{
	command *command = count ? find(words[0]) : NULL;

	reply->size = 0;
	reply->data[0] = 0;
	reply->fd = -1;
	reply->begin = now_ns();
	reply->end = 0;
	errno = 0;
	if (!command) {
		add(reply, "no command '%s'", count ? words[0] : "");
		errno = ENOSYS;
		outcome(reply, -1);
		return;
	}
	command(actor, count - 1, words + 1, reply);
	if (!reply->end)
		reply->end = now_ns();
}

static bool holds(long long ret, const char *op, long long value)
{
	return !strcmp(op, "==")   ? ret == value
	       : !strcmp(op, ">=") ? ret >= value
	       : !strcmp(op, "<=") ? ret <= value
	       : !strcmp(op, "!=") ? ret != value
				   : false;
}

/* until OP VALUE SECONDS COMMAND ... */
static void repeat(struct actor *actor, int count, char **words, struct reply *reply)
{
	long long value = atoll(words[2]), end = now_ns() + atoll(words[3]) * 1000000000LL;
	struct timespec pause = {.tv_nsec =
					 10000000}; /* many wait at a time, and a look costs an emulated guest much */

	for (;;) {
		run(actor, count - 4, words + 4, reply);
		if (holds(reply->ret, words[1], value))
			return;
		if (now_ns() > end) {
			add(reply, " waited in vain for %s %lld, it is %lld", words[1], value, reply->ret);
			reply->ret = -1;
			reply->error = ETIME;
			return;
		}
		clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
	}
}

void become(struct actor *actor, int control)
{
	if (dup2(control, 3) < 0)
		err(1, "control");
	actor->control = 3;
}

/* fork and thread: a further actor, which gets the control that came along. */
static void multiply(struct actor *actor, bool thread, struct reply *reply)
{
	struct actor *other = malloc(sizeof(*other));
	int control = actor->given;
	pthread_t started;
	pid_t pid;

	*other = (struct actor){.control = control, .slots = actor->slots, .given = -1};
	reply->begin = now_ns();
	if (thread) {
		errno = pthread_create(&started, NULL, perform, other);
		outcome(reply, errno ? -1 : 0);
		return;
	}
	pid = fork();
	outcome(reply, pid);
	if (!pid) {
		become(other, control);
		if (control != 3)
			close(control);
		perform(other);
		_exit(0);
	}
	close(control);
}

void *perform(void *argument)
{
	struct actor *actor = argument;
	struct reply *reply = malloc(sizeof(*reply));
	char *message = malloc(MESSAGE), *words[WORDS], head[128];
	ssize_t size;

	while ((size = receive_with(actor->control, message, MESSAGE - 1, &actor->given)) > 0) {
		int count, length;
		char *answer;

		message[size] = 0;
		count = split(message, words);
		for (int i = 0; i < count; i++)
			decode(words[i]);
		reply->fd = -1;
		if (count && !strcmp(words[0], "exit"))
			_exit(atoi(words[1]));
		if (count && (!strcmp(words[0], "fork") || !strcmp(words[0], "thread"))) {
			reply->size = 0;
			multiply(actor, words[0][0] == 't', reply);
		} else if (count > 4 && !strcmp(words[0], "until")) {
			repeat(actor, count, words, reply);
		} else {
			run(actor, count, words, reply);
		}
		length = snprintf(head, sizeof(head), "%lld %lld %lld %d ", reply->begin, reply->end, reply->ret,
				  reply->error);
		answer = malloc(length + reply->size + 1);
		memcpy(answer, head, length);
		memcpy(answer + length, reply->data, reply->size);
		if (send_with(actor->control, answer, length + reply->size, reply->fd) < 0)
			err(1, "answer");
		free(answer);
	}
	return NULL;
}
