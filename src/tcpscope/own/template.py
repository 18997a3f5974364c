"""The program that `tcpscope new` writes."""

from __future__ import annotations

import re

from tcpscope.errors import UsageError

_SOURCE = """\
// SPDX-License-Identifier: GPL-2.0-only
/* Shows each transition of a connection's TCP state. Try it: tcpscope run {name}.bpf.c */

/* tcpscope's: the event with its owner, filters, the ring buffer and the counters of what is lost. */
#include "socket_event.bpf.h"

/* One row. A field is a column; the tags are optional. Put fields of 8 bytes first, or fill gaps with `padding`. */
struct row {{
	struct event event; /* time, both ends, process */
	__u32 srtt_us UNIT("us") UNKNOWN_IS("zero") DOC("smoothed round-trip time");
	enum tcp_state old_state DOC("state before the transition");
	enum tcp_state new_state DOC("state after the transition");
	__u16 padding;
}};

/* So that the compiler keeps its description. */
const struct row *anchor __attribute__((unused));

/* SEC() names the hook: the tracepoint inet_sock_set_state, whose arguments follow the program's name. */
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG(changed, struct sock *sk, int old_state, int new_state)
{{
	struct row *event;

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	event = socket_event_begin(NULL, sizeof(*event), sk, COOKIE_OF(sk), sk);
	if (!event) /* filtered, or the ring buffer is full */
		return 0;
	event->srtt_us = BPF_CORE_READ((struct tcp_sock *)sk, srtt_us) >> 3; /* the kernel has it in eighths */
	event->old_state = old_state;
	event->new_state = new_state;
	event->padding = 0;
	return event_submit(event);
}}
"""


def checked(name: str) -> str:
    """The name, if it can be that of a program. UsageError."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,30}", name):
        raise UsageError(f"the name {name!r}", "give letters, digits and _, such as slow_reads")
    return name


def source(name: str) -> str:
    return _SOURCE.format(name=name)
