"""`queue --events` where the kernel cannot make the child of a handshake: the memory for it is refused."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import Loaded
from tcpscope.lab.hosts import Lab
from tests.compiled import compiled
from tests.conftest import RunningTool
from tests.lacks import functions_cannot_be_hooked

MSG_FASTOPEN = 0x20000000
ENABLED, WITHOUT_COOKIE = 0x602, 0x5  # net.ipv4.tcp_fastopen of a server, of a client
BACKLOG = 5

# sk_prot_alloc() asks this function. Only who makes a child may not wait for memory (sk_clone(), GFP_ATOMIC).
REFUSES = """
#include "kernel.bpf.h"
__u64 children;
SEC("fmod_ret/security_sk_alloc") int refuse(__u64 *ctx)
{
	if (ctx[2] & 0x400 /* __GFP_DIRECT_RECLAIM */ || !children)
		return 0;
	children--;
	return -12;
}
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[memoryview]:
    """How many children are refused from now on."""
    if functions_cannot_be_hooked():
        pytest.skip("this kernel refuses fentry and has no kprobes")
    loaded = Loaded(compiled(tmp_path, "refuses", REFUSES), Kernel())
    try:
        yield loaded.memory("children").cast("Q")
    finally:
        loaded.close()


@pytest.mark.kernel
@pytest.mark.every_kernel
@pytest.mark.parametrize("family", ["4", "6", "mapped"])
def test_fast_open(lab: Lab, run_tool: type[RunningTool], children: memoryview, family: str) -> None:
    """tcp_conn_request() fails to make the child and continues without it. One refusal, at the SYN, and no drop."""
    lab.server.sysctl("tcp_fastopen", ENABLED)
    lab.client.sysctl("tcp_fastopen", WITHOUT_COOKIE)
    kind = socket.AF_INET6 if family == "6" else socket.AF_INET
    listener = lab.server.socket(socket.AF_INET if family == "4" else socket.AF_INET6)
    if family == "mapped":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::" if family == "mapped" else lab.server.address(kind), 8000))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    listener.listen(BACKLOG)
    client = lab.client.socket(kind)
    watched = "--netns", str(lab.server.inode)
    with run_tool("queue", "--events", *watched) as tool, run_tool("drop", *watched) as drops:
        before = lab.server.counters()
        children[0] = 1
        client.sendto(b"early", MSG_FASTOPEN, (lab.server.address(kind), 8000))
        made, peer = listener.accept()
        with made:
            lab.flush()
            rows = tool.wait_for(bool)
            after = lab.server.counters()
            rows, dropped = tool.stop().rows, drops.stop().rows
    names = ("TcpExtListenDrops", "TcpExtTCPFastOpenPassiveFail")
    assert (children[0], [after[name] - before[name] for name in names]) == (0, [1, 1])
    found = [(row["cause"], row["step"], row["answer"], row["rport"]) for row in rows]
    assert found == [("OTHER", "SYN", None, peer[1])]
    assert dropped == []
