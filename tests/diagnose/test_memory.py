"""All TCP sockets of a machine share net.ipv4.tcp_mem: `memory_pressure`, in a guest, where nobody else has any."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool
from tests.puppets import Puppet

pytestmark = [pytest.mark.kernel, pytest.mark.alone]

TCP_MEM = Path("/proc/sys/net/ipv4/tcp_mem")
PAGE = os.sysconf("SC_PAGE_SIZE")
PRESSURE = 256  # pages
BUFFER = 16 << 20
SIZE = 4 << 20
ENTERED, ABORTED = "TcpExtTCPMemoryPressures", "TcpExtTCPAbortOnMemory"

SERVE = f"""
listener = socket.create_server((address, 0), backlog=1)
listener.setsockopt(socket.SOL_SOCKET, 33, {BUFFER})  # SO_RCVBUFFORCE
port = listener.getsockname()[1]
"""
CONNECT = f"""
made = socket.socket()
made.setsockopt(socket.SOL_SOCKET, 32, {BUFFER})  # SO_SNDBUFFORCE
made.connect((address, port))
made.setblocking(False)
"""
SEND = f"""
sent = 0
try:
    while sent < {SIZE}:
        sent += made.send(bytes({SIZE} - sent))
except BlockingIOError:
    pass
"""


@contextmanager
def limited(low: int, pressure: int, most: int) -> Iterator[None]:
    before = TCP_MEM.read_text()
    TCP_MEM.write_text(f"{low} {pressure} {most}")
    try:
        yield
    finally:
        TCP_MEM.write_text(before)


def grown(lab: Lab, before: dict[str, int], name: str) -> int:
    return lab.client.counters()[name] + lab.server.counters()[name] - before[name]


def of_memory(rows: list[dict[str, Any]], severity: str) -> list[dict[str, Any]]:
    found = [each for row in rows for what, each in row.items() if what in ("began", "worse")]
    return [each for each in found if (each["rule"], each["severity"]) == ("memory_pressure", severity)]


def test_it_is_found(lab: Lab, run_tool: type[RunningTool]) -> None:
    server, client = Puppet(lab.server, "hoarder"), Puppet(lab.client, "sender")
    before = {name: lab.client.counters()[name] + lab.server.counters()[name] for name in (ENTERED, ABORTED)}
    server.do(SERVE, address=lab.server.ipv4)
    client.do(CONNECT, address=lab.server.ipv4, port=server.ask("port"))
    server.do("accepted = listener.accept()[0]")
    with run_tool("diagnose", "-d", "600") as tool, limited(PRESSURE // 2, PRESSURE, 1 << 20):
        client.do(SEND)
        tool.wait_for(lambda rows: of_memory(rows, "warning"))
        assert grown(lab, before, ENTERED) >= 1
        # Of what is more than the limit a socket that closes with unsent data is aborted: tcp_check_oom().
        lab.client.lose()
        client.do(SEND)
        TCP_MEM.write_text("8 16 32")
        client.do("made.close()")
        tool.wait_for(lambda rows: of_memory(rows, "critical"))
        tool.stop()  # its last look is to see this, too
    assert tool.done
    (finding,) = (each for each in tool.done.rows[-1]["summary"]["findings"] if each["rule"] == "memory_pressure")
    facts = finding["facts"]
    assert (facts["count"], facts["pressures"]) == (grown(lab, before, ABORTED), grown(lab, before, ENTERED))
    assert facts["count"] == 1
    assert facts["tcp_mem"] == [8, 16, 32]
    assert facts["pages"] * PAGE >= SIZE // 2
    (first, *_) = of_memory(tool.done.rows, "warning")
    assert first["facts"]["tcp_mem"] == [PRESSURE // 2, PRESSURE, 1 << 20]
    assert first["facts"]["holders"][0]["pid"] == server.pid
    assert first["facts"]["holders"][0]["bytes"] >= SIZE // 2
    _, remedy = first["remedies"]
    assert remedy["command"] == f"sysctl -w net.ipv4.tcp_mem='{PRESSURE} {2 * PRESSURE} {2 << 20}'"
    with limited(1, 1, 1):
        subprocess.run(shlex.split(remedy["command"]), check=True, capture_output=True)
        assert TCP_MEM.read_text().split() == [str(PRESSURE), str(2 * PRESSURE), str(2 << 20)]
