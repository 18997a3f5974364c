"""What is given to `tcpscope run` and `tcpscope new`: each mistake is one line, and says what helps."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tcpscope import tool
from tcpscope.errors import TcpscopeError, UsageError
from tcpscope.filters import Filter
from tcpscope.kernel.spec import Spec, probes
from tcpscope.lab import processes
from tcpscope.own import compiler
from tcpscope.own.cli import read
from tcpscope.own.program import OwnProgram, Union, check_filter, check_sections, event_of, events_of
from tcpscope.own.template import checked, source
from tcpscope.request import Request
from tcpscope.schema import Clock, Layout
from tests.compiled import compiled
from tests.conftest import DEADLINE, until
from tests.own.programs import PLAIN, built, tcpscope, written

RING = 'struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } {name} SEC(".maps");'
HEAD = "#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n"
PROGRAM = 'SEC("tp_btf/tcp_probe") int it(void *ctx) { return 0; }\n'


def spec_of(folder: Path, text: str, name: str = "it") -> Spec:
    return compiled(folder, name, HEAD + text)


def ring(name: str) -> str:
    return RING.replace("{name}", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def said(call, *arguments: object) -> str:
    with pytest.raises(UsageError) as error:
        call(*arguments)
    return str(error.value)


def test_files_that_are_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "empty.bpf.c").touch()
    (tmp_path / "text.bpf.o").write_text("hello")
    (tmp_path / "native.o").write_bytes(Path(sys.executable).resolve().read_bytes()[:4096])
    assert said(read, tmp_path / "emty.bpf.c") == f"there is no file {tmp_path}/emty.bpf.c; did you mean 'empty.bpf.c'?"
    assert said(read, tmp_path / "x") == f"there is no file {tmp_path}/x; 'tcpscope new NAME' writes one"
    assert said(read, tmp_path).startswith(f"{tmp_path} is no file; give a program in C")
    assert said(read, tmp_path / "empty.bpf.c").startswith(f"{tmp_path}/empty.bpf.c is empty")
    assert said(read, tmp_path / "text.bpf.o").startswith(f"{tmp_path}/text.bpf.o is neither C nor an object file")
    assert said(read, tmp_path / "native.o").startswith(f"{tmp_path}/native.o is no object file for BPF")


def test_an_object_without_btf(tmp_path: Path) -> None:
    (tmp_path / "it.c").write_text(HEAD + PROGRAM)
    argv = ["clang", "-target", "bpf", "-O2", "-idirafter", "/usr/include/x86_64-linux-gnu"]
    subprocess.run([*argv, "-c", tmp_path / "it.c", "-o", tmp_path / "it.bpf.o"], check=True)
    with pytest.raises(TcpscopeError) as error:
        read(tmp_path / "it.bpf.o")
    assert str(error.value) == "it: no .BTF section; compile with clang -g"


def test_an_object_that_is_cut_short(folder: Path, tmp_path: Path) -> None:
    whole = built(folder, "plain", PLAIN).read_bytes()
    for size in range(0, len(whole), 997):
        (tmp_path / "cut.bpf.o").write_bytes(whole[:size])
        with pytest.raises(TcpscopeError):
            read(tmp_path / "cut.bpf.o")


def test_c_that_does_not_compile(tmp_path: Path) -> None:
    path = written(tmp_path, "bad", "int f(void) { return x; }\n" * 30)
    with pytest.raises(TcpscopeError) as error:
        compiler.compiled(path)
    assert str(error.value) == f"{path}: clang cannot compile it"
    assert "bad.bpf.c:1:" in error.value.details[0]
    assert len(error.value.details) == 21
    assert error.value.details[-1].endswith("more lines)")
    path.write_text('#include "bpf/bpf_helper.h"\n')
    with pytest.raises(TcpscopeError) as error:
        compiler.compiled(path)
    assert "apt install libbpf-dev" in str(error.value)


def test_without_clang(tmp_path: Path) -> None:
    path = written(tmp_path, "plain", PLAIN)
    done = tcpscope("run", path, status=1, env={"PATH": "/nowhere"})
    assert done.stderr == (
        f"tcpscope: {path}: there is no clang to compile it; on Debian and Ubuntu: apt install clang libbpf-dev; "
        "or give an object file (.bpf.o) from another machine\n"
    )


def test_a_clang_with_a_version_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run(["sh", "-c", "command -v clang"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "clang-14").symlink_to(real)
    path = written(tmp_path, "mine", source("mine"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read(path)[0].counts


def test_the_compiler_for_packages(tmp_path: Path) -> None:
    path, made = written(tmp_path, "mine", source("mine")), tmp_path / "mine.bpf.o"
    argv = [sys.executable, "-m", "tcpscope.own.compiler", path, made]
    subprocess.run(argv, check=True)
    assert Spec.of(made).counts
    path.write_text("int f(void) { return x; }")
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path}: clang cannot compile it\n") and "Traceback" not in done.stderr


@pytest.mark.root
def test_vmlinux_h_is_made_of_the_running_kernel(tmp_path: Path) -> None:
    text = '#include "vmlinux.h"\n#include <bpf/bpf_helpers.h>\nstruct event { struct list_head it; };\n'
    path = written(tmp_path, "it", f"{text}struct event *keep;\n{ring('events')}\n{PROGRAM}")
    spec, _ = read(path)
    assert [field.name for field in Layout.whole(spec.btf, "event").fields] == ["next", "prev"]
    (tmp_path / "vmlinux.h").write_text("struct list_head { int mine; };\n#include <linux/bpf.h>\n")
    spec, _ = read(path)
    assert [field.name for field in Layout.whole(spec.btf, "event").fields] == ["mine"]  # the one beside it


VMLINUX = '#include "vmlinux.h"\nint it;\n'


@pytest.mark.root
def test_no_room_for_vmlinux_h(tmp_path: Path) -> None:
    """It has megabytes, and the folder for temporary files is on a small file system."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', folder)
    done = subprocess.run(
        [*mount, sys.executable, "-m", "tcpscope", "run", written(tmp_path, "it", VMLINUX)],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"tcpscope: {folder}: there is no room for vmlinux.h (No space left on device); "
        "make room, or name another folder in TMPDIR\n",
    )


@pytest.mark.parametrize(
    ("words", "number", "status"),
    [
        (("tcpscope", "run"), signal.SIGTERM, 0),
        (("tcpscope", "run"), signal.SIGINT, 0),
        (("tcpscope", "run"), signal.SIGHUP, -signal.SIGHUP),
        (("tcpscope.own.compiler",), signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_a_signal_while_it_is_compiled(tmp_path: Path, words: tuple[str, ...], number: int, status: int) -> None:
    """It ends as ever, and leaves no temporary file."""
    folder, clang, begun = tmp_path / "temporary", tmp_path / "clang", tmp_path / "begun"
    folder.mkdir()
    clang.write_text(f"#!/bin/sh\n: >{begun}\nexec tail --pid=$PPID -f /dev/null\n")
    clang.chmod(0o755)
    made = ["it.bpf.o"] if len(words) == 1 else []
    with processes.start(
        [sys.executable, "-m", *words, written(tmp_path, "it", VMLINUX), *made],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
    ) as run:
        try:
            until(begun.exists, "clang")
            assert next(folder.glob("tcpscope.*/vmlinux.h")).stat().st_size > 1 << 20
            run.send_signal(number)
            _, said = run.communicate(timeout=DEADLINE)
        finally:
            run.kill()
    assert (run.returncode, said) == (status, b"")
    assert list(folder.iterdir()) == []


def test_warnings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler.compiled(written(tmp_path, "it", f"{HEAD}static int f(int a) {{ int b; return a; }}\n{PROGRAM}"))
    assert "unused variable 'b'" in capsys.readouterr().err


def test_without_privileges(folder: Path) -> None:
    path = built(folder, "plain", PLAIN)
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"] if os.getuid() == 0 else []
    argv = [*prefix, sys.executable, "-m", "tcpscope", "run", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stderr == "tcpscope: missing CAP_BPF and CAP_PERFMON; run as root, or grant them\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("int x;", "it: there is no program in it"),
        (f'{ring("events")}SEC("xdp") int it(void *ctx) {{ return 0; }}', "SEC(\"xdp\") of 'it' is not for tracing"),
        (f'{ring("events")}SEC("tp_btff/x") int it(void *ctx) {{ return 0; }}', "of 'it' is not for tracing"),
        (f"{ring('events')}{PROGRAM.replace('tp_btf', '?tp_btf')}", "it: there is no program in it"),
        (PROGRAM, "no ring buffer and no perf event array, so there are no events; output.bpf.h has one"),
    ],
)
def test_an_object_that_sends_no_events(folder: Path, text: str, error: str) -> None:
    assert error in said(check_sections, spec_of(folder, text))


PERF = 'struct { __uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY); VALUE } old SEC(".maps");'
STRUCTS = "struct a { int x; }; struct b { int x; };"


def test_the_maps_through_which_events_come(folder: Path) -> None:
    value = "__type(value, struct a);"
    for text, channels in (
        (ring("mine"), {"mine": ""}),
        (ring("mine") + ring("events"), {"mine": "", "events": ""}),
        (PERF.replace("VALUE", "__uint(value_size, 4);"), {"old": ""}),
        (PERF.replace("VALUE", "__type(value, int);"), {"old": ""}),
        (PERF.replace("VALUE", value) + ring("mine"), {"old": "a", "mine": ""}),
        (ring("mine").replace("}", f"{value} }}"), {"mine": "a"}),
    ):
        spec = spec_of(folder, STRUCTS + text + PROGRAM)
        assert spec.channels == channels
        check_sections(spec)
    assert Spec.of("transition").channels == {"events": ""}


def test_which_struct_a_map_has(folder: Path) -> None:
    a, b = (PERF.replace("old", f"m{each}").replace("VALUE", f"__type(value, struct {each});") for each in "ab")
    assert events_of(spec_of(folder, STRUCTS + a + PROGRAM), None) == {"ma": "a"}
    both = spec_of(folder, STRUCTS + a + b + PROGRAM)
    assert events_of(both, None) == {"ma": "a", "mb": "b"}
    assert events_of(both, "b") == {"mb": "b"}
    assert "--event c: no map of 'it' has such events; there are a, b" in said(events_of, both, "c")
    unknown = spec_of(folder, STRUCTS + a + ring("mine") + ring("other") + PROGRAM)
    assert said(events_of, unknown, None) == (
        "it: of several maps with events (ma, mine, other), which struct has mine?; "
        "say it in the map: __type(value, struct NAME), or call it 'events'"
    )


def test_fields_of_one_name_that_are_not_alike(folder: Path) -> None:
    text = "struct a { int x, y; }; struct b { char x[4]; int y, z; };"
    a, b = (PERF.replace("old", f"m{each}").replace("VALUE", f"__type(value, struct {each});") for each in "ab")
    spec = spec_of(folder, text + a + b + PROGRAM)
    union = Union([Layout.whole(spec.btf, name) for name in "ab"])
    assert [(column.name, column.nullable) for column in union.columns] == [
        ("struct", False),
        ("x", True),
        ("y", False),
        ("b_x", True),
        ("z", True),
    ]
    layouts = [Layout.whole(spec.btf, name) for name in "ab"]
    for names, rows in (
        (["struct", "y", "z"], [("a", 2, None), ("b", 2, 3)]),
        (["z"], [(None,), (3,)]),  # the first struct has none of them
        (["b_x", "x"], [(None, 1), ("A", None)]),
    ):
        for at, data in enumerate((struct.pack("<ii", 1, 2), struct.pack("<4sii", b"A", 2, 3))):
            decode = union.decoder(at, layouts[at], names, Clock("none"), hex)
            assert [msgspec.structs.astuple(row) for row in decode(memoryview(2 * data))] == 2 * [rows[at]]


@pytest.mark.parametrize(
    ("text", "asked", "found"),
    [
        ("struct a { int x; }; struct a *keep;", None, "a"),
        ("struct a { int x; }; struct b { int x; }; struct a *keep; struct b *too;", "b", "b"),
        ("struct a { int x; }; struct it { int x; }; struct a *keep; struct it *too;", None, "it"),
        ("struct event { int x; }; struct event value;", None, "event"),
    ],
)
def test_which_struct_an_event_is(folder: Path, text: str, asked: str | None, found: str) -> None:
    assert event_of(spec_of(folder, text), asked) == found


@pytest.mark.parametrize(
    ("text", "asked", "error"),
    [
        (
            "int x;",
            None,
            "it: its BTF does not tell which struct an event is; the compiler keeps it if",
        ),
        (
            "struct a { int x; }; struct a *keep;",
            "aa",
            "--event aa: 'it' has no such struct in its BTF; did you",
        ),
        (
            "struct a { int x; }; struct b { int x; }; struct a *keep; struct b *too;",
            None,
            "it: which struct is the event: a, b?; say it: --event a",
        ),
    ],
)
def test_no_struct(folder: Path, text: str, asked: str | None, error: str) -> None:
    assert error in said(event_of, spec_of(folder, text), asked)


def test_the_event_of_our_own_probes() -> None:
    for probe in ("transition", "retrans", "attempt", "accepted", "resets", "drops", "life"):
        spec = Spec.of(probe)
        event = next(tool.find(name).event for name in tool.names() if probe in tool.find(name).probes)
        assert event_of(spec, None) == event
        assert [field.name for field in Layout.whole(spec.btf, event).fields] == [
            field.name for field in spec.layout(event).fields
        ]
    assert all(Spec.of(probe).counts for probe in probes())


def shown(spec: Spec) -> list[str]:
    """The columns of a table."""
    tool_ = OwnProgram(spec)
    tool_.choose(request := Request(options={"event": None, "log": None}))
    return list(tool_.chosen(request))


def test_a_table_has_what_the_struct_adds_to_ours(folder: Path) -> None:
    ours = compiled(folder, "mine", source("mine"))
    ends = ["time", "lport", "rport", "laddr", "raddr", "pid", "comm"]
    assert shown(ours) == [*ends, "srtt_us", "old_state", "new_state"]
    text = "enum event { A, B }; struct mine { enum event kind; int cookie, uid; }; struct mine *keep;"
    assert shown(spec_of(folder, text, "mine")) == ["kind", "cookie", "uid"]


def test_filters_that_the_struct_cannot_decide(folder: Path) -> None:
    text = "struct event { int pid; unsigned char comm[16]; int raddr; int lport[2]; int family; }; struct event *keep;"
    layout = Layout.whole(spec_of(folder, text).btf, "event")
    for options, error in (
        ({"rport": "80"}, "--rport 80; struct event has no field 'rport'"),
        ({"port": "80"}, "field 'lport' of struct event is no number"),
        ({"raddr": "::1"}, "field 'raddr' of struct event is no address: tag it KIND(\"address\")"),
        ({"comm": "x"}, "field 'comm' of struct event is no text"),
        ({"cgroup": "1"}, "--cgroup and a command behind -- need event.bpf.h; only the kernel"),
    ):
        assert error in said(check_filter, Filter.from_options(**options), layout)
    check_filter(Filter.from_options(pid=os.getpid(), ipv4=True), layout)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request(strict=True, options={"event": None, "log": None}), "--strict; 'plain' does not count what it loses"),
        (Request(rate=5, options={"event": None, "log": None}), "--rate 5; the program itself keeps to it"),
        (Request(columns="nope", options={"event": None, "log": None}), "unknown column 'nope'"),
    ],
)
def test_what_a_program_without_our_headers_cannot_do(folder: Path, request_: Request, error: str) -> None:
    spec = Spec("plain", built(folder, "plain", PLAIN).read_bytes())
    assert error in said(OwnProgram(spec).open, request_)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    assert "no file can be written there" in tcpscope("run", "x", "--log", "/no/where", status=2).stderr
    assert "no file can be written there" in tcpscope("run", "x", "--log", tmp_path, status=2).stderr


@pytest.mark.parametrize("words", [(), ("a", "b"), ("a", "--count"), ("a", "-o", "screen")])
def test_odd_command_lines(words: tuple[str, ...]) -> None:
    assert len(tcpscope("run", *words, status=2).stderr.splitlines()) == 1


def test_new_writes_a_program_that_compiles_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tcpscope("new", "slow_reads", status=0, cwd=tmp_path)
    assert done.stderr == "slow_reads.bpf.c: show its events with 'tcpscope run slow_reads.bpf.c'\n"
    path = tmp_path / "slow_reads.bpf.c"
    spec, found = read(path)
    assert found == path
    assert capsys.readouterr().err == ""
    assert event_of(spec, None) == "row"
    assert "again" not in path.read_text()
    before = path.read_text()
    again = tcpscope("new", "slow_reads", status=2, cwd=tmp_path)
    assert again.stderr == "tcpscope: slow_reads.bpf.c is there already; take another name, or remove it\n"
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["connection", "event", "sock", "anchor", "events", "changed", "int", "inline"])
def test_a_name_that_has_a_meaning_in_c(tmp_path: Path, name: str) -> None:
    """It names structs, maps and functions of our headers or the kernel, what the template itself has, a keyword."""
    path = tmp_path / f"{checked(name)}.bpf.c"
    path.write_text(source(name))
    spec, _ = read(path)
    assert event_of(spec, None) == "row"


@pytest.mark.parametrize("name", ["", "a b", "1a", "../x", "é", "a" * 32, "-x.bpf.c"])
def test_a_name_that_is_none(name: str) -> None:
    assert "give letters, digits and _, such as slow_reads" in said(checked, name)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"] if os.getuid() == 0 else []
    argv = [*prefix, sys.executable, "-m", "tcpscope", "new", "mine"]
    if os.getuid() == 0:
        tmp_path.chmod(0o000)
    done = subprocess.run(argv, cwd="/proc", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("tcpscope: mine.bpf.c cannot be written: ")
