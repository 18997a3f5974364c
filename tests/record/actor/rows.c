/* SPDX-License-Identifier: BSD-2-Clause */
/* What a tool has written so far: its file lies where the script does, which is the working directory. */
#define _GNU_SOURCE
#include "actor.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* netns: the number of the network namespace that this process is in */
static void netns(struct actor *a, int count, char **w, struct reply *r)
{
	struct stat about = {};
	int failed = stat("/proc/thread-self/ns/net", &about);

	outcome(r, failed ? -1 : (long long)about.st_ino);
}

/* bytes FILE: how many it holds */
static void bytes(struct actor *a, int count, char **w, struct reply *r)
{
	struct stat about = {};
	int failed = stat(w[0], &about);

	outcome(r, failed ? -1 : (long long)about.st_size);
}

/* Whether a row, a line of JSON, says "name":number. */
static bool says(const char *row, const char *name, const char *number)
{
	char text[128];
	int size = snprintf(text, sizeof(text), "\"%s\":%s", name, number);
	const char *found = strstr(row, text);

	return found && strchr(",}", found[size]);
}

/* rows FILE FROM [NAME NUMBER] ...: how many whole rows there are from a byte on in which these columns have these values */
static void rows(struct actor *a, int count, char **w, struct reply *r)
{
	FILE *file = fopen(w[0], "re");
	char *line = NULL;
	size_t room = 0;
	ssize_t size;
	int found = 0;

	if (!file || fseek(file, atol(w[1]), SEEK_SET)) {
		outcome(r, -1);
		return;
	}
	while ((size = getline(&line, &room, file)) > 0 && line[size - 1] == '\n') {
		bool wanted = true;

		for (int i = 2; wanted && i + 1 < count; i += 2)
			wanted = says(line, w[i], w[i + 1]);
		found += wanted;
	}
	free(line);
	fclose(file);
	outcome(r, found);
}

const struct entry row_commands[] = {
	{"netns", netns},
	{"bytes", bytes},
	{"rows", rows},
	{},
};
