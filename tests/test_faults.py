"""Every system call of the loader fails once, or from there on. A tool then works in full, or says why it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tcpscope.errors import ResourceError
from tcpscope.kernel import netns
from tcpscope.lab.hosts import Lab
from tcpscope.namespaces import opened
from tests.faults import FOR_EVER, Fault, Outcome, compiled, run

SHORT = (errno.ENOMEM, errno.EMFILE, errno.EAGAIN, errno.EINTR)  # the machine's fault, not the kernel's
ERRORS = (*SHORT, errno.EPERM)
TOOLS = {  # and how many calls lie between two that fail
    "states": (["states", "--uid", "0,1", "-d", "0.05"], 1),
    "rtt": (["rtt", "-d", "0.05"], 3),
    "queue": (["queue", "-d", "0.05"], 3),
    "list": (["list"], 2),
}
UNTRIED = "libbpf could not try out the kernel, for lack of memory or open files; "


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("faults"))


@pytest.mark.root
@pytest.mark.parametrize("until", [1, FOR_EVER], ids=["once", "from-there-on"])
@pytest.mark.parametrize("name", TOOLS)
def test_a_call_that_fails(library: Path, name: str, until: int) -> None:
    words, stride = TOOLS[name]
    (whole,) = run(library, words, [Fault()])
    assert (whole.status, whole.calls > 20) == (0, True)
    faults = [
        Fault(call, call + until, ERRORS[(call + turn) % len(ERRORS)])
        for turn, call in enumerate(range(0, whole.calls, stride))
    ]
    outcomes = _right_outcomes(library, words, faults, whole)
    assert any(outcome.status for outcome in outcomes)


@pytest.mark.root
@pytest.mark.parametrize("name", TOOLS)
def test_a_limit_of_open_files(library: Path, name: str) -> None:
    words, _ = TOOLS[name]
    (whole,) = run(library, words, [Fault()])
    faults = [Fault(error=errno.EMFILE, files=files) for files in range(8, 64, 3)]
    outcomes = _right_outcomes(library, words, faults, whole)
    assert outcomes[0].status == 1
    assert outcomes[-1].status == 0


def test_a_namespace_that_cannot_be_opened_is_not_left_out(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    visible, own = netns.visible(), netns.inode_of("/proc/self/ns/net")
    assert lab.client.inode in visible.namespaces

    def open_(path: object, *_: object) -> int:
        if "self" in str(path):
            return own
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(netns, "inode_of", open_)
    with pytest.raises(ResourceError, match="Too many open files; raise the limit of open files per process"):
        netns.visible()
    monkeypatch.setattr(netns, "visible", lambda: visible)
    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(ResourceError, match="Too many open files; raise the limit of open files per process"):
        list(opened((), []))


def _right_outcomes(library: Path, words: Sequence[str], faults: Sequence[Fault], whole: Outcome) -> list[Outcome]:
    outcomes = run(library, words, faults)
    pairs = zip(faults, outcomes, strict=True)
    assert [(fault, outcome) for fault, outcome in pairs if not _right(fault, outcome, whole)] == []
    return outcomes


def _right(fault: Fault, outcome: Outcome, whole: Outcome) -> bool:
    notes = whole.stderr.splitlines()
    lines = [line for line in outcome.stderr.splitlines() if line not in notes]
    if outcome.status == 0:
        missing = [
            (probe, hook)
            for probe, hooks in whole.hooks.items()
            for hook, attached in hooks.items()
            if attached and not outcome.hooks[probe][hook]
        ]
        named = all(any(f"'{hook}' of '{probe}' is left out" in line for line in lines) for probe, hook in missing)
        return not missing or (fault.error == errno.EPERM and named)
    if len(lines) != 1 or not lines[0].startswith("tcpscope: "):
        return False
    text = os.strerror(fault.error)
    if fault.error == errno.EPERM:
        return outcome.status in (1, 3) and (text in lines[0] or UNTRIED in lines[0])
    return outcome.status == 1 and (f"{text}; " in lines[0] or f"{text}: " in lines[0] or UNTRIED in lines[0])
