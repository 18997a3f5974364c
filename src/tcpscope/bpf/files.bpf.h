/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/* From open files to TCP sockets. */
#ifndef TCPSCOPE_FILES_BPF_H
#define TCPSCOPE_FILES_BPF_H

#include "kernel.bpf.h"
#include "compat.bpf.h"

/* The TCP socket of a socket, or NULL. Of an MPTCP socket it is the first subflow, which listens if the socket listens. */
static __always_inline struct sock *tcp_sock_of_socket(struct socket *socket)
{
	struct sock *sk = BPF_CORE_READ(socket, sk);
	__u16 family;

	if (sk && bpf_core_field_exists(struct mptcp_sock, first) && BPF_CORE_READ(sk, sk_protocol) == IPPROTO_MPTCP)
		sk = BPF_CORE_READ((struct mptcp_sock *)sk, first);
	if (!sk || BPF_CORE_READ(sk, sk_protocol) != IPPROTO_TCP)
		return NULL;
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	return family == AF_INET || family == AF_INET6 ? sk : NULL;
}

/* Of a further subflow of an MPTCP socket: the first one. The kernel connects it, in the context of any task. Else NULL. */
static __noinline __attribute__((unused)) struct sock *first_subflow(struct sock *sk)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	struct mptcp_subflow_context *context;
	struct mptcp_sock *mptcp;
	struct sock *first;

	if (!bpf_core_field_exists(struct mptcp_subflow_context, conn) ||
	    !bpf_core_field_exists(struct mptcp_sock, first) || !BPF_CORE_READ_BITFIELD_PROBED(tp, is_mptcp))
		return NULL;
	context = BPF_CORE_READ(tp, inet_conn.icsk_ulp_data);
	mptcp = (struct mptcp_sock *)BPF_CORE_READ(context, conn);
	first = BPF_CORE_READ(mptcp, first);
	return first != sk ? first : NULL;
}

/* The TCP socket of a file, or NULL. The files of sockets are in the file system "sockfs". */
static __always_inline struct sock *tcp_sock_of_file(struct file *file)
{
	struct inode *inode = BPF_CORE_READ(file, f_inode);

	if ((BPF_CORE_READ(inode, i_mode) & S_IFMT) != S_IFSOCK || BPF_CORE_READ(inode, i_sb, s_magic) != SOCKFS_MAGIC)
		return NULL;
	return tcp_sock_of_socket((struct socket *)BPF_CORE_READ(file, private_data));
}

/* Does the open file hold the socket? The file of an MPTCP socket does not hold its subflow. */
static __always_inline bool file_holds(struct file *file, struct sock *sk)
{
	struct socket *socket = BPF_CORE_READ(file, private_data);

	return BPF_CORE_READ(socket, sk) == sk;
}

/* Gives a TCP socket in that state its cookie, if the kernel has the helper: events know the socket only by address. */
static __always_inline void cookie_give(struct file *file, enum tcp_state state)
{
	struct socket *socket;

	if (!have_cookie_helper())
		return;
	socket = bpf_sock_from_file(file);
	if (socket && socket->sk && socket->sk->sk_protocol == IPPROTO_TCP &&
	    socket->sk->__sk_common.skc_state == state)
		bpf_get_socket_cookie(socket->sk);
}

/* The file of a descriptor of the current process, or NULL. */
static __always_inline struct file *file_of_fd(__u32 fd)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **files = BPF_CORE_READ(table, fd);
	struct file *file;

	if (fd >= BPF_CORE_READ(table, max_fds) || bpf_probe_read_kernel(&file, sizeof(file), files + fd))
		return NULL;
	return file;
}

/* The TCP socket of a file descriptor of the current process, or NULL. */
static __noinline __attribute__((unused)) struct sock *tcp_sock_of_fd(__u32 fd)
{
	struct file *file = file_of_fd(fd);

	return file ? tcp_sock_of_file(file) : NULL;
}

#endif
