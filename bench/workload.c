// SPDX-License-Identifier: BSD-2-Clause
/*
 * The bench's traffic: connections of one thread with itself, over the loopback of a network namespace of its own.
 *
 * connect() to a listener on loopback completes in the caller's context, so that accept() finds the connection and
 * nobody waits for anybody: no context switch, no second process, and the BPF programs run in the time that is
 * measured. Every batch has a new namespace, because the sockets in TIME_WAIT of the one before would slow the choice
 * of a local port down.
 *
 *   workload connections CPU BATCHES CONNECTIONS EXCHANGES
 *       as fast as possible; a line per batch: ns per connection by the clock, and by the CPU time of this thread
 *   workload rate CPU PER_SECOND SECONDS
 *       at this rate, in steps of a millisecond; a line: connections made, ns that it took
 *   workload storm CPU BATCHES SYNS
 *       SYNs that the kernel discards, since their checksum is wrong; a line per batch: ns per SYN, both as above
 *   workload sends CPU BATCHES SENDS
 *       on one connection a send() of a kilobyte and a recv() of it; a line per batch: ns per send, both as above
 *   workload steady CPU BATCHES SENDS BYTES PER_SECOND
 *       the same with messages of BYTES, at this rate, in steps of a millisecond
 *   workload probe MILLISECONDS
 *       a connection each time so much time has passed, until stdin ends; the client of number N is bound to
 *       127.1.(N/256).(N%256). A line per connection: N, CLOCK_MONOTONIC in ns before it began
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PORT 7777
#define BATCH 5000
#define MESSAGE 1024

static long long now(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void sleep_until(long long ns)
{
	struct timespec time = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL))
		;
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "cpu %d", cpu);
}

static void new_namespace(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	int fd;

	if (unshare(CLONE_NEWNET))
		err(1, "network namespace");
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request))
		err(1, "loopback");
	close(fd);
}

static struct sockaddr_in address(unsigned int ip, int port)
{
	return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(ip)};
}

static int listen_at(const struct sockaddr_in *server)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0 || bind(fd, (const void *)server, sizeof(*server)) || listen(fd, 128))
		err(1, "listener");
	return fd;
}

static void one_connection(int listener, const struct sockaddr_in *server, const struct sockaddr_in *from,
			   int exchanges)
{
	int client = socket(AF_INET, SOCK_STREAM, 0), child;
	char byte = 'x';

	if (client < 0 || (from && bind(client, (const void *)from, sizeof(*from))))
		err(1, "client");
	if (connect(client, (const void *)server, sizeof(*server)))
		err(1, "connect");
	child = accept(listener, NULL, NULL);
	if (child < 0)
		err(1, "accept");
	while (exchanges--)
		if (send(client, &byte, 1, 0) != 1 || recv(child, &byte, 1, 0) != 1 || send(child, &byte, 1, 0) != 1 ||
		    recv(client, &byte, 1, 0) != 1)
			err(1, "exchange");
	close(client);
	close(child);
}

/* The last packets of a batch may still wait for their turn: with the namespace they would go, and never be handled. */
static void wait_until_closed(void)
{
	int in_use;

	do {
		FILE *file = fopen("/proc/self/net/sockstat", "r");

		in_use = 0;
		while (file && !feof(file) && fscanf(file, "TCP: inuse %d", &in_use) != 1)
			fscanf(file, "%*[^\n]\n");
		if (file)
			fclose(file);
		if (in_use > 1) /* the listener is one */
			sleep_until(now(CLOCK_MONOTONIC) + 1000000);
	} while (in_use > 1);
}

static void connections(int batches, int count, int exchanges)
{
	struct sockaddr_in server = address(0x7f4d0001, PORT); /* 127.77.0.1 */

	for (int batch = 0; batch < batches; batch++) {
		long long wall, cpu;
		int listener;

		new_namespace();
		listener = listen_at(&server);
		wall = now(CLOCK_MONOTONIC);
		cpu = now(CLOCK_THREAD_CPUTIME_ID);
		for (int i = 0; i < count; i++)
			one_connection(listener, &server, NULL, exchanges);
		printf("%lld %lld\n", (now(CLOCK_MONOTONIC) - wall) / count,
		       (now(CLOCK_THREAD_CPUTIME_ID) - cpu) / count);
		wait_until_closed();
		close(listener);
	}
}

static void rate(int per_second, int seconds)
{
	struct sockaddr_in server = address(0x7f4d0001, PORT);
	long long start, made = 0;
	int listener = -1;

	start = now(CLOCK_MONOTONIC);
	for (long long ms = 1; ms <= 1000LL * seconds; ms++) {
		long long due = ms * per_second / 1000;

		for (; made < due; made++) {
			if (made % BATCH == 0) {
				if (made)
					wait_until_closed();
				close(listener);
				new_namespace();
				listener = listen_at(&server);
			}
			one_connection(listener, &server, NULL, 0);
		}
		sleep_until(start + ms * 1000000);
	}
	printf("%lld %lld\n", made, now(CLOCK_MONOTONIC) - start);
	wait_until_closed();
	close(listener);
}

/* The number in the column `name` of /proc/net/snmp's lines "Tcp:". */
static long long tcp_counter(const char *name)
{
	char titles[1024], values[1024], *title, *value, *title_at, *value_at;
	FILE *file = fopen("/proc/self/net/snmp", "r");
	long long found = -1;

	while (file && fgets(titles, sizeof(titles), file) && fgets(values, sizeof(values), file)) {
		if (strncmp(titles, "Tcp:", 4))
			continue;
		title = strtok_r(titles, " \n", &title_at);
		value = strtok_r(values, " \n", &value_at);
		for (; title && value;
		     title = strtok_r(NULL, " \n", &title_at), value = strtok_r(NULL, " \n", &value_at))
			if (!strcmp(title, name))
				found = atoll(value);
	}
	if (file)
		fclose(file);
	return found;
}

static void storm(int batches, int count)
{
	struct sockaddr_in server = address(0x7f4d0001, PORT);
	struct {
		struct iphdr ip;
		struct tcphdr tcp;
	} packet = {
		.ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_TCP},
		.tcp = {.source = htons(1024), .dest = htons(PORT), .doff = 5, .syn = 1},
	};

	packet.ip.saddr = htonl(0x7f010001);
	packet.ip.daddr = server.sin_addr.s_addr;
	for (int batch = 0; batch < batches; batch++) {
		long long wall, cpu, discarded;
		int fd;

		new_namespace();
		fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
		if (fd < 0)
			err(1, "raw socket");
		wall = now(CLOCK_MONOTONIC);
		cpu = now(CLOCK_THREAD_CPUTIME_ID);
		for (int i = 0; i < count; i++) {
			if (sendto(fd, &packet, sizeof(packet), 0, (const void *)&server, sizeof(server)) < 0)
				err(1, "SYN");
		}
		printf("%lld %lld\n", (now(CLOCK_MONOTONIC) - wall) / count,
		       (now(CLOCK_THREAD_CPUTIME_ID) - cpu) / count);
		discarded = tcp_counter("InCsumErrors");
		if (discarded != count)
			errx(1, "of %d SYNs %lld were discarded", count, discarded);
		close(fd);
	}
}

/* `per_second`: 0, as fast as possible */
static void sends(int batches, int count, int bytes, long long per_second)
{
	struct sockaddr_in server = address(0x7f4d0001, PORT);
	char data[MESSAGE] = {};

	for (int batch = 0; batch < batches; batch++) {
		long long wall, cpu;
		int listener, client, child;

		new_namespace();
		listener = listen_at(&server);
		client = socket(AF_INET, SOCK_STREAM, 0);
		if (client < 0 || connect(client, (const void *)&server, sizeof(server)))
			err(1, "connect");
		child = accept(listener, NULL, NULL);
		if (child < 0)
			err(1, "accept");
		wall = now(CLOCK_MONOTONIC);
		cpu = now(CLOCK_THREAD_CPUTIME_ID);
		for (int i = 0; i < count; i++) {
			if (per_second && i % (per_second / 1000) == 0)
				sleep_until(wall + i * 1000000000LL / per_second);
			if (send(client, data, bytes, 0) != bytes || recv(child, data, bytes, MSG_WAITALL) != bytes)
				err(1, "send");
		}
		printf("%lld %lld\n", (now(CLOCK_MONOTONIC) - wall) / count,
		       (now(CLOCK_THREAD_CPUTIME_ID) - cpu) / count);
		close(client);
		close(child);
		wait_until_closed();
		close(listener);
	}
}

static void probe(int interval_ms)
{
	struct sockaddr_in server = address(0x7f4d0001, PORT);
	struct pollfd input = {.fd = 0, .events = POLLIN};
	long long next = now(CLOCK_MONOTONIC);
	int listener;

	new_namespace();
	listener = listen_at(&server);
	for (int i = 0; i < 65536 && !poll(&input, 1, 0); i++) {
		struct sockaddr_in from = address(0x7f010000 + i, 0);

		printf("%d %lld\n", i, now(CLOCK_MONOTONIC));
		if (!i)
			fflush(stdout); /* whoever waits knows that it goes on by itself from here */
		one_connection(listener, &server, &from, 0);
		next += interval_ms * 1000000LL;
		if (next > now(CLOCK_MONOTONIC))
			sleep_until(next);
		else
			next = now(CLOCK_MONOTONIC);
	}
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";

	if (argc > 3)
		pin(atoi(argv[2]));
	if (argc == 6 && !strcmp(mode, "connections"))
		connections(atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
	else if (argc == 5 && !strcmp(mode, "rate"))
		rate(atoi(argv[3]), atoi(argv[4]));
	else if (argc == 5 && !strcmp(mode, "storm"))
		storm(atoi(argv[3]), atoi(argv[4]));
	else if (argc == 5 && !strcmp(mode, "sends"))
		sends(atoi(argv[3]), atoi(argv[4]), MESSAGE, 0);
	else if (argc == 7 && !strcmp(mode, "steady") && atoi(argv[5]) <= MESSAGE && atoi(argv[6]) >= 1000)
		sends(atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), atoi(argv[6]));
	else if (argc == 3 && !strcmp(mode, "probe"))
		probe(atoi(argv[2]));
	else
		errx(2, "see the head of the source");
	return 0;
}
