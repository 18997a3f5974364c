"""A program that the kernel does not take: the line of the source, the verifier's last lines, one hint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tcpscope.kernel.spec import Program
from tcpscope.kernel.verifier import source_line, verifier_hint
from tcpscope.own import refusal
from tests.own.programs import tcpscope, written

HEAD = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
struct event { __u64 a; };
const struct event *anchor __attribute__((unused));
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } events SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64[8]);
} table SEC(".maps");
static void send(__u64 a)
{
	struct event e = {a};
	bpf_ringbuf_output(&events, &e, sizeof(e), 0);
}
"""
STATE = """
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(changed, struct sock *sk, int old, int new)
"""
GPL = 'char LICENSE[] SEC("license") = "GPL";'

# The program -> the line that is wrong, and a part of the hint.
MISTAKES = {
    "direct": (
        """
SEC("tracepoint/skb/kfree_skb")
int drop(struct trace_event_raw_kfree_skb *ctx)
{
	struct sk_buff *skb = ctx->skbaddr;
	send((__u64)skb->sk);
	return 0;
}
""",
        "send((__u64)skb->sk);",
        "follow kernel pointers with BPF_CORE_READ",
    ),
    "bound": (
        f"""{STATE}{{
	__u32 key = 0;
	__u64 *row = bpf_map_lookup_elem(&table, &key);
	if (!row)
		return 0;
	send(row[new]);
	return 0;
}}
""",
        "send(row[new]);",
        "test it first (if (n >= SIZE) return 0;)",
    ),
    "unchecked": (
        f"""{STATE}{{
	__u32 key = old;
	__u64 *row = bpf_map_lookup_elem(&table, &key);
	send(row[0]);
	return 0;
}}
""",
        "send(row[0]);",
        "bpf_map_lookup_elem() may return NULL",
    ),
    "reserved": (
        f"""{STATE}{{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	e->a = old;
	bpf_ringbuf_submit(e, 0);
	return 0;
}}
""",
        "e->a = old;",
        "bpf_ringbuf_reserve() may return NULL",
    ),
    "not_submitted": (
        f"""{STATE}{{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		return 0;
	if (old == 1)
		return 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}}
""",
        "",
        "submit what was reserved",
    ),
    "context": (
        """
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(changed, struct sock *sk, int old, int new, int more)
{
	send(more);
	return 0;
}
""",
        "int BPF_PROG(changed, struct sock *sk, int old, int new, int more)",
        "read the hook's arguments with BPF_PROG()",
    ),
    "helper": (
        """
SEC("raw_tp/inet_sock_set_state")
int changed(void *ctx)
{
	send(bpf_skb_load_bytes(ctx, 0, 0, 0));
	return 0;
}
""",
        "send(bpf_skb_load_bytes(ctx, 0, 0, 0));",
        "a program of the type raw_tp may not call this helper",
    ),
    "gpl": (
        f"""{STATE}{{
	send(BPF_CORE_READ(sk, sk_mark));
	return 0;
}}
char LICENSE[] SEC("license") = "Proprietary";
""",
        "send(BPF_CORE_READ(sk, sk_mark));",
        'char LICENSE[] SEC("license") = "GPL";',
    ),
    "loop": (
        f"""{STATE}{{
	for (__u32 i = 0;; i++) {{
		if (bpf_get_prandom_u32() == i)
			break;
	}}
	return 0;
}}
""",
        "",
        "give it a constant bound",
    ),
}


@pytest.mark.kernel
@pytest.mark.root
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_common_mistake_has_its_hint(tmp_path: Path, mistake: str) -> None:
    text, line, hint = MISTAKES[mistake]
    source = written(tmp_path, mistake, HEAD + text + ("" if "LICENSE" in text else GPL))
    said = tcpscope("run", source, "-d", "0.1", status=3).stderr.splitlines()
    assert re.match(rf"tcpscope: {mistake}: program '\w+': refused by the kernel \(.*\); ", said[0])
    assert hint in said[0]
    number = next((n for n, each in enumerate(source.read_text().splitlines(), 1) if each.strip() == line), 0)
    assert said[1].startswith(f"  {mistake}.bpf.c")
    if line:
        assert said[1] == f"  {mistake}.bpf.c:{number}: {line}"
    assert re.fullmatch(
        r"  the verifier's last lines \(\d+ earlier lines left out; --log FILE writes all of it\):", said[2]
    )
    assert 0 < len(said) - 3 <= 6


@pytest.mark.kernel
@pytest.mark.root
def test_the_whole_log_goes_to_a_file(tmp_path: Path) -> None:
    text, line, _ = MISTAKES["bound"]
    source, log = written(tmp_path, "bound", HEAD + text + GPL), tmp_path / "log"
    said = tcpscope("run", source, "--log", log, status=3).stderr.splitlines()
    assert said[-1] == f"  its whole log is in {log}"
    whole = log.read_text()
    assert line in whole and len(whole.splitlines()) > len(said)
    assert said[-2].strip() in whole


@pytest.mark.kernel
@pytest.mark.root
@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            "tp_btf/inet_sock_set_stat",
            "no tracepoint inet_sock_set_stat; did you mean 'inet_sock_set_state'",
        ),
        (
            "fentry/tcp_retransmit_skbs",
            "no function tcp_retransmit_skbs; did you mean 'tcp_retransmit_skb'",
        ),
        ("iter/tcpp", "the kernel has no iterator tcpp; did you mean 'tcp'"),
        ("tp_btf/no_such_thing_at_all_here", "the kernel has no tracepoint no_such_thing_at_all_here"),
    ],
)
def test_no_such_hook(tmp_path: Path, section: str, said: str) -> None:
    text = f'{HEAD}SEC("{section}") int it(void *ctx) {{ send(1); return 0; }}\n{GPL}'
    error = tcpscope("run", written(tmp_path, "it", text), status=3).stderr
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("last", "section", "hint"),
    [
        ("R7 invalid mem access 'inv'", "tracepoint/skb/kfree_skb", "BPF_CORE_READ"),  # before 5.18
        ("R0 invalid mem access 'map_value_or_null'", "", "bpf_map_lookup_elem() may return NULL"),
        ("R0 invalid mem access 'mem_or_null'", "", "bpf_ringbuf_reserve() may return NULL"),  # before 5.19
        ("R1 invalid mem access 'ptr_or_null_'", "", "this pointer may be NULL"),
        ("R6 unbounded memory access, make sure to bounds check any such access", "", "stays within bounds"),
        ("invalid access to map value, value_size=64 off=64 size=8", "", "stays within bounds"),
        ("back-edge from insn 12 to 3", "", "constant bound"),  # before 5.3, and of what cannot be bounded
        ("cannot call GPL-restricted function from non-GPL compatible program", "", "GPL"),
        ("unknown func bpf_skb_load_bytes#26", "kprobe/tcp_connect", "type kprobe may not call this helper"),
        (
            "invalid bpf_context access off=96 size=8",
            "tp/tcp/tcp_probe",
            "/sys/kernel/tracing/events/tcp/tcp_probe",
        ),
        ("R1 !read_ok", "", "initialize it"),
        ("access beyond struct sock at off 1464 size 4", "tp_btf/tcp_probe", "BPF_CORE_READ"),
        ("something new", "", ""),
    ],
)
def test_hints_for_logs_of_other_kernels(last: str, section: str, hint: str) -> None:
    log = f"0: R1=ctx() R10=fp0\n; x = y; @ it.bpf.c:7\n1: (79) r1 = *(u64 *)(r1 +24)\n{last}\nprocessed 2 insns\n"
    found = verifier_hint(log, section)
    assert hint in found and bool(found) == bool(hint)
    assert source_line(log) == ("x = y;", "it.bpf.c", 7)


def test_before_6_9_the_line_is_looked_for_in_the_source(tmp_path: Path) -> None:
    source = written(tmp_path, "it", "int a;\n\tx = y;\nint b;\nint b;\n")
    assert source_line("; x = y;\n1: (79) r1 = r2\n;\nR1 !read_ok\n") == ("x = y;", "", 0)
    assert refusal._number_of("x = y;", source) == 2
    assert refusal._number_of("int b;", source) == 0  # two lines have it
    assert refusal._number_of("x = y;", None) == 0


def test_a_hook_that_exists_needs_no_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "_in_btf", lambda kind, begin: ["tcp_connect", "tcp_v4_connect"])
    assert refusal.near(Program("it", "fentry/tcp_connect")) == ""
    assert refusal.near(Program("it", "fentry/tcp_conect")).startswith("did you mean 'tcp_connect'")


def test_without_tracefs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(refusal, "_EVENTS", (tmp_path / "events",))
    program = Program("it", "tracepoint/tcp/tcp_prob")
    assert "mount -t tracefs" in refusal.near(program)
    (tmp_path / "events/tcp/tcp_probe").mkdir(parents=True)
    (tmp_path / "events/tcp/tcp_probe/format").touch()
    assert refusal.near(program) == "did you mean 'tcp/tcp_probe'?"
