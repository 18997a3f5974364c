/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Two hosts: network namespaces joined by a veth pair, as tcpscope.lab.hosts makes them, by rtnetlink.
 *
 * Host 0 is the client, 192.0.2.1 and 2001:db8::1, host 1 the server, 192.0.2.2 and 2001:db8::2. Neighbours are written in by
 * hand and looked for by nobody: what leaves for one that is not there is kept back, in order, until it is there again.
 */
#define _GNU_SOURCE
#include "actor.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/neighbour.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <net/if.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEVICE "veth0"

const char *where = "";

struct request {
	struct nlmsghdr header;
	char room[1024];
};

static void *begin(struct request *request, int type, int flags, size_t size)
{
	memset(request, 0, sizeof(*request));
	request->header = (struct nlmsghdr){
		.nlmsg_len = NLMSG_LENGTH(size), .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags};
	return NLMSG_DATA(&request->header);
}

static struct rtattr *attribute(struct request *request, int type, const void *data, size_t size)
{
	struct rtattr *attribute = (void *)((char *)request + NLMSG_ALIGN(request->header.nlmsg_len));

	attribute->rta_type = type;
	attribute->rta_len = RTA_LENGTH(size);
	if (size)
		memcpy(RTA_DATA(attribute), data, size);
	request->header.nlmsg_len = NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len);
	return attribute;
}

static void end(struct request *request, struct rtattr *nest)
{
	nest->rta_len = (char *)request + request->header.nlmsg_len - (char *)nest;
}

/* 0, or -1 with errno. */
static int tell_kernel(struct request *request)
{
	char answer[4096];
	int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	struct nlmsghdr *header = (void *)answer;
	ssize_t size;

	if (netlink < 0)
		return -1;
	size = send(netlink, request, request->header.nlmsg_len, 0);
	size = size < 0 ? size : recv(netlink, answer, sizeof(answer), 0);
	close(netlink);
	if (size < (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)) || header->nlmsg_type != NLMSG_ERROR)
		return -1;
	errno = -((struct nlmsgerr *)NLMSG_DATA(header))->error;
	return errno ? -1 : 0;
}

static void to_mac(const char *text, unsigned char mac[6])
{
	sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4], &mac[5]);
}

/* The server's end is given its namespace with the pair. */
static int join(int client_netns)
{
	struct request request;
	struct ifinfomsg *info = begin(&request, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, sizeof(*info));
	struct rtattr *link, *data, *peer;
	unsigned char client[6], server[6];

	to_mac("02:00:c0:00:02:01", client);
	to_mac("02:00:c0:00:02:02", server);
	attribute(&request, IFLA_IFNAME, DEVICE, sizeof(DEVICE));
	attribute(&request, IFLA_ADDRESS, server, sizeof(server));
	link = attribute(&request, IFLA_LINKINFO, NULL, 0);
	attribute(&request, IFLA_INFO_KIND, "veth", 5);
	data = attribute(&request, IFLA_INFO_DATA, NULL, 0);
	peer = attribute(&request, VETH_INFO_PEER, NULL, 0);
	request.header.nlmsg_len += NLMSG_ALIGN(sizeof(struct ifinfomsg));
	attribute(&request, IFLA_IFNAME, DEVICE, sizeof(DEVICE));
	attribute(&request, IFLA_ADDRESS, client, sizeof(client));
	attribute(&request, IFLA_NET_NS_FD, &client_netns, sizeof(client_netns));
	end(&request, peer);
	end(&request, data);
	end(&request, link);
	return tell_kernel(&request);
}

static int set_up(int index, bool up)
{
	struct request request;
	struct ifinfomsg *info = begin(&request, RTM_NEWLINK, 0, sizeof(*info));

	info->ifi_index = index;
	info->ifi_change = IFF_UP;
	info->ifi_flags = up ? IFF_UP : 0;
	return tell_kernel(&request);
}

int link_up(bool up)
{
	return set_up(if_nametoindex(DEVICE), up);
}

static size_t host_address(int family, int number, void *bytes)
{
	char text[32];

	snprintf(text, sizeof(text), family == AF_INET ? "192.0.2.%d" : "2001:db8::%d", number + 1);
	inet_pton(family, text, bytes);
	return family == AF_INET ? 4 : 16;
}

static int give_address(int family, int number)
{
	struct request request;
	struct ifaddrmsg *info = begin(&request, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, sizeof(*info));
	unsigned char bytes[16];
	size_t size = host_address(family, number, bytes);

	*info = (struct ifaddrmsg){.ifa_family = family,
				   .ifa_prefixlen = family == AF_INET ? 24 : 64,
				   .ifa_index = if_nametoindex(DEVICE),
				   .ifa_flags = family == AF_INET6 ? IFA_F_NODAD : 0};
	attribute(&request, IFA_LOCAL, bytes, size);
	attribute(&request, IFA_ADDRESS, bytes, size);
	return tell_kernel(&request);
}

static int neighbour(int family, int number, const char *mac)
{
	struct request request;
	struct ndmsg *info = begin(&request, mac ? RTM_NEWNEIGH : RTM_DELNEIGH, mac ? NLM_F_CREATE | NLM_F_REPLACE : 0,
				   sizeof(*info));
	unsigned char bytes[16];
	size_t size = host_address(family, number, bytes);

	*info = (struct ndmsg){.ndm_family = family, .ndm_ifindex = if_nametoindex(DEVICE), .ndm_state = NUD_PERMANENT};
	attribute(&request, NDA_DST, bytes, size);
	if (mac) {
		to_mac(mac, bytes);
		attribute(&request, NDA_LLADDR, bytes, 6);
	}
	return tell_kernel(&request);
}

int neighbours(int number, const char *mac)
{
	int peer = !number;

	return neighbour(AF_INET, peer, mac) || neighbour(AF_INET6, peer, mac) ? -1 : 0;
}

int write_sysctl(const char *name, const char *value)
{
	static const char *const folders[] = {"", "ipv4/", "core/", "ipv6/"};
	char path[256];

	for (int i = 0; i < 4; i++) {
		int fd;
		ssize_t size;

		snprintf(path, sizeof(path), "/proc/sys/net/%s%s", folders[i], name);
		fd = open(path, O_WRONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		size = write(fd, value, strlen(value));
		close(fd);
		return size < 0 ? -1 : 0;
	}
	return -1;
}

static int configure(int number)
{
	static const char *const settings[][2] = {
		/* Unresolved neighbours are asked of user space, which stays silent. */
		{"ipv4/neigh/veth0/mcast_solicit", "0"},
		{"ipv4/neigh/veth0/app_solicit", "10000"},
		{"ipv4/neigh/veth0/unres_qlen_bytes", "16777216"},
		{"ipv6/neigh/veth0/mcast_solicit", "0"},
		{"ipv6/neigh/veth0/app_solicit", "10000"},
		{"ipv6/neigh/veth0/unres_qlen_bytes", "16777216"},
		{"ipv6/conf/veth0/keep_addr_on_down", "1"},
		{"ipv6/conf/veth0/router_solicitations", "0"},
		{"ipv6/conf/veth0/accept_ra", "0"},
	};

	for (size_t i = 0; i < sizeof(settings) / sizeof(*settings); i++)
		if (write_sysctl(where = settings[i][0], settings[i][1]))
			return -1;
	where = "addresses";
	return set_up(1, true) || give_address(AF_INET, number) || give_address(AF_INET6, number) || link_up(true) ||
			       neighbours(number, number ? "02:00:c0:00:02:01" : "02:00:c0:00:02:02")
		       ? -1
		       : 0;
}

/* Leaves the caller in the server's namespace. */
int make_lab(struct host hosts[2])
{
	for (int i = 0; i < 2; i++) {
		struct stat about;

		where = "network namespace";
		if (unshare(CLONE_NEWNET))
			return -1;
		hosts[i].netns = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
		if (hosts[i].netns < 0 || fstat(hosts[i].netns, &about))
			return -1;
		hosts[i].inode = about.st_ino;
	}
	where = "veth pair";
	if (join(hosts[0].netns))
		return -1;
	for (int i = 0; i < 2; i++)
		if (setns(hosts[i].netns, CLONE_NEWNET) || configure(i))
			return -1;
	return 0;
}
