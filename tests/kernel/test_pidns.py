"""The PID namespace of this process, of unshare(1)'s, and in a made-up /proc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tcpscope.kernel import pidns

PRINT = "from tcpscope.kernel import pidns; print(pidns.inner())"
OURS = "from tcpscope.kernel import pidns; print(pidns.proc_is_ours())"
NETNS = """
from tcpscope import filters, errors
try:
    print(filters.parse_netns("pid:1"))
except errors.UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("link", "inode"), [("pid:[4026531836]", 0), ("pid:[4026532000]", 4026532000), ("", 0), (None, 0)]
)
def test_the_first_one_and_another(tmp_path: Path, link: str | None, inode: int) -> None:
    if link is not None:
        (tmp_path / "self/ns").mkdir(parents=True)
        (tmp_path / "self/ns/pid").symlink_to(link or ".")
    assert pidns.inner(tmp_path) == inode


def in_a_new_one(code: str, *options: str) -> str:
    command = ["unshare", "--pid", "--fork", *options, sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.root
def test_a_new_one() -> None:
    assert int(in_a_new_one(PRINT)) not in (0, pidns.FIRST, pidns.inner())


@pytest.mark.root
def test_proc_of_another_namespace() -> None:
    """Process 1 of the new namespace has another number there, and the number 1 is another process's."""
    assert pidns.proc_is_ours()
    assert "True" in in_a_new_one(OURS, "--mount-proc")
    assert "False" in in_a_new_one(OURS)
    found = in_a_new_one(NETNS)
    assert found.startswith("'pid:1': /proc is not that of this PID namespace")
    assert int(in_a_new_one(NETNS, "--mount-proc", "--net")) != Path("/proc/self/ns/net").stat().st_ino
