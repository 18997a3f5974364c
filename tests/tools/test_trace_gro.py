"""`trace` where a veth has GRO: no packet disappears, whatever GRO merges, and the devices have counted the same."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import subprocess
import threading
from collections import defaultdict
from typing import Any

import pytest

from tcpscope.filters import Filter, PortRange
from tcpscope.lab.hosts import Host, Lab
from tcpscope.session import Session
from tests.conftest import CompletedRun
from tests.tools.test_trace import ATTEMPTS, PORT, VETH, covered, transfer
from tests.tools.test_trace_way import PORT as WAY_PORT
from tests.tools.test_trace_way import SERVER as WAY_SERVER
from tests.tools.test_trace_way import Way, talk, way

__all__ = ["way"]

pytestmark = pytest.mark.root

BYTES, PART = 1_000_000, 20_000
SIOCETHTOOL, ETHTOOL_STSO, ETHTOOL_SGRO = 0x8946, 0x1F, 0x2C
NAMES = {"GRO", "MERGED", "RECEIVE"}
Rows = list[dict[str, Any]]


def offload(device: str, command: int, on: bool) -> None:
    """What `ethtool -K` does, in the namespace of the calling thread."""
    value = array.array("I", [command, on])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP8x", device.encode(), value.buffer_info()[0]))


def with_gro(sender: Any, device: str, receiver: Any, peer: str) -> None:
    """A veth gives to GRO what comes from a peer that cuts all packets itself (without TSO)."""
    sender.run(offload, device, ETHTOOL_STSO, False)
    receiver.run(offload, peer, ETHTOOL_SGRO, True)


def hops_of(rows: Rows, host: Host) -> dict[str, Rows]:
    """The rows of what a host receives, by hop."""
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        if row["netns"] == host.inode and row["direction"] == "RECEIVED":
            found[row["hop"]].append(row)
    return found


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def test_each_packet_is_merged_or_goes_on(lab: Lab, run_tool: Any, family: int) -> None:
    """The kernel cuts what the client sends into segments. As many as the device counts come to GRO."""
    with_gro(lab.client, VETH, lab.server, VETH)
    for _ in range(ATTEMPTS):
        done, counted = transfer(lab, run_tool, BYTES, family)
        assert (done.stats["lost"], done.stats["table_full"]) == (0, 0)
        into = hops_of(done.rows, lab.server)
        begin = next(row["seq"] for row in done.rows if row["flags"] == "SYN") + 1
        data = {name: [row for row in into[name] if row["data_bytes"]] for name in ("GRO", "RECEIVE", "TCP", "READ")}
        whole = {name: covered(rows, begin) for name, rows in data.items()}
        if not done.stats["missed"] and len(into["GRO"]) == counted[lab.server.inode, "RECEIVE"]:
            break
    assert done.stats["missed"] == 0
    assert len(into["GRO"]) == counted[lab.server.inode, "RECEIVE"]
    assert len(into["MERGED"]) + len(into["RECEIVE"]) == len(into["GRO"])
    assert len(into["MERGED"]) > BYTES / 1448 / 2
    assert sum(row["data_bytes"] for row in into["RECEIVE"]) == sum(row["data_bytes"] for row in into["GRO"])
    assert whole == dict.fromkeys(whole, BYTES)
    assert {row["before"] for row in (*into["MERGED"], *into["RECEIVE"])} == {"GRO"}
    assert {row["before"] for row in into["GRO"]} <= {"START_XMIT", "XMIT"}
    assert {row["device"] for name in NAMES for row in into[name]} == {VETH}
    assert all(row["since_us"] is not None for name in NAMES for row in into[name])
    assert not NAMES - {"RECEIVE"} & hops_of(done.rows, lab.client).keys()  # its own device has no GRO


def shape(lab: Lab, *words: str) -> None:
    command = ["tc", "qdisc", *words]
    done = lab.client.run(subprocess.run, command, capture_output=True, text=True, check=False)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr


def together(lab: Lab, run_tool: Any) -> CompletedRun:
    """Packets of a number each wait in the client's queue discipline, and leave it at once."""
    with (
        lab.server.socket(socket.AF_INET) as listener,
        lab.client.socket(socket.AF_INET) as near,
        run_tool("trace", "--port", f"{PORT}", "--netns", f"{lab.client.inode},{lab.server.inode}") as tool,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((lab.server.ipv4, PORT))
        listener.listen()
        near.connect(listener.getsockname())
        with listener.accept()[0] as far:
            near.sendall(bytes(PART))  # the window grows
            far.recv(PART, socket.MSG_WAITALL)
            shape(lab, "replace", "dev", VETH, "root", "tbf", "rate", "1kbit", "burst", "1600", "latency", "1000s")
            near.sendall(bytes(PART))
            shape(lab, "change", "dev", VETH, "root", "tbf", "rate", "1gbit", "burst", "100000", "latency", "1000s")
            near.sendall(bytes(PART))  # it lets the queue discipline run
            far.recv(2 * PART, socket.MSG_WAITALL)
        shape(lab, "del", "dev", VETH, "root")
    assert tool.done
    return tool.done


def test_the_packet_that_holds_others_goes_on(lab: Lab, run_tool: Any) -> None:
    """It keeps its number. Each of the others ends at MERGED."""
    with_gro(lab.client, VETH, lab.server, VETH)
    lab.client.one_segment_at_a_time()
    for _ in range(ATTEMPTS):
        done = together(lab, run_tool)
        rows = [row for row in done.rows if row["netns"] == lab.server.inode and row["direction"] == "RECEIVED"]
        ways: dict[int, list[str]] = defaultdict(list)
        for row in rows:
            ways[row["packet"]].append(row["hop"])
        merged = {number for number, hops in ways.items() if "MERGED" in hops}
        if not done.stats["missed"] and merged:
            break
    assert done.stats["missed"] == 0
    assert merged
    own = {row["packet"]: row for row in rows if row["hop"] == "GRO"}
    assert own.keys() == ways.keys()
    for number, hops in ways.items():
        assert hops == ["GRO", "MERGED"] if number in merged else hops[:2] == ["GRO", "RECEIVE"], hops
    for row in rows:
        if row["hop"] != "RECEIVE" or not row["data_bytes"]:
            continue
        inside = {
            number: one
            for number, one in own.items()
            if one["data_bytes"] and (one["seq"] - row["seq"]) % (1 << 32) < row["data_bytes"]
        }
        assert sum(one["data_bytes"] for one in inside.values()) == row["data_bytes"]
        assert inside.keys() - merged == {row["packet"]}


def test_what_is_merged_is_followed_no_more(lab: Lab) -> None:
    """So it takes no place from another packet, and nothing is missed."""
    with_gro(lab.client, VETH, lab.server, VETH)
    chosen = Filter(port=(PortRange(PORT, PORT),), netns=(lab.client.inode, lab.server.inode))
    for _ in range(ATTEMPTS):
        with (
            Session("trace", "trace", chosen, entries={"packets": 256, "tickets": 256}) as session,
            lab.server.socket(socket.AF_INET) as listener,
            lab.client.socket(socket.AF_INET) as near,
        ):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)  # so much is on its way at most
            listener.bind((lab.server.ipv4, PORT))
            listener.listen()
            near.connect(listener.getsockname())
            with listener.accept()[0] as far:
                sender = threading.Thread(target=near.sendall, args=(bytes(BYTES),))
                sender.start()
                far.recv(BYTES, socket.MSG_WAITALL)
                sender.join()
            session.end()
            missed = session.account().missed
            assert session.layout is not None
            rows = [row for batch in session.batches() for row in session.layout.decoder().rows(batch)]
        if not missed:
            break
    assert sum(row.hop == "MERGED" for row in rows) > 256
    assert missed == 0


def test_gro_of_a_router(way: Way, run_tool: Any) -> None:
    """A router's GRO merges packets into one. The router forwards that one, under its number."""
    way.routed()
    with_gro(way.client, "c", way.middle, "to_c")
    cpus = (1 << os.cpu_count()) - 1  # type: ignore[operator]
    way.run(way.client, f"echo {cpus:x} > /sys/class/net/c/queues/tx-0/xps_cpus")  # only this queue has its NAPI there
    for _ in range(ATTEMPTS):
        with run_tool("trace", *way.only(), "--port", f"{WAY_PORT}", "--buffer", "64M") as tool:
            talk(way, WAY_SERVER, WAY_PORT, sizes=(20_000, 60_000))
        seen = [row for row in tool.done.rows if row["netns"] == way.middle.inode and row["device"] == "to_c"]
        merged = sum(row["hop"] == "MERGED" for row in seen)
        if not tool.done.stats["missed"] and merged:
            break
    assert tool.done.stats["missed"] == 0
    assert merged
    given = [row for row in seen if row["hop"] == "GRO"]
    received = [row for row in seen if row["hop"] == "RECEIVE"]
    assert len(given) == len(received) + merged
    arrived = {(row["packet"], row["seq"]): row for row in tool.done.rows if row["netns"] == way.server.inode}
    for row in received:
        assert arrived[row["packet"], row["seq"]]["data_bytes"] == row["data_bytes"]
