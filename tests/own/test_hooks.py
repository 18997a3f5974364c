"""Functions that a user's program hooks: an instruction within one, one without BTF, one of a module."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tcpscope.kernel.features import Answer
from tcpscope.kernel.spec import Program
from tcpscope.own import hooks
from tcpscope.own.hooks import UsersKernel, module_of
from tests.conftest import RunningTool
from tests.own.programs import tcpscope, written

KALLSYMS = """0000000000000000 T tcp_connect
0000000000000000 t asm_only
0000000000000000 D tcp_hashinfo
0000000000000000 t veth_xmit\t[veth]
"""
SOURCE = """
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
struct event { __u32 pid; };
const struct event *anchor __attribute__((unused));
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } rows SEC(".maps");
SEC("HOOK")
int hooked(void *ctx)
{
	struct event event = { bpf_get_current_pid_tgid() >> 32 };

	bpf_ringbuf_output(&rows, &event, sizeof(event), 0);
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""


class Imagined(UsersKernel):
    """It has the function tcp_connect in its BTF, and takes all hooks."""

    def __init__(self) -> None:
        pass

    fentry = kprobe = Answer(True)

    def parameters(self, function: str) -> int | None:
        return 1 if function == "tcp_connect" else None


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / "kallsyms").write_text(KALLSYMS)
    (tmp_path / "veth").touch()
    monkeypatch.setattr(hooks, "_KALLSYMS", tmp_path / "kallsyms")
    monkeypatch.setattr(hooks, "BTF", tmp_path / "vmlinux")
    monkeypatch.setattr(hooks, "has_capability", lambda name: True)
    module_of.cache_clear()
    yield Imagined()
    module_of.cache_clear()


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ("kprobe/tcp_connect+0x10", ""),
        ("kprobe/tcp_connect+16", ""),
        ("kprobe/asm_only+0x1", ""),
        ("kprobe/veth_xmit", ""),
        ("kretprobe/veth_xmit", ""),
        ("fexit/veth_xmit", ""),
        ("fentry.s/tcp_connect", ""),
        ("kprobe/tcp_connect+zz", "'+zz' is no offset, such as +0x10"),
        ("kprobe/tcp_connect+", "'+' is no offset, such as +0x10"),
        ("kretprobe/tcp_connect+0x10", "only a kprobe can have an offset, and kretprobe/tcp_connect+0x10 is none"),
        ("fentry/tcp_connect+0x10", "only a kprobe can have an offset, and fentry/tcp_connect+0x10 is none"),
        ("fentry/asm_only", "the kernel's BTF has no function asm_only, which fentry needs; take kprobe"),
        ("kprobe/nothing", "the kernel has no function nothing"),
        ("kprobe/tcp_hashinfo", "the kernel has no function tcp_hashinfo"),  # data
    ],
)
def test_what_can_be_hooked(kernel: UsersKernel, section: str, why: str) -> None:
    answer = kernel.can(Program("it", section))
    assert (bool(answer), answer.why) == (not why, why)


def test_a_module_without_btf_or_privilege(
    kernel: UsersKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fexit = Program("it", "fexit/veth_xmit")
    monkeypatch.setattr(hooks, "has_capability", lambda name: False)
    assert kernel.can(fexit).why == "veth_xmit is a function of the module veth: fexit needs CAP_SYS_ADMIN there"
    assert kernel.can(Program("it", "kprobe/veth_xmit"))
    (tmp_path / "veth").unlink()
    assert kernel.can(fexit).why == "veth_xmit is a function of the module veth, which has no BTF; take kprobe"


def hooking(folder: Path, section: str) -> Path:
    return written(folder, "it", SOURCE.replace("HOOK", section))


@pytest.mark.root
@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("kretprobe/tcp_connect+0x4", "only a kprobe can have an offset"),
        ("kprobe/tcp_connect+x", "'+x' is no offset, such as +0x10"),
        ("kprobe/tcp_conect+0x10", "the kernel has no function tcp_conect; did you mean 'tcp_connect'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, section: str, says: str) -> None:
    (line,) = tcpscope("run", hooking(tmp_path, section), status=3).stderr.splitlines()
    assert line.startswith("tcpscope: it: program 'hooked' cannot be attached: ")
    assert says in line


@pytest.mark.kernel
def test_an_instruction_within_a_function(lab, run_tool: type[RunningTool], tmp_path: Path) -> None:
    if not UsersKernel().kprobe:
        pytest.skip("this kernel has no kprobes")
    tried = []
    for offset in (4, 5, 9):  # behind the call of ftrace, or behind endbr64 before it
        done = tcpscope_or_refusal(hooking(tmp_path, f"kprobe/tcp_v4_connect+{offset:#x}"))
        tried.append(done)
        if not done:
            break
        assert "an offset must be where an instruction begins" in done
    else:
        pytest.fail(f"none is taken: {tried}")
    with run_tool("run", str(tmp_path / "it.bpf.c"), "--pid", str(os.getpid())) as tool:
        made = lab.client.socket(socket.AF_INET)
        assert made.connect_ex((lab.server.ipv4, 9))
        tool.wait_for(lambda rows: len(rows) == 1)


def tcpscope_or_refusal(source: Path) -> str:
    """What the kernel refuses; empty: nothing."""
    argv = [sys.executable, "-m", "tcpscope", "run", str(source), "--explain"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120).stderr


@pytest.mark.kernel
@pytest.mark.parametrize("section", ["kprobe/veth_xmit", "fentry/veth_xmit"])
def test_a_function_of_a_module(lab, run_tool: type[RunningTool], tmp_path: Path, section: str) -> None:
    kernel = UsersKernel()
    if not kernel.kprobe or not module_of("veth_xmit"):
        pytest.skip("this kernel has no kprobes, or no module veth")
    if section.startswith("fentry") and not (hooks.BTF.parent / "veth").exists():
        pytest.skip("this kernel has no BTF of modules")  # 5.11
    with run_tool("run", str(hooking(tmp_path, section))) as tool:
        made = lab.client.socket(socket.AF_INET)
        assert made.connect_ex((lab.server.ipv4, 9))
        tool.wait_for(len)
    assert tool.done and "Traceback" not in tool.done.stderr
