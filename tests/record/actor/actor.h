/* SPDX-License-Identifier: BSD-2-Clause */
/* What the files of the actor share: see main.c. */
#ifndef ACTOR_H
#define ACTOR_H

#include <stdbool.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>

#define SLOTS 2100           /* sockets of a process, by number */
#define MESSAGE (192 * 1024) /* of a command or its answer */
#define WORDS 64

/* What came of a command. */
struct reply {
	long long begin, end; /* CLOCK_MONOTONIC, ns: around the system call */
	long long ret;        /* what it returned; -1 with `error` */
	int error;            /* errno, 0 for none */
	int fd;               /* sent along, -1 for none */
	int size;
	char data[MESSAGE];
};

/* A process that plays, or a thread of one. Threads have their own `control` and share `slots`. */
struct actor {
	int control; /* commands come here, answers go there */
	int *slots;
	int given; /* a descriptor that came with the command, -1 for none */
};

typedef void command(struct actor *actor, int count, char **words, struct reply *reply);

struct entry {
	const char *name;
	command *run;
};

extern const struct entry socket_commands[], host_commands[], mix_commands[], row_commands[], uring_commands[],
	i386_commands[], byte_commands[];

/* process.c */
int split(char *line, char **words);
void decode(char *word);                                              /* %XX in place */
ssize_t send_with(int socket, const void *data, size_t size, int fd); /* with a descriptor; -1 for none */
ssize_t receive_with(int socket, void *data, size_t size, int *fd);
void become(struct actor *actor, int control);
void *perform(void *actor); /* until its control is closed */
long long now_ns(void);
void add(struct reply *reply, const char *format, ...) __attribute__((format(printf, 2, 3)));
void add_hex(struct reply *reply, const void *bytes, size_t size);
void outcome(struct reply *reply, long long ret);
int *slot(struct actor *actor, const char *word);

/* calls.c */
socklen_t to_address(const char *text, const char *port, struct sockaddr_storage *address);
size_t from_hex(const char *text, void *bytes, size_t room);

/* net.c */
struct host {
	int netns;
	unsigned long inode;
};
int make_lab(struct host hosts[2]); /* 0, or -1 with errno; `where` says what failed */
extern const char *where;
int neighbours(int number, const char *mac); /* of host `number`, here: NULL forgets its peer's link address */
int link_up(bool up);
int write_sysctl(const char *name, const char *value);

#endif
