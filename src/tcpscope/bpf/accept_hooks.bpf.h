/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * A process accepts a connection. An object that includes this defines accepted(). The hooks call it once for each
 * connection. They look for the listener only if the object defines ACCEPTED_FROM.
 */
#ifndef TCPSCOPE_ACCEPT_HOOKS_BPF_H
#define TCPSCOPE_ACCEPT_HOOKS_BPF_H

#include "connection.bpf.h"

#ifdef ACCEPTED_FROM
#define LISTENER_IF_WANTED(listener) (listener)
#else
#define LISTENER_IF_WANTED(listener) NULL
#endif

/* `connection` has its owner; NULL: no place in the table. `listener` is NULL if it is not known. */
static __always_inline void accepted(struct sock *child, struct connection *connection, struct sock *listener);

/* For accepted(): both ends of the child, and who accepted it. `unlisted` has room for that if there is no entry. */
static __always_inline __attribute__((unused)) const struct owner *accepted_by(struct sock *child,
									       const struct connection *connection,
									       struct identity *id,
									       struct owner *unlisted)
{
	identity_read(child, id);
	id->cookie = connection && connection->id.cookie ? connection->id.cookie : cookie_if_any(child);
	if (connection)
		return &connection->accepter;
	owner_of_current(unlisted);
	return unlisted;
}

/* accept() returns `child` to the current process. */
static __noinline int accept_returned(struct sock *child, struct sock *listener)
{
	struct connection *connection;

	if (!child || BPF_CORE_READ(child, sk_protocol) != IPPROTO_TCP)
		return 0;
	connection = connection_find(child);
	if (connection &&
	    (connection->accepted || connection->role == ROLE_ACTIVE || connection->role == ROLE_LISTENER))
		return 0; /* another hook saw it; or it is no child: the call's result was a number, but no descriptor */
	connection = connection_accepted(child);
	accepted(child, connection, listener ? listener : LISTENER_IF_WANTED(connection_listener(connection)));
	return 0;
}

/*
 * Where functions cannot be hooked: io_uring's completions. The completions of a multishot request do not have the request,
 * and a result need not be a descriptor. But a child whose birth was seen, and which has a descriptor, was accepted.
 * The program reads `completion` directly: the verifier refuses a kernel that has another argument there.
 */
UNLESS("accept__fexit")
OPTIONAL("connections accepted through io_uring")
SEC("tp_btf/io_uring_complete")
int TRACEPOINT_PROG(accept_uring, void *ring, struct io_kiocb *request, struct io_uring_cqe *completion)
{
	struct connection *connection;
	int fd = completion->res;
	struct sock *child;

	if (fd < 0 || (request && BPF_CORE_READ(request, opcode) != IORING_OP_ACCEPT))
		return 0;
	child = tcp_sock_of_fd(fd);
	connection = child ? connection_find(child) : NULL;
	if (!connection || connection->role != ROLE_PASSIVE || !connection->opened_ns)
		return 0;
	return accept_returned(child,
			       LISTENER_IF_WANTED(request ? tcp_sock_of_file(BPF_CORE_READ(request, file)) : NULL));
}

SEC("fexit/inet_csk_accept")
int FUNCTION_PROG(accept__fexit)
{
	return accept_returned(ACCEPTED_CHILD(ctx), (struct sock *)CTX_SLOT(ctx, 0));
}

/* Not a kretprobe: it has few places for pending calls, and loses the others without a count. */
SEC("tp_btf/sys_exit")
int TRACEPOINT_PROG_IF(fd >= 0 && syscall_is_accept(regs), accept__syscall, struct pt_regs *regs, long fd)
{
	struct sock *child = tcp_sock_of_fd(fd);

	return child ? accept_returned(child, LISTENER_IF_WANTED(tcp_sock_of_fd(syscall_descriptor(regs)))) : 0;
}

/* A call that already waited in inet_csk_accept() when the tool hooked it calls this function when it wakes up. */
UNLESS("accept__syscall")
OPTIONAL("which process accepts, if its accept() began before the tool")
SEC("fentry/security_sock_graft")
int FUNCTION_PROG(graft__fentry, struct sock *child)
{
	return connection_find(child) ? accept_returned(child, NULL) : 0;
}

SEC("kprobe/security_sock_graft")
int BPF_KPROBE(graft__kprobe, struct sock *child)
{
	return connection_find(child) ? accept_returned(child, NULL) : 0;
}

#endif
