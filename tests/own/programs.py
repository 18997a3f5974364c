"""Programs of a user's own, as the tests write them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tcpscope.own.compiler import compiled

PLAIN = """
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
struct sock_common {
	__u32 skc_daddr;
	__u16 skc_dport, skc_num, skc_family;
} __attribute__((preserve_access_index));
struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));
struct event { __u32 pid; char comm[16]; __u16 lport, rport; __u32 raddr ADDRESS; __u8 family; int old, new; };
struct event *unused __attribute__((unused));
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } rows SEC(".maps");
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(changed__state, struct sock *sk, int old, int new)
{
	struct event *e = bpf_ringbuf_reserve(&rows, sizeof(*e), 0);
	if (!e)
		return 0;
	e->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	e->lport = sk->__sk_common.skc_num;
	e->rport = __builtin_bswap16(sk->__sk_common.skc_dport);
	e->raddr = sk->__sk_common.skc_daddr;
	e->family = sk->__sk_common.skc_family;
	e->old = old;
	e->new = new;
	bpf_ringbuf_submit(e, 0);
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
""".replace("ADDRESS", '__attribute__((btf_decl_tag("kind:address")))')
"""It has none of our headers, and does not count what it loses."""


def written(folder: Path, name: str, text: str) -> Path:
    """The source of a program, in this folder."""
    path = folder / f"{name}.bpf.c"
    path.write_text(text)
    return path


def built(folder: Path, name: str, text: str) -> Path:
    """Its object file."""
    path = folder / f"{name}.bpf.o"
    path.write_bytes(compiled(written(folder, name, text)))
    return path


def tcpscope(*words: object, status: int, **options: object) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own; it must end with this status."""
    import sys

    argv = [sys.executable, "-m", "tcpscope", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done
