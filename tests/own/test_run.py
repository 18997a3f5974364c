"""`tcpscope run`: an object file or a source, through the ordinary outputs, filters and account."""

from __future__ import annotations

import json
import os
import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

import tcpscope
from tcpscope.errors import UsageError
from tests.own.programs import PLAIN, built, written
from tests.own.programs import tcpscope as command_line

pytestmark = pytest.mark.root

BPF = Path(__file__).resolve().parents[2] / "src/tcpscope/bpf"


def connect_once(lab) -> tuple[int, int]:
    """One connection to the lab's server, opened and closed. Returns its two ports: the server's and the client's."""
    with lab.server.run(socket.create_server, (lab.server.ipv4, 0)) as listener:
        port = listener.getsockname()[1]
        with lab.client.run(socket.create_connection, (lab.server.ipv4, port)) as made:
            mine = made.getsockname()[1]
            listener.accept()[0].close()
    return port, mine


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("plain"), "plain", PLAIN)


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_our_own_probe_shows_what_its_tool_shows(lab, run_tool, tmp_path: Path) -> None:
    netns = ("--netns", str(lab.client.inode))
    with (
        run_tool("run", str(BPF / "transition.bpf.c"), *netns) as own,
        run_tool("states", *netns) as tool,
    ):
        connect_once(lab)
        closed = lambda rows: any(row["new_state"] == "CLOSE" for row in rows)  # noqa: E731
        tool.wait_for(closed)
        own.wait_for(closed)
    named = {row["cookie"]: row for row in tool.done.rows}
    assert named
    assert [row | {"time": None, "in_state_us": None} for row in own.done.rows] == [
        row | {"time": None, "in_state_us": None} for row in tool.done.rows
    ]
    account = own.done.stats
    assert account["seen"] == account["shown"] + account["filtered"] + account["lost"]
    assert (account["shown"], account["lost"]) == (len(own.done.rows), 0)


@pytest.mark.kernel
def test_an_object_without_our_headers(lab, run_tool, plain: Path) -> None:
    with run_tool("run", str(plain), "--comm", "pytest,python,python3") as tool:
        port, mine = connect_once(lab)
        rows = tool.wait_for(lambda rows: any(row["rport"] == port and row["new"] == 1 for row in rows))
    (opened,) = [row for row in rows if row["rport"] == port and row["new"] == 1]
    assert list(opened) == ["pid", "comm", "lport", "rport", "raddr", "family", "old", "new"]
    assert (opened["lport"], opened["raddr"], opened["family"], opened["old"]) == (mine, lab.server.ipv4, 2, 2)
    assert opened["pid"] == os.getpid()
    account = tool.done.stats
    assert account["seen"] is account["lost"] is account["table_full"] is None
    assert account["shown"] == len(tool.done.rows)
    assert "what is lost is not known: 'plain' does not count it" in tool.done.stderr


@pytest.mark.parametrize(
    ("filters", "matches"),
    [
        (("--lport", "PORT"), lambda row, port: row["lport"] == port),
        (("--rport", "PORT", "-4"), lambda row, port: row["rport"] == port),
        (("--port", "PORT"), lambda row, port: port in (row["lport"], row["rport"])),
        (("--raddr", "ADDRESS", "--port", "PORT"), lambda row, port: port in (row["lport"], row["rport"])),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_fields_of_the_struct_decide(lab, run_tool, plain: Path, filters, matches) -> None:
    with lab.server.run(socket.create_server, (lab.server.ipv4, 0)) as listener:
        port = listener.getsockname()[1]
        words = [word.replace("PORT", str(port)).replace("ADDRESS", lab.server.ipv4) for word in filters]
        with run_tool("run", str(plain), *words, "--columns", "lport,rport,new") as tool:
            connect_once(lab)  # another port
            with lab.client.run(socket.create_connection, (lab.server.ipv4, port)):
                listener.accept()[0].close()
            rows = tool.wait_for(len)
    assert rows and all(matches(row, port) for row in rows)
    assert list(rows[0]) == ["lport", "rport", "new"]
    account = tool.done.stats
    assert account["filtered"] >= 4  # those of the other connection
    assert account["shown"] == len(tool.done.rows)


@pytest.mark.parametrize("output", ["csv", "table"])
def test_other_outputs(lab, run_tool, plain: Path, output: str) -> None:
    with run_tool("run", str(plain), "-o", output, "-n", "1") as tool:
        connect_once(lab)
        done = tool.wait()
    titles, row = done.stdout.splitlines()
    if output == "csv":
        assert titles == "pid,comm,lport,rport,raddr,family,old,new"
        assert len(row.split(",")) == 8
    else:
        assert titles.split() == ["PID", "COMM", "LPORT", "RPORT", "RADDR", "FAMILY", "OLD", "NEW"]


def test_a_source_in_a_folder_that_cannot_be_written(lab, run_tool, tmp_path: Path) -> None:
    source = written(tmp_path, "mine", PLAIN)
    tmp_path.chmod(0o500)
    with run_tool("run", "mine.bpf.c", "-n", "1", cwd=tmp_path) as tool:
        connect_once(lab)
        assert len(tool.wait().rows) == 1
    assert list(tmp_path.iterdir()) == [source]


SHORT = """bpf_ringbuf_submit(e, 0);
	void *shorter = bpf_ringbuf_reserve(&rows, 32, 0);
	if (shorter)
		bpf_ringbuf_submit(shorter, 0);
"""


def test_rows_before_a_record_of_another_size(lab, run_tool, tmp_path: Path) -> None:
    source = written(tmp_path, "behind", PLAIN.replace("bpf_ringbuf_submit(e, 0);", SHORT))
    with run_tool("run", str(source)) as tool:
        connect_once(lab)
        done = tool.wait()
    assert (done.status, len(done.rows)) == (1, 1)
    assert "the ring buffer has a record that is not of 40 bytes" in done.stderr


def test_records_of_another_size(lab, run_tool, tmp_path: Path) -> None:
    source = written(
        tmp_path, "short", PLAIN.replace("sizeof(*e), 0)", "sizeof(*e) - 4, 0)").replace("e->new = new;", "")
    )
    with run_tool("run", str(source)) as tool:
        connect_once(lab)
        done = tool.wait()
    assert done.status == 1
    assert done.stderr.splitlines()[-1] == (
        "tcpscope: the ring buffer has a record that is not of 40 bytes; each must be one whole event"
    )


def test_explain_names_the_hooks(plain: Path) -> None:
    said = command_line("run", plain, "--explain", status=0).stdout
    assert "probe plain" in said
    assert "changed__state tp_btf/inet_sock_set_state" in said
    said = command_line("run", plain, "--explain", "--pid", os.getpid(), status=0).stdout
    assert said.splitlines()[-1] == f"  filter --pid {os.getpid()}: decided in user space"


def test_odd_names_and_programs_that_are_not_to_be_loaded(lab, run_tool, tmp_path: Path) -> None:
    text = PLAIN.replace("__u8 family", "__u8 class").replace("e->family", "e->class")
    text += '\nSEC("?tp_btf/no_such_hook") int never(void *ctx) { return 0; }\n'
    with run_tool("run", str(written(tmp_path, "odd name-1", text)), "-n", "1", "--buffer", "64K") as tool:
        connect_once(lab)
        (row,) = tool.wait().rows
    assert row["class"] == 2


def test_a_reader_that_leaves_ends_it(lab, run_tool, plain: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        with run_tool("run", str(plain), stdout=write_end) as tool:
            os.close(write_end)
            connect_once(lab)
            assert os.read(read_end, 1) == b"{"
            os.close(read_end)
            connect_once(lab)
            assert tool.wait().status == 0
    finally:
        assert "Traceback" not in tool.stderr


def test_json_is_json(lab, run_tool, plain: Path) -> None:
    with run_tool("run", str(plain), "-o", "json", "-n", "2") as tool:
        connect_once(lab)
        done = tool.wait()
    assert [set(json.loads(line)) >= {"pid", "new"} for line in done.stdout.splitlines()] == [True, True]


@pytest.mark.kernel
def test_in_python(lab, plain: Path) -> None:
    """The rows of a program, by its path: addresses are addresses, and filters are keywords."""
    with tcpscope.open(plain, pid=os.getpid(), duration=60) as events:
        port, mine = connect_once(lab)
        opened = next(row for row in events if row.rport == port and row.new == 1)
    assert (opened.lport, opened.raddr, opened.comm) == (
        mine,
        ip_address(lab.server.ipv4),
        Path("/proc/self/comm").read_text().strip(),
    )
    assert any("what is lost is not known" in note for note in events.notes)


def test_what_python_is_told(plain: Path, tmp_path: Path) -> None:
    for path, asked, says in (
        (tmp_path / "x.bpf.c", {}, "there is no file"),
        (plain, {"nope": 1}, "'run' has no 'nope'"),
        (plain, {"event": "evnt"}, "--event evnt: 'plain' has no such struct in its BTF; did you mean 'event'?"),
        (plain, {"event": 7}, "event=7; give a value of type str"),
        (plain, {"uid": 0}, "--uid 0; struct event has no field 'uid'"),
        (7, {}, "tool=7; give the name of a tool, or the Path of a program"),
    ):
        with pytest.raises(UsageError) as error:
            tcpscope.open(path, **asked)
        assert says in str(error.value)


def test_the_help_says_how_large_the_buffers_are() -> None:
    text = " ".join(command_line("run", "--help", status=0).stdout.split())
    assert "perf event array's buffer for each processor. [default: what the ring buffer's map says, 4M with" in text
    assert "256K for each processor]" in text
    assert "kernel and tool. [default: 4M]" in " ".join(command_line("states", "--help", status=0).stdout.split())


PASSES_BY = """
#include "socket_event.bpf.h"
struct mine { struct event event; __u32 old, new; };
const struct mine *anchor __attribute__((unused));
static __always_inline int send(struct mine *mine, int old, int new)
{
	if (!mine)
		return 0;
	mine->old = old;
	mine->new = new;
	return event_submit(mine);
}
SEC("tp_btf/inet_sock_set_state")
int TRACEPOINT_PROG(changed, struct sock *sk, int old, int new)
{
	COUNTED
	struct mine *mine = bpf_ringbuf_reserve(&events, sizeof(*mine), 0);
	if (mine)
		__builtin_memset(mine, 0, sizeof(*mine));
	return send(mine, old, new);
}
"""
COUNTED = """
	if (new != STATE_ESTABLISHED)
		return send(socket_event_begin(NULL, sizeof(struct mine), sk, COOKIE_OF(sk), sk), old, new);
"""


@pytest.mark.kernel
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("counted", ["", COUNTED], ids=["none", "some"])
def test_events_that_pass_the_counters_by(lab, run_tool, tmp_path: Path, counted: str, strict: bool) -> None:
    """The sides of its account are not equal, so it is none. Where some are counted, more may be seen than shown."""
    source = written(tmp_path, "mine", PASSES_BY.replace("COUNTED", counted))
    words = ("--comm", "nobody", *(["--strict"] if strict else []))
    with run_tool("run", str(source), *words) as tool:
        for _ in range(10):
            connect_once(lab)
        tool.wait_for(len)
    done = tool.done
    assert len(done.rows) > 10
    assert done.stats["shown"] == len(done.rows)
    assert done.stats["seen"] is done.stats["lost"] is None
    *_, told, account = done.stderr.splitlines()[: -1 if strict else None]
    assert told == ("tcpscope: what is lost is not known: 'mine' does not send exactly what event_begin() counts")
    assert account.startswith(f"tcpscope: shown {len(done.rows)} + filtered ")
    assert account.endswith("; what was lost before is not known")
    assert done.status == (5 if strict else 0)
    if strict:
        assert done.stderr.splitlines()[-1] == (
            "tcpscope: what was lost is not known; "
            "with our headers each event must come from event_begin(), and go by event_submit()"
        )


def test_python_is_told_that_a_loss_is_not_known(lab, plain: Path) -> None:
    with tcpscope.open(plain, duration=60) as events:
        connect_once(lab)
        next(iter(events))
        with pytest.raises(tcpscope.LossError, match=r"what was lost is not known: shown \d"):
            events.stats.check()
