// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/*
 * All TCP sockets of a network namespace that exist now, and all processes that hold one.
 *
 * iter/tcp visits the sockets of the namespace in which it is opened, also those without a file: handshakes, TIME_WAIT,
 * children in an accept queue, closed sockets that still send. iter/task_file visits the holders, in all namespaces.
 */

#include "kernel.bpf.h"
#include "compat.bpf.h"
#include "output.bpf.h"
#include "filter.bpf.h"
#include "files.bpf.h"
#include "owner.bpf.h"

struct existing {
	struct identity id;
	enum tcp_state state DOC("state");
	bool timewait; /* a timewait socket, which has no owner any more */
	__u8 padding[2];
	__u32 rx_queue_bytes TITLE("RECV-Q") UNIT("bytes") UNKNOWN_IS("max")
	DOC("received and not yet read, a FIN included; null for a listener");
	__u32 tx_queue_bytes TITLE("SEND-Q") UNIT("bytes") UNKNOWN_IS("max")
	DOC("sent and not yet acknowledged, or not yet sent; null for a listener");
	__u32 accept_queue TITLE("ACCEPTQ") UNKNOWN_IS("max")
	DOC("connections that wait for accept(); only for a listener");
	__u32 accept_limit TITLE("LIMIT") UNKNOWN_IS("max") DOC("limit of the accept queue; only for a listener");
	__u32 uid WIDTH(5) DOC("user that created the socket") UNKNOWN_IS("max");
	__u64 socket;
};

const struct existing *existing_anchor __attribute__((unused));

struct holder {
	struct owner owner;
	__u64 socket;
	__u64 cookie;
	__u64 started_ns;
	__u32 fd DOC("file descriptor");
	bool wanted; /* passes the filter */
	__u8 padding[3];
};

const struct holder *holder_anchor __attribute__((unused));

static __always_inline void full_socket_read(struct tcp_sock *tcp, struct existing *record)
{
	struct sock *sk = (struct sock *)tcp;
	int unread;

	identity_read(sk, &record->id);
	record->uid = BPF_CORE_READ(sk, sk_uid.val);
	if (record->state == STATE_LISTEN) {
		record->accept_queue = BPF_CORE_READ(sk, sk_ack_backlog);
		record->accept_limit = BPF_CORE_READ(sk, sk_max_ack_backlog);
		record->rx_queue_bytes = record->tx_queue_bytes = -1;
		return;
	}
	/* As tcp_diag_get_info() computes them. After a FIN copied_seq may be one ahead of rcv_nxt. */
	unread = BPF_CORE_READ(tcp, rcv_nxt) - BPF_CORE_READ(tcp, copied_seq);
	record->rx_queue_bytes = unread > 0 ? unread : 0;
	record->tx_queue_bytes = BPF_CORE_READ(tcp, write_seq) - BPF_CORE_READ(tcp, snd_una);
}

/* A request or a timewait socket: it has only the common part. */
static __always_inline void small_socket_read(struct sock_common *common, struct existing *record)
{
	identity_read((struct sock *)common, &record->id);
	record->rx_queue_bytes = record->tx_queue_bytes = 0;
	record->uid = -1;
}

SEC("iter/tcp")
int existing(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct existing record = {.accept_queue = -1, .accept_limit = -1};
	struct tcp_sock *tcp;

	if (!common)
		return 0;
	record.state = common->skc_state;
	record.socket = (__u64)common;
	tcp = bpf_skc_to_tcp_sock(common);
	if (tcp) {
		full_socket_read(tcp, &record);
	} else {
		struct tcp_timewait_sock *timewait = bpf_skc_to_tcp_timewait_sock(common);

		small_socket_read(common, &record);
		/* A request. Only the kernel distinguishes the two states; ss shows SYN_RECV, too. */
		if (record.state == STATE_NEW_SYN_RECV)
			record.state = STATE_SYN_RECV;
		if (timewait) {
			record.timewait = true;
			record.state = timewait->tw_sk.tw_substate;
		}
	}
	record.id.cookie = COOKIE_OF(common);
	if (!filter_identity(&record.id))
		return 0;
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}

SEC("iter/task_file")
int holders(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct holder record = {};
	struct sock *sk;

	if (!task || !file)
		return 0;
	sk = tcp_sock_of_file(file);
	if (!sk)
		return 0;
	owner_of_task(task, &record.owner);
	record.wanted = filter_owner(&record.owner);
	record.socket = (__u64)sk;
	record.started_ns = started_ns(task);
	record.cookie = cookie_if_any(sk);
	record.fd = ctx->fd;
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}
