"""A program that the kernel does not take: the line of the source, the verifier's last lines, one hint."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tcpscope.errors import RefusedError, TcpscopeError
from tcpscope.kernel.spec import Program, Spec
from tcpscope.kernel.verifier import source_line, verifier_hint
from tcpscope.own import refusal
from tcpscope.own.compiler import compiled
from tcpscope.own.program import OwnProgram
from tcpscope.request import Request
from tests.own.programs import tcpscope, written

HEAD = """
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
struct sock {
	__u32 sk_mark;
} __attribute__((preserve_access_index));
struct sk_buff {
	struct sock *sk;
} __attribute__((preserve_access_index));
struct freed {
	__u64 common;
	struct sk_buff *skbaddr;
};
struct event { __u64 a; };
const struct event *anchor __attribute__((unused));
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } events SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u64[8]);
} table SEC(".maps");
static __always_inline void send(__u64 a)
{
	struct event e = {a};
	bpf_ringbuf_output(&events, &e, sizeof(e), 0);
}
"""
GPL = 'char LICENSE[] SEC("license") = "GPL";'


def state(name: str) -> str:
    return f'\nSEC("tp_btf/inet_sock_set_state")\nint BPF_PROG({name}, struct sock *sk, int old, int new)\n'


# The program -> the line that is wrong, and a part of the hint.
MISTAKES = {
    "direct": (
        """
SEC("tracepoint/skb/kfree_skb")
int direct(struct freed *ctx)
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
        f"""{state("bound")}{{
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
        f"""{state("unchecked")}{{
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
        f"""{state("reserved")}{{
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
        f"""{state("not_submitted")}{{
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
int BPF_PROG(context, struct sock *sk, int old, int new, int more)
{
	send(more);
	return 0;
}
""",
        "int BPF_PROG(context, struct sock *sk, int old, int new, int more)",
        "read the hook's arguments with BPF_PROG()",
    ),
    "helper": (
        """
SEC("raw_tp/inet_sock_set_state")
int helper(void *ctx)
{
	send(bpf_skb_load_bytes(ctx, 0, 0, 0));
	return 0;
}
""",
        "send(bpf_skb_load_bytes(ctx, 0, 0, 0));",
        "a program of the type raw_tp may not call this helper",
    ),
    "gpl": (
        f"""{state("gpl")}{{
	send(BPF_CORE_READ(sk, sk_mark));
	return 0;
}}
char LICENSE[] SEC("license") = "Proprietary";
""",
        "send(BPF_CORE_READ(sk, sk_mark));",
        'char LICENSE[] SEC("license") = "GPL";',
    ),
    "loop": (
        f"""{state("loop")}{{
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


def refused(source: Path, spec: Spec, program: str, log: str | None = None) -> TcpscopeError:
    """What is said of this program of an object, whose others are left out."""
    own = OwnProgram(spec, source)
    others = tuple(each.hook for each in spec.programs if each.name != program)
    own.skip = lambda request: others
    with pytest.raises(TcpscopeError) as error:
        own.open(Request(options={"event": None, "log": log}))
    assert error.value.exit_status == 3
    return error.value


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errno.EILSEQ, "an offset must be where an instruction begins"),
        (errno.EINVAL, "an offset must be where an instruction begins"),
        (errno.EACCES, "said"),
        (errno.ENOENT, "said"),
    ],
)
def test_an_offset_is_blamed_only_for_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, hint: str
) -> None:
    section = 'SEC("kprobe/tcp_v4_connect+0x10")'
    text = f"{HEAD}{section}\nint within(void *context)\n{{\n\tsend(1);\n\treturn 0;\n}}\n{GPL}"
    spec = Spec("it", compiled(written(tmp_path, "it", text)))
    message = f"it: program 'within': cannot be attached ({os.strerror(error)})"
    monkeypatch.setattr(refusal, "near", lambda program: "")
    found = refusal.explained(RefusedError(message, "", "within", "", "said"), spec, None, None)
    assert str(found) == f"{message}; {hint}"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Spec]]:
    """Mistake -> the source that has it, and its object. All but one are in the same."""
    folder = tmp_path_factory.mktemp("mistakes")
    texts = [text for text, *_ in MISTAKES.values() if "LICENSE" not in text]
    all_ = written(folder, "mistakes", HEAD + "".join(texts) + GPL)
    gpl = written(folder, "gpl", HEAD + MISTAKES["gpl"][0])
    made = {path: Spec(path.name.partition(".")[0], compiled(path)) for path in (all_, gpl)}
    return {name: (path, made[path]) for name in MISTAKES for path in (gpl if name == "gpl" else all_,)}


@pytest.mark.root
def test_a_loop_without_an_end(objects: dict[str, tuple[Path, Spec]]) -> None:
    """Not in an emulator: the verifier walks through a million instructions."""
    source, spec = objects["loop"]
    assert MISTAKES["loop"][2] in str(refused(source, spec, "loop"))


@pytest.mark.kernel
@pytest.mark.root
@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - {"loop"}))
def test_a_common_mistake_has_its_hint(objects: dict[str, tuple[Path, Spec]], mistake: str) -> None:
    _, line, hint = MISTAKES[mistake]
    source, spec = objects[mistake]
    error = refused(source, spec, mistake)
    assert re.match(rf"{spec.name}: program '{mistake}': refused by the kernel \(.*\); ", str(error))
    assert hint in str(error)
    place, above, *lines = error.details
    if line:
        (number,) = [n for n, each in enumerate(source.read_text().splitlines(), 1) if each.strip() == line]
        assert place == f"{spec.name}.bpf.c:{number}: {line}"
    assert re.fullmatch(
        r"the verifier's last lines \(\d+ earlier lines left out; --log FILE writes all of it\):", above
    )
    assert 0 < len(lines) <= 6


@pytest.mark.root
def test_the_whole_log_goes_to_a_file(objects: dict[str, tuple[Path, Spec]], tmp_path: Path) -> None:
    source, spec = objects["bound"]
    error = refused(source, spec, "bound", str(tmp_path / "log"))
    *lines, last = error.details
    assert last == f"its whole log is in {tmp_path}/log"
    whole = (tmp_path / "log").read_text()
    assert MISTAKES["bound"][1] in whole and len(whole.splitlines()) > len(lines)
    assert lines[-1].strip() in whole
    assert refused(source, spec, "bound", "/no/where").details[-1] == (
        "its whole log could not be written to /no/where: No such file or directory"
    )


@pytest.mark.root
def test_on_the_command_line(tmp_path: Path) -> None:
    source = written(tmp_path, "bound", HEAD + MISTAKES["bound"][0] + GPL)
    first, place, *_ = tcpscope("run", source, "-d", "0.1", status=3).stderr.splitlines()
    assert first.startswith("tcpscope: bound: program 'bound': refused by the kernel (")
    assert place.endswith(": send(row[new]);")


@pytest.mark.root
@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("tp_btf/inet_sock_set_stat", "no tracepoint inet_sock_set_stat; did you mean 'inet_sock_set_state'"),
        ("fentry/tcp_retransmit_skbs", "no function tcp_retransmit_skbs; did you mean 'tcp_retransmit_skb'"),
        ("raw_tp/inet_sock_set_stat", "did you mean 'inet_sock_set_state'"),
        ("iter/no_such_thing_at_all", "the kernel has no iterator no_such_thing_at_all"),
    ],
)
def test_no_such_hook(tmp_path: Path, section: str, said: str) -> None:
    text = f'{HEAD}SEC("{section}") int it(void *ctx) {{ send(1); return 0; }}\n{GPL}'
    source = written(tmp_path, "it", text)
    error = refused(source, Spec("it", compiled(source)), "it")
    assert said in str(error)
    assert error.details == ()


@pytest.mark.root
def test_a_field_that_the_kernel_lacks(tmp_path: Path) -> None:
    read = "struct sock___own { int nope; } __attribute__((preserve_access_index));"
    read += f"{state('lacks')}{{ send(BPF_CORE_READ((struct sock___own *)sk, nope)); return 0; }}"
    source = written(tmp_path, "it", f"{HEAD}{read}\n{GPL}")
    assert "this kernel lacks a field or a type" in str(refused(source, Spec("it", compiled(source)), "lacks"))


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
        ("5: (85) call bpf_ringbuf_reserve#131 ; R0=ringbuf_mem_or_null(id=2)\nR1 type=scalar expected=fp", "", ""),
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
