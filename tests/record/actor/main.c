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

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROCESSES 32
#define STAGES 4
#define PATIENCE_NS (180 * 1000000000LL) /* without any answer a scenario is stuck */

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

/* The line of a file below /proc/PID that begins so. */
static void line_of(pid_t pid, const char *file, const char *start, char *line, int size)
{
	char path[64];
	bool found = false;
	FILE *opened;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	opened = fopen(path, "r");
	while (opened && !found && fgets(line, size, opened))
		found = !strncmp(line, start, strlen(start));
	if (opened)
		fclose(opened);
	if (!found)
		snprintf(line, size, "%s?", start);
	line[strcspn(line, "\n")] = 0;
}

/* It is at this step and nobody answers: what its processes are at. */
static void stuck(struct scenario *scenario)
{
	const struct step *step = &scenario->steps[scenario->next - 1];
	static const char *const lines[] = {"State:", "SigPnd:", "ShdPnd:", "SigBlk:", "voluntary_ctxt_switches:"};
	char said[2048], line[160];
	int length = snprintf(said, sizeof(said), "stuck at step %d: %s", step->number, step->text);

	for (int i = 0; i < PROCESSES && length < (int)sizeof(said); i++) {
		const struct process *process = &scenario->processes[i];

		if (process->step < 0)
			continue;
		line_of(process->pid, "syscall", "", line, sizeof(line));
		length += snprintf(said + length, sizeof(said) - length, "; step %d is in system call %s",
				   scenario->steps[process->step].number, line);
		for (size_t n = 0; n < sizeof(lines) / sizeof(*lines) && length < (int)sizeof(said); n++) {
			line_of(process->pid, "status", lines[n], line, sizeof(line));
			length += snprintf(said + length, sizeof(said) - length, ", %s", line);
		}
	}
	fail(scenario, "%s", said);
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
		fail(scenario, "step %d: %s: %lld %s %s", step->number, step->text, step->ret, strerror(step->error),
		     line + used);
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
		fail(scenario, "step %d: process %d is not there for '%s'", scenario->steps[index].number, number,
		     text);
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
				stuck(scenario);
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
