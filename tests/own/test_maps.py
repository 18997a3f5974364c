"""Perf event arrays, and several maps with events in one object."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tcpscope import open as opened
from tcpscope.errors import MalformedError, UnsupportedError
from tcpscope.kernel.loaded import Loaded
from tcpscope.kernel.ring import PerfArray
from tcpscope.own import program
from tcpscope.own.cli import read
from tcpscope.own.program import OwnProgram
from tcpscope.request import Request
from tests.conftest import RunningTool
from tests.own.programs import PLAIN, built, tcpscope, written
from tests.own.test_run import connect_once
from tests.test_privileges import only

pytestmark = pytest.mark.root

RING = "struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } rows"
PERF = """struct { __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY); __uint(key_size, 4); __uint(value_size, 4); } rows"""
RESERVE = PLAIN[PLAIN.index("\tstruct event *e = bpf") : PLAIN.index("\te->pid")]
PERF_PLAIN = (
    PLAIN.replace(RING, PERF)
    .replace(RESERVE, "\tstruct event event = {}, *e = &event;\n")
    .replace("bpf_ringbuf_submit(e, 0);", "bpf_perf_event_output(ctx, &rows, BPF_F_CURRENT_CPU, e, sizeof(*e));")
)
"""The same program with the map of bcc and libbpf-tools."""
SEVERAL = (
    PLAIN[: PLAIN.index("struct event {")]
    + """
struct opened { __u64 sock; __u32 pid; __u16 lport, rport; };
struct closed { __u32 pid; char comm[16]; __u16 lport, rport; __u32 kept_us UNIT; int reason; };
struct counted { __u32 pid; __u16 lport, rport; __s64 reason; };
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); __type(value, struct opened); }
	openings SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); __type(value, struct closed); }
	closings SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY); __uint(key_size, 4); __type(value, struct counted); }
	counts SEC(".maps");
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(changed, struct sock *sk, int old, int new)
{
	__u16 lport = sk->__sk_common.skc_num, rport = __builtin_bswap16(sk->__sk_common.skc_dport);
	__u32 pid = bpf_get_current_pid_tgid() >> 32;
	struct counted counted = {pid, lport, rport, new};

	if (new == 1) {
		struct opened opened = {(__u64)sk, pid, lport, rport};
		bpf_ringbuf_output(&openings, &opened, sizeof(opened), 0);
	} else if (new == 7) {
		struct closed closed = {pid, "", lport, rport, 0, -1};
		bpf_get_current_comm(closed.comm, sizeof(closed.comm));
		bpf_ringbuf_output(&closings, &closed, sizeof(closed), 0);
	}
	bpf_perf_event_output(ctx, &counts, BPF_F_CURRENT_CPU, &counted, sizeof(counted));
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
""".replace("UNIT", '__attribute__((btf_decl_tag("unit:us")))')
)


@pytest.mark.kernel
def test_a_perf_event_array_shows_what_a_ring_buffer_shows(lab, run_tool: type[RunningTool], tmp_path: Path) -> None:
    perf, ring = written(tmp_path, "perf", PERF_PLAIN), written(tmp_path, "ring", PLAIN)
    with run_tool("run", str(perf)) as one, run_tool("run", str(ring)) as other:
        ports = {connect_once(lab) for _ in range(5)}
    assert one.done and other.done and one.done.stats
    both = [[row for row in tool.done.rows if {row["lport"], row["rport"]} in map(set, ports)] for tool in (one, other)]
    assert len(both[0]) >= 5 * 6
    assert sorted(map(repr, both[0])) == sorted(map(repr, both[1]))
    account = one.done.stats
    assert (account["shown"], account["filtered"], account["table_full"]) == (len(one.done.rows), 0, None)


def test_explain_has_the_memory_of_the_buffers(tmp_path: Path) -> None:
    """A buffer of each processor, with a page for its positions."""
    done = tcpscope("run", written(tmp_path, "perf", PERF_PLAIN), "--buffer", "1M", "--explain", status=0)
    bytes_ = (os.cpu_count() or 1) * ((1 << 20) + os.sysconf("SC_PAGESIZE"))
    assert done.stdout.splitlines()[-1] == f"  perf buffers   {bytes_ / 1e6:.1f} MB of the kernel's, for all processors"
    done = tcpscope("run", written(tmp_path, "ring", PLAIN), "--explain", status=0)
    assert "perf buffers" not in done.stdout


FLOOD = PERF_PLAIN.replace("\tbpf_perf_event_output", "\tfor (int i = 0; i < 200; i++)\n\t\tbpf_perf_event_output")


def test_what_found_no_room_is_counted(lab, run_tool: type[RunningTool], tmp_path: Path) -> None:
    """The reader is stopped. Each change of a state is sent 200 times, into buffers of a page."""
    source = written(tmp_path, "flood", FLOOD)
    with run_tool("run", str(source), "--buffer", "4K") as tool:
        os.kill(tool.pid, signal.SIGSTOP)
        ports = [connect_once(lab) for _ in range(10)]
        os.kill(tool.pid, signal.SIGCONT)
        tool.wait_for(len)
        connect_once(lab)  # before 6.0 the kernel tells of a loss with the next event
    done = tool.done
    assert done and done.stats
    account = done.stats
    if account["seen"] is None:
        assert "but that it is at least" in done.stderr
        return
    assert account["lost"] > 1000
    assert account["seen"] == account["shown"] + account["filtered"] + account["lost"]
    assert account["seen"] % 200 == 0 and account["seen"] >= 200 * 10 * len(ports)


def test_each_map_has_its_struct(lab, run_tool: type[RunningTool], tmp_path: Path) -> None:
    source = written(tmp_path, "several", SEVERAL)
    with run_tool("run", str(source)) as tool, run_tool("run", str(source), "--event", "closed") as closings:
        port, mine = connect_once(lab)
        of_it = lambda rows: [row for row in rows if row["rport"] in (port, mine)]  # noqa: E731
        tool.wait_for(lambda rows: len([row for row in of_it(rows) if row["struct"] == "closed"]) == 2)
        closings.wait_for(lambda rows: len(of_it(rows)) == 2)
    assert tool.done and closings.done
    rows = of_it(tool.done.rows)
    assert list(rows[0]) == ["struct", "sock", "pid", "lport", "rport", "comm", "kept_us", "reason"]
    opened = [row for row in rows if row["struct"] == "opened"]
    assert {(row["lport"], row["rport"]) for row in opened} == {(port, mine), (mine, port)}
    assert {(row["comm"], row["kept_us"], row["reason"]) for row in opened} == {(None, None, None)}
    ended = [row for row in rows if row["struct"] == "closed"]
    assert {(row["reason"], row["kept_us"], row["sock"]) for row in ended} == {(-1, 0, None)}
    counted = [row for row in rows if row["struct"] == "counted"]
    assert {row["reason"] for row in counted} >= {1, 7}
    assert list(closings.done.rows[0]) == ["pid", "comm", "lport", "rport", "kept_us", "reason"]


@pytest.mark.parametrize("columns", [("comm",), ("struct",), ("struct", "kept_us")])
def test_a_struct_with_none_of_the_columns(lab, run_tool, tmp_path: Path, columns: tuple[str, ...]) -> None:
    source = written(tmp_path, "several", SEVERAL)
    with run_tool("run", str(source), "--columns", ",".join(columns)) as tool:
        connect_once(lab)
        tool.wait_for(lambda rows: len(rows) >= 8)
    assert tool.done and tool.done.stats
    assert {tuple(row) for row in tool.done.rows} == {columns}
    assert tool.done.stats["shown"] == len(tool.done.rows)
    if "struct" in columns:
        assert {row["struct"] for row in tool.done.rows} >= {"opened", "closed", "counted"}
    else:
        assert {row["comm"] is None for row in tool.done.rows} == {True, False}


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        (
            ("__type(value, struct closed); ", ""),
            (),
            "which struct has closings?; say it in the map: __type(value, struct",
        ),
        (("", ""), ("--event", "close"), "--event close: no map of 'several' has such events; did you mean 'closed'?"),
        (("", ""), ("--strict",), "--strict; 'several' does not count what it loses: include event.bpf.h"),
        (("", ""), ("--comm", "x"), "--comm x; struct opened has no field 'comm'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], words: tuple[str, ...], says: str) -> None:
    source = written(tmp_path, "several", SEVERAL.replace(*change))
    (line,) = tcpscope("run", source, *words, status=2).stderr.splitlines()
    assert says in line


OTHER_RING = 'struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); VALUE } others SEC(".maps");\n'
COUNTERS = PERF.replace("rows", "counters") + ' SEC(".maps");\n'
TYPEDEF = "typedef struct { int a; } unnamed;\n"


@pytest.mark.parametrize(
    ("more", "name", "words"),
    [
        (COUNTERS, "rows", ()),
        (OTHER_RING.replace("VALUE", ""), "events", ()),
        (OTHER_RING.replace("VALUE", "__type(value, struct sock);"), "rows", ("--event", "event")),
        (TYPEDEF + OTHER_RING.replace("VALUE", "__type(value, unnamed);"), "events", ()),
        (TYPEDEF + COUNTERS.replace("__uint(value_size, 4)", "__type(value, unnamed)"), "rows", ()),
    ],
)
def test_one_map_need_not_say_its_struct(
    lab, run_tool: type[RunningTool], tmp_path: Path, more: str, name: str, words: tuple[str, ...]
) -> None:
    """The only ring buffer, the map `events`, the one that is left for --event."""
    text = PLAIN.replace(RING, RING.replace("rows", name)).replace("&rows", f"&{name}")
    text = text.replace('SEC("tp_btf', f'{more}SEC("tp_btf', 1)
    with run_tool("run", str(written(tmp_path, "beside", text)), *words) as tool:
        connect_once(lab)
        tool.wait_for(len)
    assert tool.done
    assert list(tool.done.rows[0]) == ["pid", "comm", "lport", "rport", "raddr", "family", "old", "new"]
    assert ("is not read: it does not say its struct" in tool.done.stderr) == (not words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "which struct has rows?; say it in the map: __type(value, struct NAME), or call it 'events'"),
        (("--event", "event"), "which struct has rows?"),
    ],
)
def test_several_maps_without_a_struct(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    text = PLAIN.replace('SEC("tp_btf', OTHER_RING.replace("VALUE", "") + 'SEC("tp_btf', 1)
    (line,) = tcpscope("run", written(tmp_path, "both", text), *words, status=2).stderr.splitlines()
    assert says in line


def test_records_of_another_size(lab, run_tool: type[RunningTool], tmp_path: Path) -> None:
    text = PERF_PLAIN.replace("e, sizeof(*e));", "e, sizeof(*e) - 8);")
    with run_tool("run", str(written(tmp_path, "short", text))) as tool:
        connect_once(lab)
        done = tool.wait()
    assert done.status == 1
    assert done.stderr.splitlines()[-1] == (
        "tcpscope: the perf event array has a record that is not of 40 bytes; each must be one whole event"
    )


ONE_PLACE = PERF_PLAIN.replace("__uint(key_size, 4);", "__uint(key_size, 4); __uint(max_entries, 1);")


def test_an_array_with_too_few_places(lab, run_tool: type[RunningTool], tmp_path: Path) -> None:
    """It has one for the first processor: what the last one sends is read, too."""
    source, before = written(tmp_path, "places", ONE_PLACE), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(before)})
        with run_tool("run", str(source)) as tool:
            port, _ = connect_once(lab)
            tool.wait_for(lambda rows: sum(row["rport"] == port for row in rows) >= 2)
    finally:
        os.sched_setaffinity(0, before)


def test_the_buffers_are_there_before_a_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(class_: type, method: str) -> None:
        called = getattr(class_, method)
        monkeypatch.setattr(class_, method, lambda *given: (order.append(class_.__name__), called(*given))[1])

    noted(Loaded, "attach")
    noted(PerfArray, "__init__")
    with opened(written(tmp_path, "perf", PERF_PLAIN)):
        pass
    assert order == ["PerfArray", "Loaded"]


def test_a_processor_that_comes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its perf event array has no buffer: what is lost is not known any more."""
    monkeypatch.setattr(program, "online_cpus", lambda: "0")
    with opened(written(tmp_path, "perf", PERF_PLAIN), duration=60) as events:
        run = events._run
        assert run.account().record()["lost"] == 0 and run.account().lossless
        monkeypatch.setattr(program, "online_cpus", lambda: "0-1")
        list(run.poll())
        account = run.account()
    assert account.record()["lost"] is None and not account.lossless
    assert any("processors 0 ran at the start, now 0-1: a perf event array has no buffer" in n for n in run.notes)


def test_strict_needs_a_kernel_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before 6.0, where the kernel tells of a loss only with the next event."""

    class Older(PerfArray):
        counts = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]

    monkeypatch.setattr(program, "PerfArray", Older)
    source = written(tmp_path, "perf", PERF_PLAIN)
    with opened(source):
        pass
    with pytest.raises(UnsupportedError, match=r"--strict: this kernel does not count .* kernels from 6.0 do"):
        OwnProgram(*read(source)).open(Request(strict=True, options={"event": None, "log": None}))


@pytest.mark.parametrize(
    ("capabilities", "options", "says"),
    [
        (("CAP_BPF", "CAP_PERFMON"), (), ""),
        (
            ("CAP_BPF", "CAP_PERFMON"),
            ("--buffer", "64M"),
            "the perf event array cannot be opened: Operation not permitted, beyond the limit of locked memory; "
            "a smaller --buffer, CAP_IPC_LOCK or a larger 'ulimit -l' helps",
        ),
        (("CAP_BPF", "CAP_PERFMON", "CAP_IPC_LOCK"), ("--buffer", "64M"), ""),
    ],
)
def test_memory_of_the_buffers(
    run_tool: type[RunningTool], tmp_path: Path, capabilities: tuple[str, ...], options: tuple[str, ...], says: str
) -> None:
    object_ = built(tmp_path, "perf", PERF_PLAIN)
    with run_tool("run", str(object_), *options, prefix=only(*capabilities), ready=not says) as tool:
        if says:
            done = tool.wait()
    if says:
        assert done.status == 4
        assert done.stderr.splitlines() == [f"tcpscope: {says}"]
    else:
        assert tool.done and tool.done.status == 0


@pytest.mark.parametrize("size", [65600, 131072])
def test_a_size_that_has_no_place_in_a_record(lab, tmp_path: Path, monkeypatch, size: int) -> None:
    """The record's header has the lower 16 bits of its size: no more than that is read."""
    monkeypatch.setattr(PerfArray, "largest", 1 << 20)
    source = written(tmp_path, "big", BIG.replace("SIZE", str(size)))
    with opened(source, buffer=1 << 20, duration=60) as events, pytest.raises(MalformedError, match="a record that"):
        connect_once(lab)
        next(iter(events))


@pytest.mark.parametrize(
    ("size", "options", "says"),
    [
        (65516, (), ""),
        (65520, ("--buffer", "1M"), "'rows': struct big has 65520 bytes, the kernel sends 65516 at most"),
        (8192, ("--buffer", "4K"), "--buffer 4K; struct big has 8192 bytes, which find no room in 'rows'"),
    ],
)
def test_large_structs(
    lab, run_tool: type[RunningTool], tmp_path: Path, size: int, options: tuple[str, ...], says: str
) -> None:
    source = written(tmp_path, "big", BIG.replace("SIZE", str(size)))
    if says:
        (line,) = tcpscope("run", source, *options, status=2).stderr.splitlines()
        assert says in line
        return
    with run_tool("run", str(source), "--columns", "last", *options) as tool:
        connect_once(lab)
        assert tool.wait_for(len)[0] == {"last": 7}


BIG = (
    PERF_PLAIN[: PERF_PLAIN.index("struct event {")]
    + """
struct big { char name[16]; __u8 padding[SIZE - 20]; int last; };
const struct big *anchor __attribute__((unused));
"""
    + PERF
    + """ SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, int); __type(value, struct big); }
	places SEC(".maps");
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(changed, struct sock *sk, int old, int new)
{
	int zero = 0;
	struct big *big = bpf_map_lookup_elem(&places, &zero);

	if (!big)
		return 0;
	big->last = 7;
	bpf_perf_event_output(ctx, &rows, BPF_F_CURRENT_CPU, big, sizeof(*big));
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""
)
