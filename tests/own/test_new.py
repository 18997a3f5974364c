"""The program that `tcpscope new` writes shows what happens."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.own.programs import tcpscope

pytestmark = [pytest.mark.kernel, pytest.mark.root]


@pytest.mark.every_kernel
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
