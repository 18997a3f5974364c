"""`queue --events` and `drop` under load, with two processors: 2,000 handshakes, of both steps, with four listeners."""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
from collections import Counter

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Lab, held
from tests.conftest import RunningTool, until
from tests.lacks import refusals_cannot_be_seen

HANDSHAKES = 500  # of each listener
BACKLOG = 50
FIRST = BACKLOG - 5  # of these connect one after the other
AT_ACK = 50  # and then so many are at their last step when the queue becomes full
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a RST
CAUSES = {
    "ACCEPT_QUEUE_FULL": "TcpExtListenOverflows",
    "SYN_QUEUE_FULL": "TcpExtTCPReqQFullDrop",
    "COOKIE_SENT": "TcpExtSyncookiesSent",
}


def listening(lab: Lab, address: str, port: int, backlog: int, *, shared: bool = False) -> socket.socket:
    made = lab.server.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if ":" in address:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    made.listen(backlog)
    return made


def connects(lab: Lab, address: str, port: int, number: int) -> list[socket.socket]:
    found = []
    for _ in range(number):
        made = lab.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        made.setblocking(False)
        made.connect_ex((address, port))
        found.append(made)
    return found


def dropped(lab: Lab, port: int) -> list[int]:
    """The sk_drops of the listeners of a port, as ss says."""
    lines = lab.server.run(subprocess.check_output, ["ss", "-tlmnH", f"sport = :{port}"], text=True)
    return sorted(int(number) for number in re.findall(r",d(\d+)\)", lines))


def drops_of(lab: Lab) -> tuple[int, dict[int, list[int]]] | None:
    """ListenDrops, and the drops of each listener; None if there was a refusal meanwhile."""
    before = lab.server.counters()["TcpExtListenDrops"]
    found = {port: dropped(lab, port) for port in (8000, 8001, 8002)}
    return (before, found) if lab.server.counters()["TcpExtListenDrops"] == before else None


def cookie_of(made: socket.socket) -> int:
    SO_COOKIE = 57
    return int.from_bytes(made.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


@pytest.mark.kernel
@pytest.mark.concurrent
@pytest.mark.parametrize("syncookies", [0, 1, 2])
def test_each_refusal_of_each_listener(lab: Lab, run_tool: type[RunningTool], syncookies: int) -> None:
    if refusals_cannot_be_seen():
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")
    lab.server.sysctl("tcp_syncookies", syncookies)
    lab.server.sysctl("somaxconn", 4096)
    lab.server.sysctl("tcp_max_syn_backlog", 8192)
    lab.server.sysctl("tcp_synack_retries", 0)
    v4, v6 = lab.server.ipv4, lab.server.address(6)
    listeners = {
        "four": listening(lab, v4, 8000, BACKLOG),
        "both": listening(lab, "::", 8001, BACKLOG),
        "full": listening(lab, v4, 8002, 0, shared=True),
        "roomy": listening(lab, v4, 8002, 4096, shared=True),
    }
    cookies = {cookie_of(made): name for name, made in listeners.items()}
    watched = "--netns", str(lab.server.inode)
    with run_tool("queue", "--events", *watched) as tool, run_tool("drop", *watched) as drops:
        before = lab.server.counters()
        clients = []
        for address, port in ((v4, 8000), (v6, 8001)):
            clients += connects(lab, address, port, FIRST)
            lab.flush()
            with held(lab.server):
                clients += connects(lab, address, port, AT_ACK)
            lab.flush()
            clients += connects(lab, address, port, HANDSHAKES - FIRST - AT_ACK)
        for port in (8001, 8002):
            clients += connects(lab, v4, port, HANDSHAKES)
        lab.flush()
        number, of_listeners = until(lambda: drops_of(lab), "drops that stand still")
        for made in clients:
            made.close()
        lab.flush(), lab.flush()  # a RST leaves at once, and nothing is sent after it
        after = lab.server.counters()
        refused = after["TcpExtListenDrops"] - before["TcpExtListenDrops"]
        tool.wait_for(lambda rows: sum(row["cause"] != "COOKIE_SENT" for row in rows) >= refused)
        done, dropped = tool.stop(), drops.stop()
    causes = Counter(row["cause"] for row in done.rows)
    for cause, counter in CAUSES.items():
        assert causes[cause] == after[counter] - before[counter], cause
    assert causes.total() - causes["COOKIE_SENT"] == refused > 2 * HANDSHAKES
    assert done.stats is not None
    assert done.stats["missed"] == 0
    at_ack = Counter(row["lport"] for row in done.rows if row["step"] == "ACK")
    assert at_ack[8000] >= AT_ACK - 6
    assert at_ack[8001] >= AT_ACK - 6
    named = {row["cookie"] for row in done.rows}
    assert named <= {*cookies, None}
    unnamed = [row for row in done.rows if row["cookie"] is None]
    for row in done.rows:
        name = cookies.get(row["cookie"])
        assert row["lport"] == {"four": 8000, "both": 8001}.get(name or "", 8002)
        if row["cause"] != "COOKIE_SENT":
            assert name in ("four", "both", "full"), json.dumps(row)
    # Which of two listeners of an address has sent a cookie, the kernel tells nobody.
    assert {row["cause"] for row in unnamed} <= {"COOKIE_SENT"}
    assert all((row["pid"], row["accept_queue"], row["syn_queue"]) == (None, None, None) for row in unnamed)
    # A refused SYN counts once in sk_drops, the refused ACK of a request twice, that of a cookie once. Nothing else had
    # been thrown away when ss looked.
    refusals = [row for row in done.rows if row["cause"] != "COOKIE_SENT"]
    refusals.sort(key=lambda row: row["time"])
    counted = Counter[int]()
    for row in refusals[: number - before["TcpExtListenDrops"]]:
        counted[row["lport"]] += 1 + (row["step"] == "ACK" and syncookies != 2)
    assert {port: sum(found) for port, found in of_listeners.items()} == counted
    assert of_listeners[8002][0] == 0  # of the roomy one
    assert dropped.stats is not None
    assert dropped.stats["missed"] == 0
    found = [row for row in dropped.rows if row["kind"] == "REFUSED" and row["state"] == "LISTEN"]
    syns = [(row["lport"], row["rport"], row["cookie"]) for row in found if row["flags"] == "SYN"]
    assert sorted(map(str, syns)) == sorted(
        str((row["lport"], row["rport"], row["cookie"])) for row in refusals if row["step"] == "SYN"
    )
    if syncookies != 2 or Kernel().parameters("sk_skb_reason_drop"):  # or the listener of such an ACK is not known
        acks = Counter((row["lport"], row["rport"]) for row in found if row["flags"] != "SYN")
        assert acks == Counter((row["lport"], row["rport"]) for row in refusals if row["step"] == "ACK")
