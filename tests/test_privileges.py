"""Each tool runs with exactly the capabilities that it names, and with none of them once it has begun.

The tools run as root whose bounding set is cut: what counts for the kernel is the capability, not the user.
"""

from __future__ import annotations

import errno
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpscope import tool as toolbox
from tcpscope.kernel.features import Kernel
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.ways import plan, plan_refusals
from tcpscope.lab.hosts import Lab
from tests.conftest import CompletedRun, RunningTool

CAP_BPF = 1 << 39
PORT = 4712


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One for all tests here, with a listener of this process in the server."""
    with Lab() as made:
        listener = made.server.socket(socket.AF_INET)
        listener.bind((made.server.ipv4, PORT))
        listener.listen()
        yield made


@pytest.fixture(scope="module")
def memory() -> set[str]:
    """What a kernel wants besides that counts maps as locked memory (before 5.11)."""
    return set() if Kernel().accounts_memory_by_cgroup else {"CAP_SYS_RESOURCE"}


def only(*capabilities: str) -> list[str]:
    """Words before a command that let it have these capabilities and no other, and the usual limit of memory."""
    granted = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in capabilities)
    return [
        "prlimit",
        "--memlock=65536:65536",
        "--",
        "setpriv",
        f"--bounding-set=-all{granted}",
        "--inh-caps=-all",
        "--",
    ]


def capabilities_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: int(value, 16) for name, _, value in (line.partition(":\t") for line in lines) if "Cap" in name}


def kept_while_it_runs() -> int:
    """CAP_BPF before "bpf: refine kernel.unprivileged_bpf_disabled behaviour" (5.19), unless that sysctl is 0."""
    release = tuple(map(int, platform.release().split(".")[:2]))
    forbidden = int(Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text())
    return CAP_BPF if forbidden and release < (5, 19) else 0


def call(lab: Lab, port: int) -> int:
    """Connect from the client to the server; the error."""

    def connect() -> int:
        with socket.socket() as client:
            return client.connect_ex((lab.server.ipv4, port))

    return lab.client.run(connect)


@pytest.mark.kernel
def test_states(lab: Lab, memory: set[str], run_tool: type[RunningTool]) -> None:
    needed = {*toolbox.find("states").capabilities, *memory}
    with run_tool("states", "--netns", str(lab.client.inode), prefix=only(*needed)) as tool:
        has = capabilities_of(tool.pid)
        assert (has["CapEff"], has["CapPrm"], has["CapAmb"]) == (kept_while_it_runs(),) * 2 + (0,)
        assert call(lab, 9) == errno.ECONNREFUSED
        tool.wait_for(lambda rows: len(rows) == 2)
    check(tool.done)


@pytest.mark.kernel
def test_rtt(lab: Lab, memory: set[str], run_tool: type[RunningTool]) -> None:
    """Its numbers lie in a map that it empties while it runs."""
    needed = {*toolbox.find("rtt").capabilities, *memory}
    arguments = ("rtt", "-i", "0.1", "--by", "pid", "--netns", str(lab.client.inode))
    with run_tool(*arguments, prefix=only(*needed)) as tool:
        has = capabilities_of(tool.pid)
        assert (has["CapEff"], has["CapPrm"]) == (kept_while_it_runs(),) * 2
        assert call(lab, PORT) == 0
        tool.wait_for(lambda rows: any(row["count"] for row in rows))
    check(tool.done)


@pytest.mark.kernel
def test_queue(lab: Lab, memory: set[str], run_tool: type[RunningTool]) -> None:
    """It looks at the sockets of all namespaces again and again."""
    needed = {*toolbox.find("queue").capabilities, *memory}
    with run_tool("queue", "-i", "0.1", "--netns", str(lab.server.inode), prefix=only(*needed)) as tool:
        has = capabilities_of(tool.pid)
        assert (has["CapEff"], has["CapPrm"]) == (kept_while_it_runs(),) * 2
        tool.wait_for(lambda rows: len(rows) > 2 and {row["lport"] for row in rows} == {PORT})
    check(tool.done)


@pytest.mark.kernel
def test_list(lab: Lab, memory: set[str], run_tool: type[RunningTool]) -> None:
    """Its own namespace needs no more; the others say what they need."""
    needed = {*toolbox.find("list").capabilities, *memory}
    arguments = ("list", "--lport", str(PORT))
    listener = socket.create_server(("127.0.0.1", PORT))
    with run_tool(*arguments, prefix=only(*needed)) as tool:
        done = tool.wait()
    own = Path("/proc/self/ns/net").stat().st_ino
    assert [(row["netns"], row["laddr"]) for row in done.rows] == [(own, "127.0.0.1")]
    assert len(done.rows[0]["holders"]) == 1
    assert "without CAP_SYS_ADMIN" in done.stderr
    assert done.status == 0
    with run_tool("list", "--netns", str(lab.server.inode), prefix=only(*needed), ready=False) as tool:
        done = tool.wait()
    assert (done.status, done.stdout) == (4, "")
    assert done.stderr == f"tcpscope: cannot enter network namespace {lab.server.inode}; needs CAP_SYS_ADMIN\n"
    with run_tool(*arguments, prefix=only(*needed, "CAP_SYS_ADMIN")) as tool:
        done = tool.wait()
    assert {own, lab.server.inode} <= {row["netns"] for row in done.rows}  # the lab's has a name
    assert re.match(r"tcpscope: could not look into .* process(es)? without CAP_SYS_PTRACE\n", done.stderr)
    with run_tool(*arguments, prefix=only(*needed, "CAP_SYS_ADMIN", "CAP_SYS_PTRACE")) as tool:
        done = tool.wait()
    listener.close()
    assert {(own, "127.0.0.1"), (lab.server.inode, lab.server.ipv4)} <= {(r["netns"], r["laddr"]) for r in done.rows}
    assert done.status == 0


@pytest.mark.kernel
def test_names_of_functions(lab: Lab, memory: set[str], run_tool: type[RunningTool]) -> None:
    """CAP_SYSLOG is for the names in --stack; without it there are the addresses."""
    spec = Spec.of("listeners")
    hooks = plan(spec, plan_refusals(spec, Kernel()))
    if hooks["syn_exit"].program is None:
        pytest.skip(f"no stacks: {next(iter(hooks['syn_exit'].refused.values()))}")
    needed = {*toolbox.find("queue").capabilities, *memory}
    paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) > 2
    if paranoid and any(hook.program and "kprobe" in hook.program.type for hook in hooks.values()):
        # Without it refusals are sampled, and the reason is said.
        arguments = ("queue", "--events", "--netns", str(lab.server.inode))
        with run_tool(*arguments, prefix=only(*needed)) as tool:
            pass
        assert tool.done is not None
        assert "kernel probes need CAP_SYS_ADMIN): refusals are sampled" in tool.done.stderr
        needed.add("CAP_SYS_ADMIN")
    arguments = ("queue", "--events", "--stack", "--netns", str(lab.server.inode))
    listener = lab.server.socket(socket.AF_INET)
    listener.bind((lab.server.ipv4, PORT + 1))
    listener.listen(0)
    assert call(lab, PORT + 1) == 0  # waits for accept(); with a backlog of 0 the next one is too many
    with (
        run_tool(*arguments, prefix=only(*needed)) as plain,
        run_tool(*arguments, prefix=only(*needed, "CAP_SYSLOG")) as named,
    ):
        assert capabilities_of(named.pid)["CapPrm"] == kept_while_it_runs()
        client = lab.client.socket(socket.AF_INET)
        client.setblocking(False)
        assert client.connect_ex((lab.server.ipv4, PORT + 1)) == errno.EINPROGRESS
        plain.wait_for(lambda rows: rows)
        named.wait_for(lambda rows: rows)
        client.close()
    listener.close()
    assert plain.done is not None and named.done is not None
    unknown = [row for row in (*plain.done.rows, *named.done.rows) if not row["stack"]]
    assert unknown == []
    addresses, names = plain.done.rows[0]["stack"], named.done.rows[0]["stack"]
    assert any(name.startswith("tcp_rcv_state_process+0x") for name in names)
    assert any(name.startswith("tcp_conn_request") for name in names)
    assert ("names need CAP_SYSLOG" in plain.done.stderr) == (addresses != names)
    assert "CAP_SYSLOG" not in named.done.stderr
    if addresses != names:  # a lax perf_event_paranoid shows the names to everybody
        assert all(address.startswith("0xffff") for address in addresses)
    assert len(addresses) in (len(names), len(names) - 1)  # the function itself may be known by name alone


@pytest.mark.kernel
def test_features_and_pages_name_them(memory: set[str], features: dict[str, Any]) -> None:
    pages = Path(__file__).parent.parent / "docs/tools"
    for entry in features["tools"]:
        tool = toolbox.find(entry["tool"])
        assert set(entry["capabilities"]) == {*tool.capabilities, *memory}
        assert entry["for_more"].items() >= tool.for_more.items()
        section = (pages / f"{entry['tool']}.md").read_text().partition("\n## Privileges\n")[2].partition("\n## ")[0]
        assert [name for name in (*entry["capabilities"], *entry["for_more"]) if name not in section] == []


@pytest.mark.kernel
def test_root_gives_up_everything(lab: Lab, run_tool: type[RunningTool]) -> None:
    with run_tool("states", "--netns", str(lab.client.inode)) as tool:
        has = capabilities_of(tool.pid)
        assert (has["CapEff"], has["CapPrm"]) == (kept_while_it_runs(),) * 2
    check(tool.done)


@pytest.mark.kernel
def test_each_missing_one_is_named(memory: set[str], run_tool: type[RunningTool]) -> None:
    """So none of them is asked for in vain."""
    needed = {*toolbox.find("states").capabilities, *memory}
    for missing in sorted(needed):
        with run_tool("states", "-d", "1", prefix=only(*needed - {missing}), ready=False) as tool:
            done = tool.wait()
        assert (done.status, done.stdout) == (4, "")
        assert len(done.stderr.splitlines()) == 1
        assert missing in done.stderr
        assert not any(other in done.stderr for other in needed - {missing})


@pytest.mark.parametrize("name", toolbox.names())
def test_without_any(run_tool: type[RunningTool], name: str) -> None:
    with run_tool(name, prefix=only(), ready=False) as tool:
        done = tool.wait()
    assert (done.status, done.stdout) == (4, "")
    assert done.stderr == "tcpscope: missing CAP_BPF and CAP_PERFMON; run as root, or grant them\n"


@pytest.mark.kernel
def test_an_ordinary_user() -> None:
    """Everything is imported as root: the user need not be allowed to read this installation."""
    script = (
        "import os, sys\n"
        "from tcpscope import cli, tool\n"
        "from tcpscope.kernel.spec import Spec\n"
        "tool.find('states'), Spec.of('transition')\n"
        "os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)\n"
        "sys.argv = ['tcpscope', 'states']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == "tcpscope: missing CAP_BPF and CAP_PERFMON; run as root, or grant them\n"
    assert (done.returncode, done.stdout) == (4, "")


def check(done: CompletedRun | None) -> None:
    """It ended as it should, and its account was still readable."""
    assert done is not None
    assert done.status == 0
    if done.stats is not None:
        assert done.stats["seen"] == done.stats["shown"] + done.stats["filtered"] + done.stats["lost"]
        assert done.stats["lost"] == done.stats["missed"] == 0
