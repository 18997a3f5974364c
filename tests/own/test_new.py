"""The program that `tcpscope new` writes shows what happens."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.own.programs import tcpscope

pytestmark = pytest.mark.root


@pytest.mark.kernel
def test_it_runs(lab, run_tool, tmp_path: Path) -> None:
    tcpscope("new", "first", status=0, cwd=tmp_path)
    with (
        lab.server.run(socket.create_server, (lab.server.ipv4, 0)) as listener,
        run_tool("run", str(tmp_path / "first.bpf.c"), "--netns", str(lab.client.inode)) as tool,
    ):
        port = listener.getsockname()[1]
        with lab.client.run(socket.create_connection, (lab.server.ipv4, port)):
            pass
        rows = tool.wait_for(lambda rows: any(row["new_state"] == "ESTABLISHED" for row in rows))
    (opened,) = [row for row in rows if row["new_state"] == "ESTABLISHED"]
    assert (opened["old_state"], opened["rport"], opened["pid"]) == ("SYN_SENT", port, os.getpid())
    assert opened["srtt_us"] > 0
    account = tool.done.stats
    assert account["seen"] == account["shown"] + account["filtered"] + account["lost"]


def test_what_finds_no_room_is_counted(lab, run_tool, tmp_path: Path) -> None:
    tcpscope("new", "first", status=0, cwd=tmp_path)
    words = ("run", str(tmp_path / "first.bpf.c"), "--netns", str(lab.client.inode), "--buffer", "4K")
    with lab.server.run(socket.create_server, (lab.server.ipv4, 0)) as listener, run_tool(*words) as tool:
        tool.process.send_signal(signal.SIGSTOP)
        for _ in range(30):
            with lab.client.run(socket.create_connection, listener.getsockname()):
                listener.accept()[0].close()
        tool.process.send_signal(signal.SIGCONT)
        tool.wait_for(len)
    account = tool.done.stats
    assert account["lost"] > 0
    assert account["shown"] == len(tool.done.rows)
    assert account["seen"] == account["shown"] + account["filtered"] + account["lost"]
    assert f"lost {account['lost']}" in tool.done.stderr
