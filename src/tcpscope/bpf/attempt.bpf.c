// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * An active open and its outcome.
 *
 * Most outcomes are transitions: SYN_SENT to ESTABLISHED, or to CLOSE with an error in the socket, which the kernel counts
 * as TcpAttemptFails (tcp_done()). A CLOSE without an error is a close by connect() itself, which could not send a SYN, or
 * by the application, which gave up. If connect() has returned before, it was the application. Otherwise the event waits
 * for the return of connect(). If connect() does not return before the socket is destroyed, the application gave up. Of a
 * connect() that fails before SYN_SENT (no route) only the return value tells.
 *
 * An ICMP message ends the attempt, unless a process uses the socket at that moment: connect() itself, if the answer comes
 * from this host or over a veth. The kernel then only notes a soft error (tcp_v4_err()), and the next SYN decides. If the
 * application closes the socket before that, the outcome is that of the message.
 *
 *   stage     event                                           row                          next stage
 *   NONE      SYN_SENT                                        -                            OPEN
 *   NONE      connect() fails before a SYN                    by its error                 NONE
 *   OPEN      ESTABLISHED                                     ESTABLISHED                  entry deleted
 *   OPEN      CLOSE, the socket has an error                  by that error                REPORTED
 *   OPEN      CLOSE without one, connect() has returned       GAVE_UP, or by a soft error  NONE
 *   OPEN      CLOSE without one, connect() has not returned   -                            CLOSED
 *   CLOSED    connect() returns an error                      by that error                NONE
 *   CLOSED    SYN_SENT, end of the socket or of the run       GAVE_UP, or by a soft error; OPEN, or entry deleted
 *                                                             no SYN sent: FAILED
 *   REPORTED  connect() returns                               -                            NONE
 */

#define HAS_GROUPS
#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "event.bpf.h"

enum stage {
	STAGE_NONE,
	STAGE_OPEN,    /* SYN_SENT */
	STAGE_CLOSED,  /* closed without an error of the socket: waits for the return of connect() */
	STAGE_REPORTED /* failed, and its event was sent; connect() may still return the error */
} __attribute__((packed));

struct scratch {
	__u64 closed_ns; /* valid in STAGE_CLOSED, as the next four */
	__u32 answer;    /* soft_error_of() */
	__u32 syn_retrans;
	bool syn_sent;
	__u8 syn_dropped;
	bool connect_returned; /* in STAGE_OPEN; a byte of its own, because another CPU may write `stage` */
	enum stage stage;
	__u32 error;       /* the error that ends it, if the kernel reported it before: error.bpf.h */
	__u32 stale_error; /* the socket's error when it entered SYN_SENT */
	__u32 stale_soft_error;
	__u32 message_error; /* that of the last ICMP message in the error queue */
};
#define HAS_SCRATCH

#define FOLLOWED (STATE_BIT(SYN_SENT) | STATE_BIT(SYN_RECV) | STATE_BIT(CLOSE))
#include "follow.bpf.h"
#include "error.bpf.h"
#include "sockaddr.bpf.h"
#include "syn.bpf.h"
#include "visit.bpf.h"

enum outcome {
	OUTCOME_ESTABLISHED,
	OUTCOME_REFUSED,
	OUTCOME_REJECTED,
	OUTCOME_TIMED_OUT,
	OUTCOME_UNREACHABLE,
	OUTCOME_RESET,
	OUTCOME_GAVE_UP,
	OUTCOME_KILLED,
	OUTCOME_FAILED,
} __attribute__((packed));

struct attempt {
	struct event event;
	enum outcome outcome DOC("how it ended; REFUSED: by a RST, REJECTED: by an ICMP message, TIMED_OUT: the kernel "
				 "gave up, GAVE_UP: the application gave up, KILLED: by another program (ss -K, "
				 "bpf_sock_destroy()), FAILED: errno says why");
	bool syn_sent DOC("whether TCP made a SYN: the kernel counts that as TcpActiveOpens");
	__u8 syn_dropped KIND("bool") UNKNOWN_IS("max") DOC("whether this host dropped the last SYN when it was sent: "
							    "by a firewall rule, a full queue or for want of a route");
	__u8 padding;
	__u32 errno KIND("errno") UNKNOWN_IS("max") DOC("error of the socket or, where it has none, of connect()");
	__u32 syn_retrans DOC("retransmissions of the SYN");
	__u32 padding2;
	__u64 latency_us TITLE("LAT(us)") UNIT("us") UNKNOWN_IS("max")
	DOC("from SYN_SENT, in connect(), to the outcome");
};

const struct attempt *attempt_anchor __attribute__((unused));

const volatile __u64 attempt_min_us;     /* attempts with a shorter latency are filtered */
const volatile bool attempt_failed_only; /* attempts that succeeded are filtered */

#define ERRNO_UNKNOWN ((__u32) - 1)

/* An attempt that has ended. */
struct ending {
	__u64 time_ns;
	__u64 began_ns; /* 0: not known */
	__u32 errno;
	__u32 syn_retrans;
	bool syn_sent;
	__u8 syn_dropped;
	enum outcome outcome;
};

static __always_inline enum outcome outcome_of(__u32 error)
{
	switch (error) {
	case 0:
		return OUTCOME_ESTABLISHED;
	case ECONNREFUSED:
		return OUTCOME_REFUSED;
	case ETIMEDOUT:
		return OUTCOME_TIMED_OUT;
	case ENETDOWN:
	case ENETUNREACH:
	case EHOSTDOWN:
	case EHOSTUNREACH:
		return OUTCOME_UNREACHABLE;
	case ECONNRESET:
		return OUTCOME_RESET;
	case ECONNABORTED:
		return OUTCOME_KILLED;
	default:
		return OUTCOME_FAILED;
	}
}

/* Nothing can have answered: the call itself failed. */
static __always_inline enum outcome outcome_without_syn(__u32 error)
{
	enum outcome outcome = outcome_of(error);

	return outcome == OUTCOME_UNREACHABLE ? outcome : OUTCOME_FAILED;
}

/*
 * The application has closed the socket. `answer` is the soft error: only an ICMP message makes that ECONNREFUSED, while a RST
 * ends the attempt.
 */
static __always_inline void gave_up(struct ending *ending, __u32 answer)
{
	ending->errno = answer;
	ending->outcome = !answer ? OUTCOME_GAVE_UP : answer == ECONNREFUSED ? OUTCOME_REJECTED : outcome_of(answer);
}

static __noinline int attempt_emit(const struct identity *id, const struct owner *owner, const struct ending *ending)
{
	__u64 latency_us = ending->began_ns ? (ending->time_ns - ending->began_ns) / 1000 : -1;
	struct attempt room, *event;

	if ((attempt_failed_only && ending->outcome == OUTCOME_ESTABLISHED) || latency_us < attempt_min_us ||
	    (attempt_min_us && !ending->began_ns)) {
		COUNT(seen);
		COUNT(filtered);
		return 0;
	}
	event = event_begin_in(&room, sizeof(room), ending->time_ns, id, owner);
	if (!event)
		return 0;
	event->outcome = ending->outcome;
	event->syn_sent = ending->syn_sent;
	event->syn_dropped = ending->syn_dropped;
	event->errno = ending->errno;
	event->syn_retrans = ending->syn_retrans;
	event->padding = event->padding2 = 0;
	event->latency_us = latency_us;
	return event_submit(event);
}

/*
 * The error of a waiting connect() whose socket another thread disconnects. EPIPE came with "tcp: allow again
 * tcp_disconnect() when threads are waiting".
 */
static __always_inline bool is_disconnected(__u32 error)
{
	return error == ECONNRESET || error == ECONNABORTED || error == EPIPE;
}

/* An error that an answer brings, or a missing one. Before a socket's first SYN only a BPF program can return it. */
static __always_inline bool is_answer(struct sock *sk, __u32 error)
{
	return (error == ECONNREFUSED || error == ETIMEDOUT) && BPF_CORE_READ((struct tcp_sock *)sk, write_seq);
}

/* Ends an attempt in STAGE_CLOSED. `error` is what connect() returned; 0: it was not connect() that closed the socket. */
static __always_inline void attempt_resolve(struct connection *connection, __u32 error)
{
	struct ending ending = {
		.time_ns = connection->scratch.closed_ns,
		.began_ns = connection->opened_ns,
		.syn_retrans = connection->scratch.syn_retrans,
		.syn_sent = connection->scratch.syn_sent,
		.syn_dropped = connection->scratch.syn_dropped,
		.errno = error,
		.outcome = outcome_without_syn(error),
	};

	if (connection->scratch.stage != STAGE_CLOSED)
		return;
	connection->scratch.stage = STAGE_NONE;
	if (!error) {
		/* The application closed it; or, without a SYN, a call whose return is not hooked. */
		if (ending.syn_sent) {
			gave_up(&ending, connection->scratch.answer);
		} else {
			ending.outcome = OUTCOME_FAILED;
			ending.errno = ERRNO_UNKNOWN;
		}
	} else if (ending.syn_sent && is_disconnected(error)) {
		ending.outcome = OUTCOME_GAVE_UP;
	} else {
		ending.syn_sent = false; /* tcp_connect() failed: the SYN that it counted did not leave */
		ending.syn_dropped = DROPPED_UNKNOWN;
	}
	attempt_emit(&connection->id, &connection->opener, &ending);
}

static __always_inline bool matters(int old_state, int new_state)
{
	return new_state == STATE_SYN_SENT || old_state == STATE_SYN_SENT || old_state == STATE_SYN_RECV;
}

static __always_inline bool makes_entry(int old_state, int new_state)
{
	return new_state == STATE_SYN_SENT;
}

static __always_inline int state_changed(struct sock *sk, const struct change *change)
{
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	struct ending ending = {.time_ns = change->time_ns};
	struct connection *connection;
	const struct identity *id;
	struct followed now;
	bool failed;

	follow_find(&now, sk, change);
	connection = now.connection;
	if (!connection && change->old_state == STATE_SYN_RECV)
		return 0; /* a child: in a simultaneous open the socket has an entry */
	if (follow_begins_anew(&now, change))
		attempt_resolve(connection, 0);
	follow_update(&now, sk, change);
	id = follow_identity(&now);
	if (change->new_state == STATE_SYN_SENT) {
		if (connection) {
			connection->scratch.stage = STAGE_OPEN;
			connection->scratch.stale_error = BPF_CORE_READ(sk, sk_err);
			connection->scratch.stale_soft_error = BPF_CORE_READ(sk, sk_err_soft);
		}
		return 0;
	}
	/*
	 * Out of SYN_SENT, whether a program saw its beginning or not. Or out of SYN_RECV in a simultaneous open, where close()
	 * sends a FIN.
	 */
	failed = change->new_state == STATE_CLOSE ||
		 (change->old_state == STATE_SYN_RECV && change->new_state == STATE_FIN_WAIT1);
	if (change->new_state != STATE_ESTABLISHED && !failed)
		return 0;
	if (change->old_state != STATE_SYN_SENT &&
	    !(change->old_state == STATE_SYN_RECV && connection && connection->scratch.stage == STAGE_OPEN))
		return 0;
	ending.syn_retrans = BPF_CORE_READ(tp, total_retrans);
	ending.syn_sent = BPF_CORE_READ(tp, segs_out) > 0;
	ending.errno = failed ? error_of(sk, connection) : 0;
	/* tcp_connect() clears the error of an earlier attempt. If it was not called, connect() returns the error. */
	if (!ending.syn_sent && connection && !connection->scratch.error &&
	    ending.errno == connection->scratch.stale_error)
		ending.errno = 0;
	ending.outcome = outcome_of(ending.errno);
	ending.syn_dropped = failed || !ending.syn_sent ? last_syn_dropped(sk) : false;
	/* Without a segment there was no RST. */
	if (ending.outcome == OUTCOME_REFUSED && !BPF_CORE_READ(tp, segs_in))
		ending.outcome = OUTCOME_REJECTED;
	if (connection) {
		if (failed && !ending.errno && !connection->scratch.connect_returned) {
			connection->scratch.stage = STAGE_CLOSED;
			connection->scratch.closed_ns = ending.time_ns;
			connection->scratch.answer = soft_error_of(sk, connection);
			connection->scratch.syn_retrans = ending.syn_retrans;
			connection->scratch.syn_sent = ending.syn_sent;
			connection->scratch.syn_dropped = ending.syn_dropped;
			if (!ending.syn_sent) /* inet_sport may still hold the port of an earlier connection */
				connection->id.lport = BPF_CORE_READ(sk, __sk_common.skc_num);
			return 0;
		}
		connection->scratch.stage = ending.errno ? STAGE_REPORTED : STAGE_NONE;
		if (failed && !ending.errno) /* the application, after connect() had returned */
			gave_up(&ending, soft_error_of(sk, connection));
		ending.began_ns = connection->opened_ns;
	} else if (failed && !ending.errno) {
		if (!ending.syn_sent) /* the return of connect() makes the event, because no entry says STAGE_REPORTED */
			return 0;
		ending.outcome = OUTCOME_GAVE_UP;
	}
	attempt_emit(id, connection ? &connection->opener : NULL, &ending);
	if (change->new_state == STATE_ESTABLISHED) /* only attempts have an entry */
		connection_forget(sk);
	return 0;
}

/* connect() failed before it had a route: the remote end is not in the socket, but in the call's arguments. */
static __noinline int attempt_failed_early(struct sock *sk, const struct socket_address *to, int size, __u32 error)
{
	struct ending ending = {
		.time_ns = bpf_ktime_get_ns(),
		.errno = error,
		.syn_dropped = DROPPED_UNKNOWN,
		.outcome = outcome_without_syn(error),
	};
	struct identity id = {.cookie = cookie_if_any(sk)};
	struct owner owner = {};

	identity_read(sk, &id);
	id.lport = BPF_CORE_READ(sk, __sk_common.skc_num);
	id.rport = bpf_ntohs(to->port);
	if (!socket_address_fits(to, size)) {
		id.rport = 0;
		__builtin_memset(id.raddr, 0, 16);
	} else if (to->family == AF_INET) {
		map_v4(id.raddr, to->v4);
		id.family = 4;
	} else {
		__builtin_memcpy(id.raddr, to->v6, 16);
		id.family = is_v4_mapped(id.raddr) ? 4 : 6;
	}
	owner_of_current(&owner);
	return attempt_emit(&id, &owner, &ending);
}

/* connect() returns. */
static __always_inline void attempt_returned(struct sock *sk, const struct socket_address *to, int size, long result)
{
	__u32 error = result < 0 ? -result : 0;
	struct connection *connection = connection_find(sk);
	enum stage stage = connection ? connection->scratch.stage : STAGE_NONE;
	/* Errors of a repeated call, or of a call that was interrupted: the attempt goes on. */
	bool says_nothing = error == EISCONN || error == EALREADY || error == EINPROGRESS || error == EINTR ||
			    (error >= ERESTARTSYS && error <= ERESTART_RESTARTBLOCK);

	if (to->family == AF_UNSPEC) { /* disconnects; another thread may be waiting */
		if (stage == STAGE_REPORTED && !error)
			connection->scratch.stage = STAGE_NONE;
		return;
	}
	if (stage == STAGE_OPEN)
		connection->scratch.connect_returned = true;
	else if (says_nothing) /* the outcome may come before the call returns */
		return;
	else if (stage == STAGE_CLOSED)
		attempt_resolve(connection, error);
	else if (stage == STAGE_REPORTED) /* the error that the event has shown */
		connection->scratch.stage = STAGE_NONE;
	else if (stage == STAGE_NONE && error && !is_disconnected(error) && !is_answer(sk, error) &&
		 (connection || (filter_may_want(sk) && !BPF_CORE_READ((struct tcp_sock *)sk, segs_out))))
		attempt_failed_early(sk, to, size, error);
}

/* A file that is no socket has no entry either. This takes half as many reads as tcp_sock_of_file(). */
static __always_inline bool file_has_no_entry(struct file *file)
{
	struct socket *socket = BPF_CORE_READ(file, private_data);
	struct sock *sk = BPF_CORE_READ(socket, sk);

	return !connection_find(sk) && BPF_CORE_READ(sk, sk_protocol) != IPPROTO_MPTCP;
}

/* connect(), or sendto() with MSG_FASTOPEN, returns. */
ROLE("delays")
SEC("fexit/__inet_stream_connect")
int FUNCTION_PROG(connected__fexit, struct socket *socket, void *address, int size, int flags, int is_sendmsg,
		  int result)
{
	struct socket_address to = {};
	struct sock *sk;

	sk = tcp_sock_of_socket(socket);
	if (!sk || subflow_is_connected_apart(socket) || (!result && !connection_find(sk)))
		return 0;
	SOCKET_ADDRESS_READ(bpf_probe_read_kernel, &to, address, size);
	attempt_returned(sk, &to, size, result);
	return 0;
}

SEC("tp_btf/sys_exit")
int TRACEPOINT_PROG_IF(syscall_is_connect(regs), connected__syscall, struct pt_regs *regs, long result)
{
	struct socket_address to = {};
	__u64 arguments[3];
	struct file *file;
	struct sock *sk;

	syscall_arguments(regs, arguments);
	file = file_of_fd(arguments[0]);
	/* Most calls succeed, and their sockets have no entry any more. */
	if (!file || (!result && file_has_no_entry(file)))
		return 0;
	sk = tcp_sock_of_file(file);
	if (!sk)
		return 0;
	SOCKET_ADDRESS_READ(bpf_probe_read_user, &to, arguments[1], arguments[2]);
	attempt_returned(sk, &to, arguments[2], result);
	return 0;
}

static __always_inline void before_end(struct sock *sk, struct connection *connection)
{
	attempt_resolve(connection, 0);
}

/* At the end of a run. */
static long flush_entry(struct bpf_map *table, const __u64 *key, struct connection *connection, void *unused)
{
	attempt_resolve(connection, 0);
	return 0;
}

ROLE("flushes")
FOR_EACH_CONNECTION(flush, flush_entry)

static __always_inline void attempt_seed(struct task_struct *task, struct file *file)
{
	struct connection *connection = connection_seed(task, file, STATE_SYN_SENT);

	if (connection && connection->role == ROLE_ACTIVE && !connection->scratch.stage) {
		connection->scratch.stage = STAGE_OPEN;
		connection->scratch.stale_soft_error =
			BPF_CORE_READ(tcp_sock_of_file(file), sk_err_soft); /* perhaps an earlier attempt's */
	}
}

ROLE("seeds")
SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (task && file)
		attempt_seed(task, file);
	return walk_on(ctx);
}
