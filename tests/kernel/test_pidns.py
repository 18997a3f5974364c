"""The PID namespace of this process, of unshare(1)'s, and in a made-up /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tcpscope.kernel import pidns

PRINT = "from tcpscope.kernel import pidns; print(pidns.inner())"


@pytest.mark.parametrize(
    ("link", "inode"), [("pid:[4026531836]", 0), ("pid:[4026532000]", 4026532000), ("", 0), (None, 0)]
)
def test_the_first_one_and_another(tmp_path: Path, link: str | None, inode: int) -> None:
    if link is not None:
        (tmp_path / "self/ns").mkdir(parents=True)
        (tmp_path / "self/ns/pid").symlink_to(link or ".")
    assert pidns.inner(tmp_path) == inode


@pytest.mark.skipif(os.geteuid() != 0, reason="unshare() of a PID namespace needs root")
def test_a_new_one() -> None:
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", PRINT]
    found = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found not in (0, pidns.FIRST, pidns.inner())
