"""`tcpscope features` against what the kernel really has."""

import re
import subprocess
import sys

import pytest

from tcpscope import features_cli
from tcpscope.errors import NotPermittedError, UnsupportedError
from tcpscope.kernel import features as asked
from tcpscope.kernel.btf import Btf
from tcpscope.kernel.features import BTF, Kernel
from tcpscope.kernel.spec import Program
from tcpscope.own.hooks import module_of
from tcpscope.tool import names
from tests.lacks import functions_cannot_be_hooked, is_refused


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_every_tool_is_there_and_needs_no_guess(features):
    assert sorted({entry["tool"] for entry in features["tools"]}) == names()
    assert [entry["probe"] for entry in features["tools"] if entry["tool"] == "rtt"] == ["rtt", "owner"]
    kernel = Kernel()
    for entry in features["tools"]:
        assert entry["works"] is not is_refused(entry["probe"], kernel)
        assert (entry["why"] is None) == entry["works"]


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_a_way_is_taken_only_where_the_kernel_has_its_target(features):
    kernel = Btf.parse(BTF.read_bytes())
    for entry in features["tools"]:
        for hook in entry["hooks"]:
            kind, _, target = (hook["way"] or "").partition("/")
            if kind in ("fentry", "fexit", "kprobe", "kretprobe"):
                assert kernel.func_params(target) is not None or module_of(target)


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_what_is_not_attached_says_why_and_what_is_then_not_known(features):
    for entry in features["tools"]:
        for hook in entry["hooks"]:
            if hook["way"] is None:
                assert hook["refused"]
                if hook["hook"] == "queued":  # only newer kernels have it
                    assert not Kernel().has_typedef("btf_trace_qdisc_drop")
                else:
                    assert hook["not_known"] or not entry["works"]


def test_a_module_that_is_not_there_is_told_from_one_without_btf(tmp_path, monkeypatch):
    kernel, program = Kernel(), Program("it", "fentry/no_such_function", module="some_module")
    (tmp_path / "modules").mkdir()
    monkeypatch.setattr(asked, "BTF", tmp_path / "vmlinux")
    monkeypatch.setattr(asked, "_MODULES", tmp_path / "modules")
    monkeypatch.setattr(asked, "has_capability", lambda name: False)
    assert kernel.can(program).why == "the module some_module is not loaded"
    (tmp_path / "modules" / "some_module").mkdir()
    assert kernel.can(program).why == "the module some_module has no BTF"
    (tmp_path / "some_module").touch()
    assert kernel.can(program).why == "some_module is a module, whose functions need CAP_SYS_ADMIN"
    monkeypatch.setattr(asked, "has_capability", lambda name: True)
    assert kernel.can(program) == kernel.fentry


@pytest.mark.parametrize(
    ("error", "works", "said"),
    [
        (UnsupportedError("no hook for 'state'"), False, "does not work here: no hook for 'state'"),
        (
            NotPermittedError("missing CAP_BPF", "run as root"),
            None,
            "cannot tell for sure: missing CAP_BPF; run as root",
        ),
    ],
)
def test_what_does_not_work_is_told_from_what_is_not_known(error, works, said, monkeypatch, capsys):
    def loaded(*_):
        raise error

    monkeypatch.setattr(features_cli, "Loaded", loaded)
    assert {entry["works"] for entry in features_cli.report(Kernel())} == {works}
    features_cli.features.main(["-v"], standalone_mode=False)
    assert f"  {said}\n" in capsys.readouterr().out


def test_text_names_hooks_and_privileges():
    done = subprocess.run(
        [sys.executable, "-m", "tcpscope", "features", "-v"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "queue  (probe listeners, needs CAP_BPF, CAP_PERFMON" in done.stdout
    assert "tp_btf/inet_sock_set_state" in done.stdout


def of(tool, works=True, why=None, **hook):
    hooks = [{"hook": "x", "way": None, "refused": {}, "not_known": None} | hook]
    return {"tool": tool, "works": works, "why": why, "capabilities": ["CAP_BPF"], "hooks": hooks}


def test_a_summary_has_a_line_for_what_is_the_same():
    refused = {"a__fentry": "no fentry here", "a__kprobe": "no kprobes", "c": "no fentry here", "d": "no module"}
    found = [
        of("accept", refused=refused, not_known="the listener"),
        of("life", refused={"b__fexit": "no fentry here"}, not_known="the listener"),
        of("queue", works=False, why="no hook for 'x'"),
        of("list"),
    ]
    assert list(features_cli.summary(found)) == [
        "3 of 4 tools work here. They need CAP_BPF.",
        "queue: does not work here: no hook for 'x'.",
        "Without fentry, fexit: no fentry here.",
        "Without kprobe: no kprobes.",
        "Without d: no module.",
        "Not known in accept, life: the listener.",
    ]
    assert list(features_cli.summary([of("list")])) == ["1 of 1 tools work here. They need CAP_BPF."]


@pytest.mark.kernel
def test_the_text_is_short(features, monkeypatch, capsys):
    monkeypatch.setattr(features_cli, "report", lambda kernel: features["tools"])
    features_cli.features.main([], standalone_mode=False)
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    broken = {entry["tool"] for entry in features["tools"] if entry["why"]}
    assert f"{len(names()) - len(broken)} of {len(names())} tools work here" in lines[1]
    assert max(map(len, lines)) <= 80
    missing = {hook["not_known"] for entry in features["tools"] for hook in entry["hooks"]} - {None}
    joined = " ".join(shown.split())
    assert all(text in joined for text in missing)
    assert missing or len(lines) <= 6  # a way that this kernel does not have takes a line too


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_no_program_is_refused_that_should_load(features):
    """A way is passed over for what the kernel lacks, never because the verifier did not like the program."""
    refused = [
        (entry["probe"], hook["hook"], why)
        for entry in features["tools"]
        for hook in entry["hooks"]
        for why in hook["refused"].values()
        if "refused by the kernel" in why
    ]
    assert refused == []


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_every_hook_is_attached_where_functions_can_be_hooked(features):
    if functions_cannot_be_hooked():
        assert any(hook["way"] is None for entry in features["tools"] for hook in entry["hooks"])
        return
    without = [hook for entry in features["tools"] for hook in entry["hooks"] if hook["way"] is None]
    lacks = {why for hook in without for why in hook["refused"].values()}
    assert all(why.startswith("the kernel has no tracepoint ") or is_without_module(why) for why in lacks), lacks


def is_without_module(why: str) -> bool:
    """Modules have BTF since 5.11. One that was not loaded may be by now."""
    said = re.fullmatch(r"the module (\w+) (has no BTF|is not loaded)", why)
    return bool(said and (said[2] == "is not loaded" or not (BTF.parent / said[1]).exists()))
