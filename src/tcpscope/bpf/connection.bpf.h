/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The connection: who it is, whose it is, and what softirq context has forgotten about it.
 *
 * One table keyed by the socket's address. An entry is inserted when the socket is first seen (state change, accept,
 * seed) and deleted at tcp_destroy_sock, which fires for every TCP socket on every kernel of the matrix.
 */
#ifndef TCPSCOPE_CONNECTION_BPF_H
#define TCPSCOPE_CONNECTION_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"

/* include/net/tcp_states.h */
enum tcp_state {
	STATE_ESTABLISHED = 1,
	STATE_SYN_SENT,
	STATE_SYN_RECV,
	STATE_FIN_WAIT1,
	STATE_FIN_WAIT2,
	STATE_TIME_WAIT,
	STATE_CLOSE,
	STATE_CLOSE_WAIT,
	STATE_LAST_ACK,
	STATE_LISTEN,
	STATE_CLOSING,
	STATE_NEW_SYN_RECV,
} __attribute__((packed));

enum role {
	ROLE_UNKNOWN,
	ROLE_ACTIVE,
	ROLE_PASSIVE,
	ROLE_LISTENER,
} __attribute__((packed));

/* A transition that waits until both ends of its connection are known. */
struct held {
	__u64 time_ns; /* 0: none */
	enum tcp_state old_state;
	enum tcp_state new_state;
};

struct connection {
	struct identity id;     /* see identity_complete() */
	struct owner opener;    /* who called connect() or listen(); for a child, who listens */
	struct owner accepter;  /* who called accept() */
	__u64 state_since_ns;   /* 0: not seen */
	struct held held;
	bool in_listening;      /* this listener is counted in `listening` */
	bool accepted;          /* `accepter` is filled; set after it, so a reader never sees half an owner */
	enum role role;
	enum tcp_state followed_by;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64); /* address of the struct sock */
	__type(value, struct connection);
} connections SEC(".maps");

/* Listeners by address, for the children, which do not know their listener. */
struct listen_key {
	__u32 netns;
	__u32 port;
	__u8 address[16];
};

struct listening {
	struct owner owner;
	__u32 sockets; /* with SO_REUSEPORT several */
	__u32 mixed;   /* of more than one process: then nobody can say whose child it will be */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct listen_key);
	__type(value, struct listening);
} listening SEC(".maps");

static const struct connection new_connection;

static __always_inline void map_v4(__u8 *mapped, __be32 v4)
{
	__builtin_memset(mapped, 0, 10);
	mapped[10] = mapped[11] = 0xff;
	__builtin_memcpy(mapped + 12, &v4, 4);
}

static __always_inline bool is_v4_mapped(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

/*
 * Both ends as the socket has them now. Read by address, so it serves every program type.
 * The port in skc_num is gone once the socket is unhashed, just before the last transition; inet_sport stays.
 * The remote end of a child is not set yet when it enters SYN_RECV, nor the local port of a connect in SYN_SENT.
 */
static __noinline int identity_read(struct sock *sk, struct identity *id)
{
	struct sock_common *common = &sk->__sk_common;
	__u16 family = BPF_CORE_READ(common, skc_family);

	id->netns = BPF_CORE_READ(common, skc_net.net, ns.inum);
	id->lport = BPF_CORE_READ(common, skc_num);
	if (!id->lport)
		id->lport = bpf_ntohs(BPF_CORE_READ((struct inet_sock *)sk, inet_sport));
	id->rport = bpf_ntohs(BPF_CORE_READ(common, skc_dport));
	if (family == AF_INET6) {
		BPF_CORE_READ_INTO(&id->raddr, common, skc_v6_daddr);
		BPF_CORE_READ_INTO(&id->laddr, common, skc_v6_rcv_saddr);
	}
	if (family == AF_INET || is_v4_mapped(id->raddr)) {
		map_v4(id->raddr, BPF_CORE_READ(common, skc_daddr));
		map_v4(id->laddr, BPF_CORE_READ(common, skc_rcv_saddr));
		family = AF_INET;
	} else if (is_v4_mapped(id->laddr)) {
		family = AF_INET;
	}
	id->family = family == AF_INET ? 4 : 6;
	if (!id->rport)
		__builtin_memset(id->raddr, 0, 16);
	return 0;
}

/* The processes below a cgroup belong to it. Walks upwards; 32 levels are more than anyone nests. */
static __always_inline bool below_filter_cgroup(struct task_struct *task)
{
	struct cgroup *cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);

	for (int level = 0; level < 32 && cgroup; level++) {
		struct cgroup_subsys_state *parent;

		if (BPF_CORE_READ(cgroup, kn, id) == filter.cgroup)
			return true;
		parent = BPF_CORE_READ(cgroup, self.parent);
		if (!parent)
			break;
		cgroup = BPF_CORE_READ(parent, cgroup);
	}
	return false;
}

/* The name is the process's, as ps and ss show it, not that of one of its threads. */
static __noinline int owner_of_task(struct task_struct *task, struct owner *owner)
{
	owner->pid = BPF_CORE_READ(task, tgid);
	owner->uid = BPF_CORE_READ(task, cred, uid.val);
	owner->cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	/* Up to the NUL: before 5.17 the bytes behind it are those of an older name. */
	__builtin_memset(owner->comm, 0, sizeof(owner->comm));
	BPF_CORE_READ_STR_INTO(&owner->comm, task, group_leader, comm);
	if (filter.cgroup)
		owner->in_cgroup = below_filter_cgroup(task);
	return 0;
}

static __always_inline void owner_of_current(struct owner *owner)
{
	owner_of_task((struct task_struct *)bpf_get_current_task(), owner);
}

static __always_inline struct connection *connection_find(struct sock *sk)
{
	__u64 key = (__u64)sk;

	return bpf_map_lookup_elem(&connections, &key);
}

static __always_inline struct connection *connection_find_or_add(struct sock *sk)
{
	__u64 key = (__u64)sk;
	struct connection *found = bpf_map_lookup_elem(&connections, &key);

	if (found)
		return found;
	bpf_map_update_elem(&connections, &key, &new_connection, BPF_NOEXIST);
	found = bpf_map_lookup_elem(&connections, &key);
	if (!found)
		COUNT(table_full);
	return found;
}

static __always_inline const struct owner *connection_owner(const struct connection *connection)
{
	if (!connection)
		return NULL;
	return connection->accepted ? &connection->accepter : &connection->opener;
}

static __always_inline void listening_key(const struct identity *id, struct listen_key *key)
{
	key->netns = id->netns;
	key->port = id->lport;
	__builtin_memcpy(key->address, id->laddr, 16);
}

static __always_inline void listening_add(struct connection *connection)
{
	struct listening entry = {.owner = connection->opener, .sockets = 1};
	struct listening *present;
	struct listen_key key = {};

	listening_key(&connection->id, &key);
	if (!bpf_map_update_elem(&listening, &key, &entry, BPF_NOEXIST)) {
		connection->in_listening = true;
		return;
	}
	present = bpf_map_lookup_elem(&listening, &key);
	if (!present) {
		COUNT(table_full);
		return;
	}
	__sync_fetch_and_add(&present->sockets, 1);
	if (present->owner.pid != connection->opener.pid)
		present->mixed = 1;
	connection->in_listening = true;
}

static __always_inline void listening_remove(struct connection *connection)
{
	struct listening *present;
	struct listen_key key = {};

	if (!connection->in_listening)
		return;
	connection->in_listening = false;
	listening_key(&connection->id, &key);
	present = bpf_map_lookup_elem(&listening, &key);
	if (!present)
		return;
	if (present->sockets <= 1)
		bpf_map_delete_elem(&listening, &key);
	else
		__sync_fetch_and_add(&present->sockets, -1);
}

/* The listener of a child: bound to the child's own address, or to any address of its or of either family. */
static __always_inline struct listening *listening_for(const struct identity *child)
{
	struct listening *found;
	struct listen_key key = {};

	listening_key(child, &key);
	found = bpf_map_lookup_elem(&listening, &key);
	if (!found && child->family == 4) {
		map_v4(key.address, 0);
		found = bpf_map_lookup_elem(&listening, &key);
	}
	if (!found) {
		__builtin_memset(key.address, 0, 16);
		found = bpf_map_lookup_elem(&listening, &key);
	}
	return found && !found->mixed ? found : NULL;
}

/* Both ports are set; a listener has only one. From then on the identity is not read again. */
static __always_inline bool identity_complete(const struct connection *connection)
{
	return connection->id.lport && (connection->id.rport || connection->role == ROLE_LISTENER);
}

/* A socket may be connected again after a disconnect, and its address may be another one's after it: begin anew. */
static __always_inline void connection_begin(struct connection *connection, enum role role)
{
	listening_remove(connection);
	__builtin_memset(connection, 0, sizeof(*connection));
	connection->role = role;
}

/* What a change of state tells about a connection. Call it before using the table entry. */
static __always_inline struct connection *connection_transition(struct sock *sk, int old_state, int new_state)
{
	struct connection *connection;

	if (new_state == STATE_CLOSE)
		connection = connection_find(sk);
	else
		connection = connection_find_or_add(sk);
	if (!connection)
		return NULL;

	if (new_state == STATE_SYN_SENT || new_state == STATE_LISTEN) {
		/* In the caller's context. */
		connection_begin(connection, new_state == STATE_LISTEN ? ROLE_LISTENER : ROLE_ACTIVE);
		owner_of_current(&connection->opener);
	} else if (new_state == STATE_SYN_RECV && old_state == STATE_LISTEN) {
		connection_begin(connection, ROLE_PASSIVE);
	}
	if (!identity_complete(connection))
		identity_read(sk, &connection->id);
	if (new_state == STATE_SYN_SENT) /* in inet_sport the port of an earlier connection may stand */
		connection->id.lport = BPF_CORE_READ(sk, __sk_common.skc_num);
	/* listen() without bind(): the port is chosen only after this, and the children cannot be told whose they are. */
	if (new_state == STATE_LISTEN && connection->id.lport)
		listening_add(connection);
	else if (old_state == STATE_LISTEN && new_state == STATE_CLOSE)
		listening_remove(connection);
	if (connection->role == ROLE_PASSIVE && !connection->opener.pid) {
		struct listening *listener = listening_for(&connection->id);

		if (listener)
			connection->opener = listener->owner;
	}
	return connection;
}

/* accept() returned `child` to the current process. */
static __always_inline struct connection *connection_accepted(struct sock *child)
{
	struct connection *connection;

	if (!child)
		return NULL;
	connection = connection_find_or_add(child);
	if (!connection || connection->accepted)
		return connection;
	connection->role = ROLE_PASSIVE;
	owner_of_current(&connection->accepter);
	barrier();
	connection->accepted = true;
	return connection;
}

static __always_inline void connection_forget(struct sock *sk)
{
	struct connection *connection = connection_find(sk);
	__u64 key = (__u64)sk;

	if (!connection)
		return;
	listening_remove(connection);
	bpf_map_delete_elem(&connections, &key);
}

/*
 * The TCP socket behind a file, or NULL. Sockets are the files of the file system "sockfs". Behind an MPTCP socket
 * stands its first subflow: for a listener the one that listens.
 */
static __always_inline struct sock *tcp_sock_of_file(struct file *file)
{
	struct inode *inode = BPF_CORE_READ(file, f_inode);
	struct socket *socket;
	struct sock *sk;
	__u16 family;

	if ((BPF_CORE_READ(inode, i_mode) & S_IFMT) != S_IFSOCK || BPF_CORE_READ(inode, i_sb, s_magic) != SOCKFS_MAGIC)
		return NULL;
	socket = BPF_CORE_READ(file, private_data);
	sk = BPF_CORE_READ(socket, sk);
	if (sk && bpf_core_field_exists(struct mptcp_sock, first) && BPF_CORE_READ(sk, sk_protocol) == IPPROTO_MPTCP)
		sk = BPF_CORE_READ((struct mptcp_sock *)sk, first);
	if (!sk || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return NULL;
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	return family == AF_INET || family == AF_INET6 ? sk : NULL;
}

/* Give a TCP socket in that state its cookie, where the kernel lets us: events know the socket by address only. */
static __always_inline void cookie_give(struct file *file, enum tcp_state state)
{
	struct socket *socket;

	if (!have_cookie_helper())
		return;
	socket = bpf_sock_from_file(file);
	if (socket && socket->sk && socket->sk->sk_protocol == IPPROTO_TCP && socket->sk->__sk_common.skc_state == state)
		bpf_get_socket_cookie(socket->sk);
}

/* The TCP socket behind a file descriptor of the current process, or NULL. */
static __noinline struct sock *tcp_sock_of_fd(__u32 fd)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct file **files = BPF_CORE_READ(task, files, fdt, fd);
	struct file *file;

	if (bpf_probe_read_kernel(&file, sizeof(file), files + fd) || !file)
		return NULL;
	return tcp_sock_of_file(file);
}

/*
 * Where functions cannot be hooked: the socket that accept() is about to return as a file descriptor.
 * Runs at every system call's exit, so it looks at the number first.
 */
static __always_inline struct sock *sock_of_accept(struct pt_regs *regs, long fd)
{
	return fd >= 0 && SYSCALL_IS_ACCEPT(regs) ? tcp_sock_of_fd(fd) : NULL;
}

/*
 * The seed: one pass over all open files puts the owners of the sockets that are older than the tool into the table.
 * The first process that holds a socket is taken as its owner. With `only`, sockets in that state. The iterator holds the file, so the socket cannot be
 * destroyed between the look and the insertion, and no entry can be left behind.
 */
static __always_inline void connection_seed(struct task_struct *task, struct file *file, enum tcp_state only)
{
	struct sock *sk = tcp_sock_of_file(file);
	struct connection *connection;
	__u8 state;

	if (!sk)
		return;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == STATE_CLOSE || (only && state != only))
		return;
	connection = connection_find_or_add(sk);
	if (!connection || connection->opener.pid || connection->accepted)
		return;
	owner_of_task(task, &connection->opener);
	if (state == STATE_LISTEN && connection->role != ROLE_LISTENER) {
		connection->role = ROLE_LISTENER;
		identity_read(sk, &connection->id);
		listening_add(connection);
	}
}

#endif
