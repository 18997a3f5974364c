"""`queue --events`: which listener has refused a SYN, where its address does not tell."""

from __future__ import annotations

import socket
import subprocess

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import DEVICE, Lab
from tests.conftest import CompletedRun, RunningTool
from tests.lacks import functions_cannot_be_hooked, refusals_cannot_be_seen
from tests.tools.queue.test_mixed import cookie_of

ELSEWHERE = "203.0.113.9"
PORT, OTHER_PORT = 8000, 8001
IP_TRANSPARENT = 19
TPROXY = f"""
ip rule add fwmark 1 lookup 100
ip route add local default dev lo table 100
nft 'add table ip t
add chain ip t c {{ type filter hook prerouting priority mangle; }}
add rule ip t c ip daddr {ELSEWHERE} tcp dport {PORT} tproxy to :{OTHER_PORT} meta mark set 1'
"""


def listening(lab: Lab, address: str, port: int, backlog: int, device: str = "", **transparent: bool) -> socket.socket:
    made = lab.server.socket(socket.AF_INET)
    if device:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    if transparent:
        made.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    made.bind((address, port))
    made.listen(backlog)
    return made


def refused(lab: Lab, run_tool: type[RunningTool], address: str) -> tuple[int, CompletedRun]:
    """Three clients of a listener with room for one: how many SYNs the kernel has refused, and the tool's run."""
    with run_tool("queue", "--events", "--netns", str(lab.server.inode)) as tool:
        before = lab.server.counters()["TcpExtListenOverflows"]
        for _ in range(3):
            client = lab.client.socket(socket.AF_INET)
            client.setblocking(False)
            client.connect_ex((address, PORT))
            lab.flush(), lab.flush()
        number = lab.server.counters()["TcpExtListenOverflows"] - before
        assert number >= 2
        return number, tool.stop()


@pytest.mark.kernel
def test_a_listener_of_another_device(lab: Lab, run_tool: type[RunningTool]) -> None:
    """It has the destination of the SYN, but not its device: the listener of all addresses gets the SYN."""
    if refusals_cannot_be_seen():
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")
    lab.server.sysctl("tcp_syncookies", 0)
    listening(lab, lab.server.ipv4, PORT, 4000, "lo")
    chosen = listening(lab, "0.0.0.0", PORT, 0, DEVICE)
    _, done = refused(lab, run_tool, lab.server.ipv4)
    if Kernel().enumerator("BPF_FUNC_check_mtu") is not None:  # before 5.12 a program cannot ask for it
        assert {row["cookie"] for row in done.rows} == {cookie_of(chosen)}
    assert {row["laddr"] for row in done.rows} == {"0.0.0.0"}
    assert done.stats is not None
    assert done.stats["missed"] == 0


def test_a_listener_that_tproxy_has_chosen(lab: Lab, run_tool: type[RunningTool]) -> None:
    """By tracepoints alone it is not known. The listener of the SYN's port, which has room, has not refused it."""
    if refusals_cannot_be_seen():
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")
    lab.server.sysctl("tcp_syncookies", 0)
    lab.client.run(subprocess.run, ["ip", "route", "add", ELSEWHERE, "via", lab.server.ipv4], check=True)
    lab.server.run(subprocess.run, TPROXY, shell=True, check=True)
    listening(lab, "0.0.0.0", PORT, 4000)
    chosen = listening(lab, "0.0.0.0", OTHER_PORT, 0, transparent=True)
    number, done = refused(lab, run_tool, ELSEWHERE)
    assert done.stats is not None
    if functions_cannot_be_hooked():
        assert (done.rows, done.stats["missed"]) == ([], number)
    else:
        assert [row["cookie"] for row in done.rows] == [cookie_of(chosen)] * number
