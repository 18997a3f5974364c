"""`queue --events`: what the kernel counts as ListenDrops, and what is no refusal."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tcpscope.filters import Filter
from tcpscope.kernel.machine import possible_cpus
from tcpscope.lab.hosts import DEVICE, Lab
from tcpscope.lab.packets import checksum, raw_socket, syn
from tcpscope.listeners import by_tracepoints, open_session
from tcpscope.schema import Field, Layout
from tests.conftest import RunningTool, until
from tests.lacks import refusals_cannot_be_seen

NOBODY = "198.51.100.7"
NOBODY_V6 = "2001:db8:51::7"
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
UNREACHABLE = struct.pack("!BB", 3, 1)  # ICMP: the host
UNREACHABLE_V6 = struct.pack("!BB", 1, 4)  # ICMPv6: the port
IPPROTO_DSTOPTS = 60
OPTIONS = struct.pack("!BB6B", socket.IPPROTO_ICMPV6, 0, 1, 4, 0, 0, 0, 0)  # a destination header: PadN
PORT = 8000


@pytest.fixture
def one_processor() -> Iterator[None]:
    """All packets of the test are handled by the processor that sends them: what it counts is seen by its next look."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def drops(lab: Lab) -> int:
    return lab.server.counters()["TcpExtListenDrops"]


def send_to_server(lab: Lab, packet: bytes) -> None:
    """From the client, as it is: a packet socket computes nothing."""
    protocol = ETH_P_IPV6 if packet[0] >> 4 == 6 else ETH_P_IP
    with lab.client.run(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(protocol)) as raw:
        raw.sendto(packet, (DEVICE, protocol, 0, 0, bytes.fromhex(lab.server.mac.replace(":", ""))))


def answer_to(lab: Lab, source: str) -> bytes:
    """The SYN-ACK that the server sends to `source`, from its IP header on."""
    family, protocol, header = (socket.AF_INET6, ETH_P_IPV6, 40) if ":" in source else (socket.AF_INET, ETH_P_IP, 20)
    address, target = socket.inet_pton(family, source), lab.server.address(family)
    with lab.client.run(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(protocol)) as taps:
        with lab.client.run(raw_socket, family) as raw:
            raw.sendto(syn(source, 10_000, target, PORT, 1), (target, 0))
        while True:
            packet: bytes = taps.recv(2048)
            to = packet[header - len(address) : header]
            if to == address and packet[header + 13 : header + 14] == b"\x12":  # to it, with SYN and ACK
                return packet


def icmp_error(lab: Lab, packet: bytes, options: bytes) -> bytes:
    """What the client's side answers if it cannot deliver this packet of the server, from its IP header on."""
    if packet[0] >> 4 == 4:
        body = UNREACHABLE + b"\0\0" + bytes(4) + packet[:28]
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        addresses = b"".join(socket.inet_aton(host.ipv4) for host in lab.hosts)
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, socket.IPPROTO_ICMP, 0) + addresses
        return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body
    addresses = b"".join(socket.inet_pton(socket.AF_INET6, host.ipv6) for host in lab.hosts)
    body = UNREACHABLE_V6 + b"\0\0" + bytes(4) + packet[:60]
    pseudo = addresses + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    body = options + body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    first = IPPROTO_DSTOPTS if options else socket.IPPROTO_ICMPV6
    return struct.pack("!IHBB", 6 << 28, len(body), first, 64) + addresses + body


def connects_unrefused(lab: Lab, family: socket.AddressFamily) -> None:
    """The next client is connected. What it sends is handled before this returns."""
    with lab.client.socket(family) as client:
        client.connect((lab.server.address(family), PORT))
        lab.flush()


@pytest.mark.kernel
@pytest.mark.usefixtures("one_processor")
@pytest.mark.parametrize(
    ("family", "source", "prefix", "options"),
    [
        (socket.AF_INET, NOBODY, "198.51.100.0/24", b""),
        (socket.AF_INET6, NOBODY_V6, "2001:db8:51::/64", b""),
        (socket.AF_INET6, NOBODY_V6, "2001:db8:51::/64", OPTIONS),
    ],
    ids=["IPv4", "IPv6", "IPv6, behind an extension header"],
)
def test_an_error_that_ends_a_request(
    lab: Lab, run_tool: type[RunningTool], family: socket.AddressFamily, source: str, prefix: str, options: bytes
) -> None:
    """tcp_req_err() counts it in ListenDrops. The next SYN on that processor is not refused."""
    if refusals_cannot_be_seen():
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")
    lab.server.sysctl("tcp_syncookies", 0)
    lab.client.blackhole(prefix)
    listener = lab.server.socket(family)
    listener.bind((lab.server.address(family), PORT))
    listener.listen(5)
    with run_tool("queue", "--events", "--netns", str(lab.server.inode)) as tool:
        before = drops(lab)
        send_to_server(lab, icmp_error(lab, answer_to(lab, source), options))
        until(lambda: drops(lab) == before + 1, "the end of the request")
        connects_unrefused(lab, family)
        done = tool.stop()
    assert done.rows == []
    assert done.stats is not None
    assert done.stats["missed"] == 0
    listener.close()


@pytest.mark.kernel
def test_an_icmp_error_for_a_namespace_without_a_listener(lab: Lab) -> None:
    """It makes no entry for the namespace, which nothing would delete."""
    with open_session(Filter(), events=True, ring_bytes=1 << 16) as session:
        if not by_tracepoints(session):
            return  # functions tell, and there is no table of namespaces
        look = session.spec.layout("look", internal=True).size
        value = Layout("look", look * possible_cpus(), (Field("first", 0, 8, "Q", "int", "", "", None, None),))
        before = sum(1 for _ in session.loaded.entries("looks", 8, value))
        errors = lab.client.counters()["IcmpInDestUnreachs"]
        made = lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.sendto(b"nobody listens", (lab.server.ipv4, PORT))
        until(lambda: lab.client.counters()["IcmpInDestUnreachs"] == errors + 1, "the error")
        lab.flush()
        assert sum(1 for _ in session.loaded.entries("looks", 8, value)) == before


@pytest.mark.parametrize("attempt", range(3))
def test_what_was_refused_while_the_tool_started(lab: Lab, run_tool: type[RunningTool], attempt: int) -> None:
    """Its programs are attached one after the other. The first packet that all of them see stands for itself."""
    if refusals_cannot_be_seen():
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")
    lab.server.sysctl("tcp_syncookies", 0)
    listener = lab.server.socket(socket.AF_INET)
    listener.bind((lab.server.ipv4, PORT))
    listener.listen(0)
    full = lab.client.socket(socket.AF_INET)
    full.connect((lab.server.ipv4, PORT))
    packet, ready = syn(lab.client.ipv4, 10_000, lab.server.ipv4, PORT, 1), threading.Event()

    def flood() -> None:
        with lab.client.run(raw_socket, socket.AF_INET) as raw:
            while not ready.is_set():
                raw.sendto(packet, (lab.server.ipv4, 0))

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with run_tool("queue", "--events", "--netns", str(lab.server.inode)) as tool:
            ready.set()
            thread.join()
            lab.flush()
            done = tool.stop()
    finally:
        ready.set()
    assert drops(lab) > 0
    assert done.stats is not None
    assert done.stats["missed"] == 0


@pytest.mark.kernel
@pytest.mark.usefixtures("one_processor")
def test_a_syn_to_a_broadcast_address(lab: Lab, run_tool: type[RunningTool]) -> None:
    """tcp_v4_conn_request() counts it before it looks at a queue. The next SYN on that processor is not refused."""
    if refusals_cannot_be_seen():
        pytest.skip("this kernel refuses fentry, has no kprobes, and its kfree_skb has no rx_sk")
    listener = lab.server.socket(socket.AF_INET)
    listener.bind(("0.0.0.0", PORT))
    listener.listen(5)
    everybody = lab.server.ipv4.rpartition(".")[0] + ".255"
    packet = syn(lab.client.ipv4, 10_000, everybody, PORT, 1)
    packet = packet[:8] + b"\x40" + packet[9:10] + b"\0\0" + packet[12:]  # with TTL and without a checksum
    packet = packet[:10] + struct.pack("!H", checksum(packet[:20])) + packet[12:]
    with run_tool("queue", "--events", "--netns", str(lab.server.inode)) as tool:
        before = drops(lab)
        send_to_server(lab, packet)
        until(lambda: drops(lab) == before + 1, "the end of the SYN")
        connects_unrefused(lab, socket.AF_INET)
        done = tool.stop()
    assert done.rows == []
    assert done.stats is not None
    assert done.stats["missed"] == 0
    listener.close()
