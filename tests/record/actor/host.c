/* SPDX-License-Identifier: BSD-2-Clause */
/* The commands about a host: what the kernel says of it, what lies between it and its peer. For a process that lives there. */
#define _GNU_SOURCE
#include "actor.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define SOCK_DESTROY_ 21

/* sysctl NAME [VALUE]: the value afterwards */
static void sysctl_command(struct actor *a, int count, char **w, struct reply *r)
{
	static const char *const folders[] = {"", "ipv4/", "core/", "ipv6/"};
	char path[256], text[256];

	if (count > 1 && write_sysctl(w[0], w[1])) {
		outcome(r, -1);
		return;
	}
	for (int i = 0; i < 4; i++) {
		FILE *file;

		snprintf(path, sizeof(path), "/proc/sys/net/%s%s", folders[i], w[0]);
		file = fopen(path, "re");
		if (!file)
			continue;
		if (!fgets(text, sizeof(text), file))
			text[0] = 0;
		fclose(file);
		outcome(r, atoi(text));
		add(r, "%.*s", (int)strcspn(text, "\n"), text);
		return;
	}
	errno = ENOENT;
	outcome(r, -1);
}

/* Calls `each` with every counter: /proc/thread-self/net/{snmp,netstat} are pairs of lines, snmp6 has one on a line. */
static void counters(void (*each)(const char *group, const char *name, long long value, void *to), void *to)
{
	static const char *const files[] = {"snmp", "netstat", "snmp6"};
	static __thread char names[1 << 16], values[1 << 16];
	char path[64];

	for (int i = 0; i < 3; i++) {
		FILE *file;

		snprintf(path, sizeof(path), "/proc/thread-self/net/%s", files[i]);
		file = fopen(path, "re");
		while (file && fgets(names, sizeof(names), file)) {
			char *name, *value, *name_at, *value_at, *group;

			group = strtok_r(names, " \t\n", &name_at);
			if (i == 2) {
				each("", group, atoll(strtok_r(NULL, " \t\n", &name_at)), to);
				continue;
			}
			if (!fgets(values, sizeof(values), file))
				break;
			group[strlen(group) - 1] = 0; /* the colon */
			strtok_r(values, " \n", &value_at);
			while ((name = strtok_r(NULL, " \n", &name_at)) && (value = strtok_r(NULL, " \n", &value_at)))
				each(group, name, atoll(value), to);
		}
		if (file)
			fclose(file);
	}
}

static void add_counter(const char *group, const char *name, long long value, void *to)
{
	if (value)
		add(to, "%s%s=%lld ", group, name, value);
}

/* counters: all that are not zero */
static void all_counters(struct actor *a, int count, char **w, struct reply *r)
{
	counters(add_counter, r);
	outcome(r, 0);
}

struct wanted {
	const char *name;
	long long value;
};

static void is_wanted(const char *group, const char *name, long long value, void *to)
{
	struct wanted *wanted = to;
	size_t size = strlen(group);

	if (!strncmp(wanted->name, group, size) && !strcmp(wanted->name + size, name))
		wanted->value = value;
}

/* counter NAME [MINUS_NAME]: its value, or by how much it is more than another one's */
static void one_counter(struct actor *a, int count, char **w, struct reply *r)
{
	struct wanted wanted = {.name = w[0]}, minus = {.name = count > 1 ? w[1] : "none"};

	counters(is_wanted, &wanted);
	if (count > 1)
		counters(is_wanted, &minus);
	outcome(r, wanted.value - minus.value);
}

/* Calls `each` with every TCP socket of this namespace. 0, or -1 with errno. */
static int sockets(void (*each)(const struct inet_diag_msg *found, void *to), void *to)
{
	static const int families[] = {AF_INET, AF_INET6};
	static __thread char answer[1 << 17];
	int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);

	for (int i = 0; i < 2; i++) {
		struct {
			struct nlmsghdr header;
			struct inet_diag_req_v2 body;
		} request = {
			.header = {.nlmsg_len = sizeof(request),
				   .nlmsg_type = SOCK_DIAG_BY_FAMILY,
				   .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP},
			.body = {.sdiag_family = families[i], .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~0U},
		};
		bool done = false;

		if (netlink < 0 || send(netlink, &request, sizeof(request), 0) < 0)
			return -1;
		while (!done) {
			ssize_t size = recv(netlink, answer, sizeof(answer), 0);
			struct nlmsghdr *header = (void *)answer;

			if (size <= 0)
				return -1;
			for (; NLMSG_OK(header, size); header = NLMSG_NEXT(header, size)) {
				if (header->nlmsg_type == NLMSG_DONE || header->nlmsg_type == NLMSG_ERROR)
					done = true;
				else
					each(NLMSG_DATA(header), to);
			}
		}
	}
	close(netlink);
	return 0;
}

static const char *const states[] = {"?",         "ESTABLISHED", "SYN_SENT", "SYN_RECV",   "FIN_WAIT1",
				     "FIN_WAIT2", "TIME_WAIT",   "CLOSE",    "CLOSE_WAIT", "LAST_ACK",
				     "LISTEN",    "CLOSING",     "SYN_RECV"};

static const char *state_of(const struct inet_diag_msg *found)
{
	return found->idiag_state <= 12 ? states[found->idiag_state] : "?";
}

static void add_socket(const struct inet_diag_msg *found, void *to)
{
	char local[INET6_ADDRSTRLEN], remote[INET6_ADDRSTRLEN];
	unsigned long long cookie = (unsigned long long)found->id.idiag_cookie[1] << 32 | found->id.idiag_cookie[0];

	inet_ntop(found->idiag_family, found->id.idiag_src, local, sizeof(local));
	inet_ntop(found->idiag_family, found->id.idiag_dst, remote, sizeof(remote));
	add(to, "%d,%s,%s,%d,%s,%d,%u,%u,%llu,%u,%d;", found->idiag_family, state_of(found), local,
	    ntohs(found->id.idiag_sport), remote, ntohs(found->id.idiag_dport), found->idiag_rqueue,
	    found->idiag_wqueue, cookie, found->idiag_inode, found->idiag_retrans);
}

/* sockets: all of this host: family,state,laddr,lport,raddr,rport,recv_q,send_q,cookie,inode,retransmits; */
static void all_sockets(struct actor *a, int count, char **w, struct reply *r)
{
	outcome(r, sockets(add_socket, r));
}

struct chosen {
	const char *field, *state;
	int lport, rport;
	long long result;
};

static void is_chosen(const struct inet_diag_msg *found, void *to)
{
	struct chosen *chosen = to;

	if ((strcmp(chosen->state, "any") && strcmp(chosen->state, state_of(found))) ||
	    (chosen->lport && ntohs(found->id.idiag_sport) != chosen->lport) ||
	    (chosen->rport && ntohs(found->id.idiag_dport) != chosen->rport))
		return;
	if (!strcmp(chosen->field, "recv_q"))
		chosen->result += found->idiag_rqueue;
	else if (!strcmp(chosen->field, "send_q"))
		chosen->result += found->idiag_wqueue;
	else if (!strcmp(chosen->field, "retransmits"))
		chosen->result += found->idiag_retrans;
	else if (!strcmp(chosen->field, "owned"))
		chosen->result += !!found->idiag_inode;
	else
		chosen->result++;
}

/* diag FIELD STATE LPORT RPORT: how many sockets there are (count), how many of them a process has (owned: accept() has
 * taken it), or the sum of their recv_q, send_q, retransmits. The state may be `any`, a port 0. Of a listener recv_q and
 * send_q are the length and the limit of its accept queue. */
static void diag(struct actor *a, int count, char **w, struct reply *r)
{
	struct chosen chosen = {.field = w[0], .state = w[1], .lport = atoi(w[2]), .rport = atoi(w[3])};
	int failed = sockets(is_chosen, &chosen);

	outcome(r, failed ? -1 : chosen.result);
}

/* destroy LADDR LPORT RADDR RPORT: as `ss -K` does; the error is that of the kernel */
static void destroy(struct actor *a, int count, char **w, struct reply *r)
{
	struct {
		struct nlmsghdr header;
		struct inet_diag_req_v2 body;
	} request = {
		.header = {.nlmsg_len = sizeof(request),
			   .nlmsg_type = SOCK_DESTROY_,
			   .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
		.body = {.sdiag_family = strchr(w[0], ':') ? AF_INET6 : AF_INET,
			 .sdiag_protocol = IPPROTO_TCP,
			 .idiag_states = ~0U,
			 .id = {.idiag_sport = htons(atoi(w[1])),
				.idiag_dport = htons(atoi(w[3])),
				.idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}}},
	};
	int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	char answer[4096];
	struct nlmsghdr *header = (void *)answer;

	inet_pton(request.body.sdiag_family, w[0], request.body.id.idiag_src);
	inet_pton(request.body.sdiag_family, w[2], request.body.id.idiag_dst);
	r->begin = now_ns();
	if (netlink < 0 || send(netlink, &request, sizeof(request), 0) < 0 ||
	    recv(netlink, answer, sizeof(answer), 0) < 0) {
		outcome(r, -1);
		return;
	}
	errno = -((struct nlmsgerr *)NLMSG_DATA(header))->error;
	outcome(r, errno ? -1 : 0);
	close(netlink);
}

/* neighbour HOST [MAC]: where this host sends what is for its peer; without MAC it does not know, and keeps it back */
static void neighbour_command(struct actor *a, int count, char **w, struct reply *r)
{
	outcome(r, neighbours(atoi(w[0]), count > 1 ? w[1] : NULL));
}

/* link up|down */
static void link_command(struct actor *a, int count, char **w, struct reply *r)
{
	outcome(r, link_up(!strcmp(w[0], "up")));
}

/* flush: returns when all packets that were received before have been handled, on every processor: one that is sent to
 * ourselves passes the backlog of a processor behind them */
static void flush(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int echo = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), ret = 0;
	socklen_t size = sizeof(address);
	cpu_set_t allowed, one;
	char byte;

	sched_getaffinity(0, sizeof(allowed), &allowed);
	if (echo < 0 || bind(echo, (void *)&address, size) || getsockname(echo, (void *)&address, &size))
		ret = -1;
	for (int cpu = 0; !ret && cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &allowed))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		if (sched_setaffinity(0, sizeof(one), &one) || sendto(echo, "", 1, 0, (void *)&address, size) != 1 ||
		    recv(echo, &byte, 1, 0) != 1)
			ret = -1;
	}
	outcome(r, ret);
	sched_setaffinity(0, sizeof(allowed), &allowed);
	close(echo);
}

/* exec PROGRAM ...: runs it to its end; returned is its status, the data is what it wrote */
static void executes(struct actor *a, int count, char **w, struct reply *r)
{
	int ends[2], status = -1;
	ssize_t size;
	char piece[4096];
	pid_t pid;

	if (pipe2(ends, O_CLOEXEC)) {
		outcome(r, -1);
		return;
	}
	pid = fork();
	if (!pid) {
		dup2(ends[1], 1);
		dup2(ends[1], 2);
		w[count] = NULL;
		execvp(w[0], w);
		_exit(127);
	}
	close(ends[1]);
	while ((size = read(ends[0], piece, sizeof(piece))) > 0)
		for (ssize_t i = 0; i < size; i++)
			add(r, piece[i] <= ' ' || piece[i] == '%' || piece[i] > '~' ? "%%%02x" : "%c",
			    (unsigned char)piece[i]);
	close(ends[0]);
	waitpid(pid, &status, 0);
	outcome(r, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

/* write PATH TEXT, cat PATH */
static void writes(struct actor *a, int count, char **w, struct reply *r)
{
	int fd = open(w[0], O_WRONLY | O_CLOEXEC);

	outcome(r, fd < 0 ? -1 : write(fd, w[1], strlen(w[1])));
	close(fd);
}

/* waiting NUMBER PID ...: how many of these processes wait in that system call */
static void waiting(struct actor *a, int count, char **w, struct reply *r)
{
	int found = 0, number;
	char path[64];

	for (int i = 1; i < count; i++) {
		FILE *file;

		snprintf(path, sizeof(path), "/proc/%d/syscall", atoi(w[i]));
		file = fopen(path, "re");
		if (!file) {
			outcome(r, -1);
			return;
		}
		found += fscanf(file, "%d", &number) == 1 && number == atoi(w[0]); /* who waits in none is "running" */
		fclose(file);
	}
	outcome(r, found);
}

static unsigned short checksum(const void *bytes, size_t size, unsigned int sum)
{
	const unsigned char *at = bytes;

	for (size_t i = 0; i < size; i++)
		sum += i % 2 ? at[i] : at[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/*
 * tcp SOURCE SPORT TARGET DPORT SEQUENCE ACKNOWLEDGED FLAGS [WRONG [OPTIONS]]: sends a segment without data, with these options
 * in hex, a multiple of four bytes. A SYN without others carries an MSS. Its checksum is wrong by WRONG.
 */
static void segment(struct actor *a, int count, char **w, struct reply *r)
{
	struct sockaddr_storage source, target;
	bool six = to_address(w[0], "0", &source) == sizeof(struct sockaddr_in6);
	size_t width = six ? 16 : 4, head = six ? 40 : 20;
	unsigned char packet[128] = {}, pseudo[128] = {}, *tcp = packet + head;
	size_t options = count > 8 ? from_hex(w[8], tcp + 20, 40) : (atoi(w[6]) & 2) ? 4 : 0, size = 20 + options;
	socklen_t room = to_address(w[2], "0", &target);
	const void *from = six ? (void *)&((struct sockaddr_in6 *)&source)->sin6_addr
			       : (void *)&((struct sockaddr_in *)&source)->sin_addr;
	const void *to = six ? (void *)&((struct sockaddr_in6 *)&target)->sin6_addr
			     : (void *)&((struct sockaddr_in *)&target)->sin_addr;
	unsigned int sequence = htonl(strtoul(w[4], NULL, 0)), acknowledged = htonl(strtoul(w[5], NULL, 0));
	unsigned short sport = htons(atoi(w[1])), dport = htons(atoi(w[3])), check;
	int raw = socket(six ? AF_INET6 : AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);

	packet[0] = six ? 0x60 : 0x45; /* length, identification and checksum of an IPv4 header the kernel fills in */
	packet[six ? 6 : 9] = IPPROTO_TCP;
	packet[six ? 7 : 8] = 64;
	if (six)
		packet[5] = size;
	else
		packet[3] = head + size;
	memcpy(packet + (six ? 8 : 12), from, width);
	memcpy(packet + (six ? 8 : 12) + width, to, width);
	memcpy(tcp, &sport, 2);
	memcpy(tcp + 2, &dport, 2);
	memcpy(tcp + 4, &sequence, 4);
	memcpy(tcp + 8, &acknowledged, 4);
	tcp[12] = size / 4 << 4;
	tcp[13] = atoi(w[6]);
	tcp[14] = tcp[15] = 0xff;
	if (options && count <= 8)
		memcpy(tcp + 20, "\2\4\5\264", 4);
	memcpy(pseudo, from, width);
	memcpy(pseudo + width, to, width);
	pseudo[2 * width + 3] = size;
	pseudo[2 * width + 7] = IPPROTO_TCP;
	memcpy(pseudo + 2 * width + 8, tcp, size);
	check = htons(checksum(pseudo, 2 * width + 8 + size, 0));
	check += count > 7 ? htons(atoi(w[7])) : 0;
	memcpy(tcp + 16, &check, 2);
	r->begin = now_ns();
	outcome(r, raw < 0 ? -1 : sendto(raw, packet, head + size, 0, (void *)&target, room));
	close(raw);
}

const struct entry host_commands[] = {
	{"sysctl", sysctl_command},
	{"counters", all_counters},
	{"counter", one_counter},
	{"sockets", all_sockets},
	{"diag", diag},
	{"destroy", destroy},
	{"neighbour", neighbour_command},
	{"link", link_command},
	{"flush", flush},
	{"exec", executes},
	{"write", writes},
	{"waiting", waiting},
	{"tcp", segment},
	{},
};
