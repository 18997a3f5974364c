"""`tcpscope features` against what the kernel really has."""

import json
import subprocess
import sys

import pytest

from tcpscope import features_cli
from tcpscope.errors import NotPermittedError, UnsupportedError
from tcpscope.kernel.btf import Btf
from tcpscope.kernel.features import BTF, Kernel
from tcpscope.tool import names
from tests.lacks import functions_cannot_be_hooked


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tcpscope", "features", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_every_tool_is_there_and_needs_no_guess(report):
    assert sorted({entry["tool"] for entry in report["tools"]}) == names()
    assert [entry["probe"] for entry in report["tools"] if entry["tool"] == "rtt"] == ["rtt", "owner"]
    assert all(entry["works"] is True and entry["why"] is None for entry in report["tools"])


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_a_way_is_taken_only_where_the_kernel_has_its_target(report):
    kernel = Btf.parse(BTF.read_bytes())
    for entry in report["tools"]:
        for hook in entry["hooks"]:
            kind, _, target = (hook["way"] or "").partition("/")
            if kind in ("fentry", "fexit", "kprobe", "kretprobe"):
                assert kernel.func_params(target) is not None


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_what_is_not_attached_says_why_and_what_is_then_not_known(report):
    for entry in report["tools"]:
        for hook in entry["hooks"]:
            if hook["way"] is None:
                assert hook["refused"]
                assert hook["not_known"]


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
    features_cli.features.main([], standalone_mode=False)
    assert f"  {said}\n" in capsys.readouterr().out


def test_text_names_hooks_and_privileges():
    done = subprocess.run(
        [sys.executable, "-m", "tcpscope", "features"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "queue  (probe listeners, needs CAP_BPF, CAP_PERFMON" in done.stdout
    assert "tp_btf/inet_sock_set_state" in done.stdout


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_no_program_is_refused_that_should_load(report):
    """A way is passed over for what the kernel lacks, never because the verifier did not like the program."""
    refused = [
        (entry["probe"], hook["hook"], why)
        for entry in report["tools"]
        for hook in entry["hooks"]
        for why in hook["refused"].values()
        if "refused by the kernel" in why
    ]
    assert refused == []


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_every_hook_is_attached_where_functions_can_be_hooked(report):
    if functions_cannot_be_hooked():
        assert any(hook["way"] is None for entry in report["tools"] for hook in entry["hooks"])
        return
    assert all(hook["way"] for entry in report["tools"] for hook in entry["hooks"])
