/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Plays scenarios, many at a time, and writes down what every call came to: tests/record/script.py makes the script.
 *
 *   actor SCRIPT LOG AT_ONCE
 *
 * A scenario has two hosts (network namespaces joined by a veth pair) and processes in them. Its steps are done one after
 * the other, each in the process that it names; scenarios do not wait for each other. A line of the script:
 *
 *   S NAME                          a scenario begins
 *   STEP PROCESS MODE COMMAND ...   MODE: '!' must succeed, '=' must return 0, '-' may fail, '&' is not waited for (see join)
 *   STEP * ! CONDUCTOR ...          spawn PROCESS HOST COMM | fork, thread PROCESS OF | pass A SLOT B SLOT |
 *                                   kill PROCESS SIGNAL | join STEP | tools | rest | moment | played
 *
 * Words have %XX for blanks, for dollar and percent signs and for what is no ASCII. $N is what step N returned, $N+M so much more.
 * `until OP VALUE SECONDS COMMAND ...` repeats a command until it returns what is asked for.
 *
 * `tools` waits until the tools that are recorded run, `moment` until those have run that only look at what is there. When
 * all scenarios have come to it, or have ended, "tools" or "moment" is printed and a line waited for on stdin. "played" is
 * printed at the end, and again a line waited for: namespaces last that long, so that the number of one is never given
 * to another. The processes of a scenario that waits for `played` last that long, too. `rest` only waits for the other
 * scenarios, until they have come to it or to `moment`, or have ended.
 *
 * A line of the log:
 *   r SCENARIO STEP BEGIN_NS END_NS RETURNED ERRNO DATA
 *   h SCENARIO HOST INODE           the network namespace of a host
 *   p SCENARIO PROCESS PID
 *   f SCENARIO TEXT                 it failed: nothing of it is to be believed
 */
#define _GNU_SOURCE
#include "actor.h"

#include <ctype.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROCESSES 32
#define STAGES 4
#define PATIENCE_NS (180 * 1000000000LL) /* without any answer a scenario is stuck */

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

static ssize_t send_with(int socket, const void *data, size_t size, int fd)
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

static ssize_t receive_with(int socket, void *data, size_t size, int *fd)
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

/* -- a process that plays ---------------------------------------------------------------------------------------- */

static void decode(char *word)
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

static int split(char *line, char **words)
{
	int count = 0;

	for (char *word = strtok(line, " "); word && count < WORDS; word = strtok(NULL, " "))
		words[count++] = word;
	return count;
}

static command *find(const char *name)
{
	const struct entry *tables[] = {socket_commands, host_commands, mix_commands, row_commands, uring_commands};

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
	return !strcmp(op, "==") ? ret == value :
	       !strcmp(op, ">=") ? ret >= value :
	       !strcmp(op, "<=") ? ret <= value :
	       !strcmp(op, "!=") ? ret != value :
				   false;
}

/* until OP VALUE SECONDS COMMAND ... */
static void repeat(struct actor *actor, int count, char **words, struct reply *reply)
{
	long long value = atoll(words[2]), end = now_ns() + atoll(words[3]) * 1000000000LL;
	struct timespec pause = {.tv_nsec = 1000000};

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

static void *perform(void *argument);

static void become(struct actor *actor, int control)
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

static void *perform(void *argument)
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
		length = snprintf(head, sizeof(head), "%lld %lld %lld %d ", reply->begin, reply->end, reply->ret, reply->error);
		answer = malloc(length + reply->size + 1);
		memcpy(answer, head, length);
		memcpy(answer + length, reply->data, reply->size);
		if (send_with(actor->control, answer, length + reply->size, reply->fd) < 0)
			err(1, "answer");
		free(answer);
	}
	return NULL;
}

/* -- the conductor ----------------------------------------------------------------------------------------------- */

struct process {
	int control; /* -1: there is none */
	pid_t pid;
	bool thread;
	int step; /* what it is at, index into the steps of its scenario, -1 for nothing */
};

struct step {
	int number;
	char *process, *mode, *text;
	bool answered;
	long long ret;
	int error;
};

struct scenario {
	char *name;
	struct step *steps;
	int count, next, joins; /* joins: the step that is waited for, -1 for none */
	struct host hosts[2];
	struct process processes[PROCESSES];
	bool made, over;
	int stage; /* of the stages, the one that it waits for; STAGES: for none */
	long long since;
};

static const char *const stages[STAGES] = {"tools", "rest", "moment", "played"};
static struct scenario *scenarios;
static int scenario_count;
static FILE *record;
static int home;

static void fail(struct scenario *scenario, const char *format, ...)
{
	va_list list;

	fprintf(record, "f %td ", scenario - scenarios);
	va_start(list, format);
	vfprintf(record, format, list);
	va_end(list);
	fputc('\n', record);
	scenario->over = true;
}

static void finish(struct scenario *scenario)
{
	for (int i = 0; i < PROCESSES; i++) {
		struct process *process = &scenario->processes[i];

		if (process->control >= 0)
			close(process->control);
		process->control = -1;
		if (process->pid > 0 && !process->thread) {
			kill(process->pid, SIGKILL);
			waitpid(process->pid, NULL, 0);
		}
		process->pid = 0;
	}
	scenario->over = true;
}

static void read_script(const char *path)
{
	FILE *file = fopen(path, "r");
	char *line = NULL;
	size_t room = 0;
	ssize_t size;

	if (!file)
		err(1, "%s", path);
	while ((size = getline(&line, &room, file)) > 0) {
		struct scenario *scenario;
		struct step *step;
		char *at, *copy;

		if (line[size - 1] == '\n')
			line[size - 1] = 0;
		copy = strdup(line);
		if (copy[0] == 'S') {
			scenarios = realloc(scenarios, (scenario_count + 1) * sizeof(*scenarios));
			scenarios[scenario_count] = (struct scenario){.name = copy + 2, .joins = -1, .stage = STAGES};
			for (int i = 0; i < PROCESSES; i++)
				scenarios[scenario_count].processes[i] = (struct process){.control = -1, .step = -1};
			scenario_count++;
			continue;
		}
		scenario = &scenarios[scenario_count - 1];
		scenario->steps = realloc(scenario->steps, (scenario->count + 1) * sizeof(*step));
		step = &scenario->steps[scenario->count++];
		*step = (struct step){.number = strtol(strsep(&copy, " "), &at, 10)};
		step->process = strsep(&copy, " ");
		step->mode = strsep(&copy, " ");
		step->text = copy;
		if (!step->text)
			errx(1, "%s: '%s' is no step", path, line);
	}
	free(line);
	fclose(file);
}

/* $N and $N+M in a command. */
static bool substitute(struct scenario *scenario, const char *text, char *out, size_t room)
{
	size_t at = 0;

	while (*text && at + 32 < room) {
		char *rest;
		long number, more = 0;

		if (*text != '$') {
			out[at++] = *text++;
			continue;
		}
		number = strtol(text + 1, &rest, 10);
		if (*rest == '+' || *rest == '-')
			more = strtol(rest, &rest, 10);
		text = rest;
		if (number < 0 || number >= scenario->count || !scenario->steps[number].answered)
			return false;
		at += snprintf(out + at, room - at, "%lld", scenario->steps[number].ret + more);
	}
	out[at] = 0;
	return true;
}

static void answered(struct scenario *scenario, struct step *step, const char *line)
{
	long long begin, end;
	int used = 0;

	if (sscanf(line, "%lld %lld %lld %d %n", &begin, &end, &step->ret, &step->error, &used) < 4) {
		fail(scenario, "step %d: no answer: %s", step->number, line);
		return;
	}
	step->answered = true;
	fprintf(record, "r %td %d %s\n", scenario - scenarios, step->number, line);
	if ((step->mode[0] == '!' && step->ret < 0) || (step->mode[0] == '=' && step->ret)) {
		fail(scenario, "step %d: %s: %lld %s %s", step->number, step->text, step->ret, strerror(step->error), line + used);
		finish(scenario);
	}
}

static void note(struct scenario *scenario, struct step *step, long long ret)
{
	char line[128];
	long long now = now_ns();

	snprintf(line, sizeof(line), "%lld %lld %lld %d ", now, now, ret, ret < 0 ? errno : 0);
	answered(scenario, step, line);
}

/* A process in a host, which performs what comes on its control. */
static void spawn(struct scenario *scenario, int number, int host, const char *comm)
{
	struct process *process = &scenario->processes[number];
	int ends[2];
	pid_t pid, parent = getpid();

	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends))
		err(1, "socketpair");
	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (!pid) {
		struct actor actor = {.slots = malloc(SLOTS * sizeof(int)), .given = -1};

		for (int i = 0; i < SLOTS; i++)
			actor.slots[i] = -1;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent || setns(scenario->hosts[host].netns, CLONE_NEWNET))
			err(1, "host");
		prctl(PR_SET_NAME, comm);
		become(&actor, ends[1]);
		syscall(SYS_close_range, 4, ~0U, 0);
		perform(&actor);
		_exit(0);
	}
	close(ends[1]);
	*process = (struct process){.control = ends[0], .pid = pid, .step = -1};
	fprintf(record, "p %td %d %d\n", scenario - scenarios, number, pid);
}

static void tell(struct scenario *scenario, int number, int index, const char *text, int fd)
{
	struct process *process = &scenario->processes[number];

	if (process->control < 0 || send_with(process->control, text, strlen(text), fd) < 0) {
		fail(scenario, "step %d: process %d is not there for '%s'", scenario->steps[index].number, number, text);
		finish(scenario);
		return;
	}
	process->step = index;
}

/* Waits for the one answer of a process: only for what takes no time. */
static int ask(struct scenario *scenario, int number, const char *text, int fd, char *line, size_t room)
{
	struct process *process = &scenario->processes[number];
	int came = -1;
	ssize_t size;

	if (send_with(process->control, text, strlen(text), fd) < 0)
		return -1;
	size = receive_with(process->control, line, room - 1, &came);
	line[size < 0 ? 0 : size] = 0;
	return came;
}

static void conduct(struct scenario *scenario, struct step *step, char *text)
{
	char *words[WORDS], line[256];
	int count = split(text, words), number = count > 1 ? atoi(words[1]) : 0, ends[2], fd;
	struct process *process = &scenario->processes[number];

	if (!strcmp(words[0], "spawn")) {
		decode(words[3]);
		spawn(scenario, number, atoi(words[2]), words[3]);
		note(scenario, step, process->pid);
	} else if (!strcmp(words[0], "fork") || !strcmp(words[0], "thread")) {
		if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
			err(1, "socketpair");
		ask(scenario, atoi(words[2]), words[0], ends[1], line, sizeof(line));
		close(ends[1]);
		answered(scenario, step, line);
		*process = (struct process){.control = ends[0], .pid = step->ret, .step = -1, .thread = true};
		if (words[0][0] == 'f')
			fprintf(record, "p %td %d %lld\n", scenario - scenarios, number, step->ret);
	} else if (!strcmp(words[0], "pass")) {
		snprintf(line, sizeof(line), "give %s", words[2]);
		fd = ask(scenario, number, line, -1, line, sizeof(line));
		snprintf(line, sizeof(line), "take %s", words[4]);
		ask(scenario, atoi(words[3]), line, fd, line, sizeof(line));
		close(fd);
		answered(scenario, step, line);
	} else if (!strcmp(words[0], "kill")) {
		long long ret = -1;

		/* Zero and less would name a group of processes, or all of them: a thread, or a fork that failed. */
		errno = ESRCH;
		if (process->pid > 0)
			ret = kill(process->pid, atoi(words[2]));
		if (atoi(words[2]) == SIGKILL || atoi(words[2]) == SIGTERM) {
			if (process->pid > 0 && !process->thread)
				waitpid(process->pid, NULL, 0);
			close(process->control);
			process->control = -1;
			process->pid = 0;
			if (process->step >= 0)
				scenario->steps[process->step].answered = true;
			process->step = -1;
		}
		note(scenario, step, ret);
	} else {
		fail(scenario, "step %d: no '%s'", step->number, words[0]);
	}
}

static int stage_called(const char *name)
{
	int stage = 0;

	while (stage < STAGES && strcmp(name, stages[stage]))
		stage++;
	return stage;
}

/* Goes on until something has to be waited for; so many stages have been reached by all. */
static void advance(struct scenario *scenario, int reached)
{
	static char text[MESSAGE];

	if (!scenario->made) {
		scenario->made = true;
		if (make_lab(scenario->hosts)) {
			fail(scenario, "no hosts: %s: %s", where, strerror(errno));
			return;
		}
		for (int i = 0; i < 2; i++)
			fprintf(record, "h %td %d %lu\n", scenario - scenarios, i, scenario->hosts[i].inode);
		if (setns(home, CLONE_NEWNET))
			err(1, "home");
	}
	while (!scenario->over) {
		struct step *step = &scenario->steps[scenario->next];
		int number;

		if (scenario->joins >= 0) {
			if (!scenario->steps[scenario->joins].answered)
				return;
			scenario->joins = -1;
		}
		scenario->since = now_ns();
		if (scenario->next == scenario->count) {
			finish(scenario);
			return;
		}
		if (!substitute(scenario, step->text, text, sizeof(text))) {
			fail(scenario, "step %d: %s: it needs what has not been answered", step->number, step->text);
			finish(scenario);
			return;
		}
		scenario->stage = stage_called(text);
		if (scenario->stage < STAGES) {
			if (scenario->stage >= reached)
				return;
			scenario->stage = STAGES;
			note(scenario, step, 0);
			scenario->next++;
			continue;
		}
		scenario->next++;
		if (!strncmp(text, "join ", 5)) {
			scenario->joins = atoi(text + 5);
			step->answered = true;
			continue;
		}
		if (step->process[0] == '*') {
			conduct(scenario, step, text);
			continue;
		}
		number = atoi(step->process);
		tell(scenario, number, step - scenario->steps, text, -1);
		if (step->mode[0] != '&') {
			scenario->joins = step - scenario->steps;
			return;
		}
	}
}

/* What has come: of each process at most one answer. Returns whether any came within 100 ms. */
static void listen_to_all(void)
{
	static struct pollfd *polled;
	static char line[MESSAGE];
	struct process *whose[4096];
	struct scenario *of[4096];
	int count = 0;

	if (!polled)
		polled = calloc(4096, sizeof(*polled));
	for (int i = 0; i < scenario_count; i++)
		for (int j = 0; j < PROCESSES && !scenarios[i].over && count < 4096; j++)
			if (scenarios[i].processes[j].step >= 0) {
				whose[count] = &scenarios[i].processes[j];
				of[count] = &scenarios[i];
				polled[count++] = (struct pollfd){.fd = whose[count - 1]->control, .events = POLLIN};
			}
	if (poll(polled, count, count ? 100 : 0) < 0)
		err(1, "poll");
	for (int i = 0; i < count; i++) {
		struct step *step;
		ssize_t size;
		int fd;

		if (!polled[i].revents || of[i]->over || whose[i]->step < 0)
			continue;
		step = &of[i]->steps[whose[i]->step];
		size = receive_with(whose[i]->control, line, sizeof(line) - 1, &fd);
		if (fd >= 0)
			close(fd);
		whose[i]->step = -1;
		if (size <= 0) { /* it has ended: by `exit`, by a signal */
			close(whose[i]->control);
			whose[i]->control = -1;
			note(of[i], step, 0);
			continue;
		}
		line[size] = 0;
		answered(of[i], step, line);
	}
}

static void wait_for_line(const char *what)
{
	char line[16];

	fflush(record);
	printf("%s\n", what);
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		errx(1, "nobody answered to '%s'", what);
}

/* Plays until all have ended or wait for a stage that is yet to come. */
static void play(int at_once, int reached)
{
	for (;;) {
		int running = 0;

		for (int i = 0; i < scenario_count && running < at_once; i++) {
			struct scenario *scenario = &scenarios[i];

			if (scenario->over || (scenario->stage < STAGES && scenario->stage >= reached))
				continue;
			running++;
			advance(scenario, reached);
			if (!scenario->over && scenario->since + PATIENCE_NS < now_ns()) {
				fail(scenario, "stuck at step %d: %s", scenario->steps[scenario->next - 1].number,
				     scenario->steps[scenario->next - 1].text);
				finish(scenario);
			}
		}
		if (!running)
			return;
		listen_to_all();
	}
}

int main(int argc, char **argv)
{
	struct rlimit files;

	if (argc != 4)
		errx(2, "see the head of the source");
	signal(SIGPIPE, SIG_IGN);
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	read_script(argv[1]);
	record = fopen(argv[2], "w");
	home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	if (!record || home < 0)
		err(1, "%s", argv[2]);
	for (int reached = 0; reached < STAGES; reached++) {
		play(atoi(argv[3]), reached);
		if (strcmp(stages[reached], "rest"))
			wait_for_line(stages[reached]);
	}
	play(atoi(argv[3]), STAGES);
	fclose(record);
	return 0;
}
