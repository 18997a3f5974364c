"""The clock of the kernel's programs, from a time namespace that is a day ahead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from tcpscope.kernel import clock
from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool
from tests.puppets import Puppet

DAY = 86_400
A_DAY_AHEAD = ("unshare", "--time", "--monotonic", str(DAY), "--fork")
PRINT = "import time; from tcpscope.kernel import clock; print(clock.monotonic_ns(), time.monotonic_ns())"


def test_here() -> None:
    before = time.monotonic_ns() - clock.offset_ns()
    assert before <= clock.monotonic_ns() <= time.monotonic_ns() - clock.offset_ns()


@pytest.mark.root
def test_in_a_time_namespace() -> None:
    before = clock.monotonic_ns()
    command = [*A_DAY_AHEAD, sys.executable, "-c", PRINT]
    there, shifted = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert before < there < clock.monotonic_ns()
    assert abs(shifted - there - DAY * 10**9) < 60 * 10**9


def test_without_time_namespaces(tmp_path: Path) -> None:
    assert clock.offset_ns(tmp_path) == 0
    (tmp_path / "ns").mkdir()
    (tmp_path / "ns/time").symlink_to("time:[4026531834]")
    (tmp_path / "timens_offsets").write_text("monotonic 5 6\nboottime 7 8\n")  # of its children
    assert clock.offset_ns(tmp_path) == 0
    (tmp_path / "ns/time").unlink()
    (tmp_path / "ns/time").symlink_to("time:[4026532000]")
    assert clock.offset_ns(tmp_path) == 5_000_000_006
    (tmp_path / "timens_offsets").write_text("monotonic          -5         7\nboottime            0         0\n")
    assert clock.offset_ns(tmp_path) == -4_999_999_993


@pytest.mark.kernel
@pytest.mark.every_kernel
@pytest.mark.parametrize("tool", ["states", "top"])
def test_the_rows_of_a_tool_there(lab: Lab, run_tool: type[RunningTool], tool: str) -> None:
    """The time of a row is that of the wall clock. `top` counts all bytes of connections that are newer than itself."""
    puppet = Puppet(lab.server)
    puppet.do("listener = socket.create_server((address, 0))", address=lab.server.ipv4)
    begin = time.time()
    with run_tool(tool, "--netns", str(lab.server.inode), prefix=A_DAY_AHEAD) as running:
        (child,) = map(int, Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split())
        puppet.do("end = socket.create_connection(listener.getsockname()); end.sendall(bytes(5000))")
        rows = running.wait_for(lambda rows: sum(row.get("tx_bytes", 5000) for row in rows) >= 5000, timeout=60)
        end = time.time()
        os.kill(child, signal.SIGINT)
        running.wait()
    for row in rows:
        assert begin - 1 <= datetime.fromisoformat(row["time"]).timestamp() <= end + 1
