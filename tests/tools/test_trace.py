"""`trace` against what the applications, the devices and the sockets counted, with delays that a test has made."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tcpscope.filters import Filter, PortRange
from tcpscope.lab.hosts import Lab
from tcpscope.request import Request
from tcpscope.tool import find
from tests.conftest import CompletedRun, until
from tests.lacks import functions_cannot_be_hooked
from tests.record import Call, Script, Test, Watch, recorded
from tests.record.script import Host
from tests.tools.pair import exchange, pair

PORT, SLOW_PORT, SUMMED_PORT = 6981, 6982, 6983
TRACE = Watch("trace", "--port", f"{PORT}")
SLOW = Watch("trace", "--port", f"{SLOW_PORT}", "--min", "100ms", every_kernel=False)
BY = "netns,direction,hop,laddr,lport,raddr,rport"
SUMMED = Watch("trace", "--port", f"{SUMMED_PORT}", "--summary", "--by", BY, every_kernel=False)
OUT = ("QUEUE", "START_XMIT", "XMIT", "ACKED")
IN = ("RECEIVE", "TCP", "READ")
AT_FUNCTIONS = {"WRITE", "TRANSMIT", "IP_OUT", "IP_IN", "DELIVER", "FORWARD", "TCP_IN", "BACKLOG", "NETFILTER"}
"""Hops that not every kernel has: tests/tools/test_trace_functions.py."""
VETH = "veth0"
BYTES = 50_000_000
FIN, ACK = 1, 16


def hops(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row["hop"] for row in rows if row["hop"] not in AT_FUNCTIONS]


def at_tracepoints(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one packet the rows that every kernel has, and what would be before each of them."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["hop"] not in AT_FUNCTIONS:
            behind = row["before"] in AT_FUNCTIONS
            found.append({**row, "before": found[-1]["hop"] if found else None} if behind else row)
    return found


def slowest(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return max((row for row in rows if row["since_us"] is not None), key=lambda row: row["since_us"])


def us_since(row: dict[str, Any]) -> int:
    assert row["since_us"] is not None, row
    return int(row["since_us"])


def shaped(host: Host, *qdisc: object) -> Call:
    return host.exec("tc", "qdisc", "replace", "dev", VETH, "root", *qdisc)


def unshaped(host: Host) -> Call:
    return host.exec("tc", "qdisc", "del", "dev", VETH, "root")


@recorded(TRACE)
def test_the_way_of_a_packet(script: Script) -> Test:
    """The receiver gets the skb of the sender: the packet keeps its number in both namespaces."""
    made = pair(script, PORT)
    exchange(made.near, made.far)  # from now on the server's socket is known
    made.near.send_all(1000)
    made.far.read(1000)
    made.near.until_acknowledged()
    seen = yield
    first = seen.rows(TRACE, script.client, data_bytes=1000)[0]
    out = at_tracepoints(seen.rows(TRACE, script.client, data_bytes=1000))
    into = at_tracepoints(seen.rows(TRACE, script.server, data_bytes=1000))
    assert (hops(out), hops(into)) == (list(OUT), list(IN))
    assert len({row["packet"] for row in (*out, *into)}) == 1
    assert len({row["seq"] for row in (*out, *into)}) == 1
    assert {row["direction"] for row in out} == {"SENT"}
    assert {row["direction"] for row in into} == {"RECEIVED"}
    assert [row["before"] for row in out] == [None, *OUT[:-1]]
    assert [row["before"] for row in into] == ["XMIT", *IN[:-1]]
    assert {row["flags"] for row in (*out, *into)} == {"PSH|ACK"}
    assert {(row["pid"], row["comm"], row["lport"]) for row in out} == {(made.client.pid, "client", made.local.ret)}
    assert {(row["pid"], row["comm"], row["lport"]) for row in into} == {(made.server.pid, "server", PORT)}
    assert [row["device"] for row in (*out[:-1], into[0])] == [VETH] * 4
    assert first["since_us"] is None
    for before, row in (*pairwise(out), *pairwise(into)):
        assert row["time"] >= before["time"]
        assert us_since(row) >= 0


@recorded(TRACE)
def test_the_handshake(script: Script) -> Test:
    made = pair(script, PORT, "6")
    exchange(made.near, made.far)
    seen = yield
    syn = seen.rows(TRACE, script.client, flags="SYN")
    assert hops(syn) == list(OUT)
    assert us_since(syn[-1]) >= 0
    assert {row["pid"] for row in syn} == {made.client.pid}
    answer = seen.rows(TRACE, script.server, flags="SYN|ACK")
    assert hops(answer) == list(OUT[:3])
    assert {row["pid"] for row in answer} == {made.server.pid}
    assert {row["family"] for row in (*syn, *answer)} == {6}


@recorded(TRACE)
def test_a_socket_that_connects_again(script: Script) -> Test:
    """It is another connection, also if the first one was refused."""
    client, server = script.client.process("client"), script.server.process("server")
    listener = server.listener(7001, script.server.ipv4)
    near = client.socket()
    near.bind(script.client.ipv4, PORT)
    refused = near.connect(script.server.ipv4, 7000, may_fail=True)
    near.connect(script.server.ipv4, 7001)
    far = listener.accept()
    exchange(near, far, 321)
    seen = yield
    assert refused.errno == "ECONNREFUSED"
    rows = seen.rows(TRACE, script.client, data_bytes=321)
    assert hops(rows) == list(OUT)
    assert {(row["rport"], row["pid"]) for row in rows} == {(7001, client.pid)}


TUNNEL = """
ip link add vx0 type vxlan id 7 dstport 4789 remote {peer} dev veth0 &&
ip addr add {address}/24 dev vx0 && ip link set vx0 up && exit
ip addr add {address}/24 dev veth0; exit 1
"""


@recorded(TRACE)
def test_a_tunnel(script: Script) -> Test:
    """Its device gives the packets to another one, in UDP. Where the kernel lacks vxlan, the addresses are on veth0."""
    hosts = {script.client: "198.51.100.1", script.server: "198.51.100.2"}
    made = [
        host.exec("sh", "-c", TUNNEL.format(peer=host.peer.ipv4, address=address), may_fail=True)
        for host, address in hosts.items()
    ]
    client, server = script.client.process("client"), script.server.process("server")
    listener = server.listener(PORT, hosts[script.server])
    near = client.socket()
    near.connect(hosts[script.server], PORT)
    far = listener.accept()
    exchange(near, far)
    exchange(near, far, 432)
    seen = yield
    out = at_tracepoints(seen.rows(TRACE, script.client, data_bytes=432))
    into = at_tracepoints(seen.rows(TRACE, script.server, data_bytes=432))
    assert len({row["packet"] for row in (*out, *into)}) == 1
    if [call.ret for call in made] != [0, 0]:
        assert (hops(out), hops(into)) == (list(OUT), list(IN))
        return
    places = [(row["hop"], row["device"]) for row in out]
    assert places[:2] == [("QUEUE", "vx0"), ("START_XMIT", "vx0")]
    assert places[2:5] == [(hop, VETH) for hop in OUT[:3]]
    assert places[5:] == [("XMIT", "vx0"), ("ACKED", None)]
    assert [(row["hop"], row["device"]) for row in into] == [
        ("RECEIVE", VETH),
        ("RECEIVE", "vx0"),
        ("TCP", None),
        ("READ", None),
    ]


@recorded(TRACE)
def test_a_reader_that_sleeps(script: Script) -> Test:
    """The packets wait at the socket. The second read takes two of them."""
    made = pair(script, PORT)
    sent = []
    for size in (700, 800, 900):
        call = made.near.send_all(size)
        sent.append((size, call, made.near.until_acknowledged()))
    made.server.pause(300_000)
    first = made.far.receive(700)
    second = made.far.receive(1700)
    seen = yield
    for (size, call, acknowledged), read in zip(sent, (first, second, second), strict=True):
        rows = seen.rows(TRACE, script.server, data_bytes=size)
        assert hops(rows) == list(IN)
        assert slowest(rows)["hop"] == "READ"
        assert read.begin_us - acknowledged.end_us - 1 <= us_since(rows[-1]) <= read.end_us - call.begin_us + 1


@recorded(TRACE)
def test_an_ack_that_no_program_sees(script: Script) -> Test:
    """After the FIN of the other end: when it came is not known."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    made.far.shutdown()
    made.near.until_state("CLOSE_WAIT")
    made.near.send_all(777)
    made.near.until_acknowledged()
    made.client.pause(100_000)
    made.near.close()
    made.far.read(777)
    seen = yield
    rows = seen.rows(TRACE, script.client, data_bytes=777)
    assert hops(rows) == list(OUT)
    assert rows[-1]["since_us"] is None


@recorded(TRACE)
def test_an_ack_that_tcp_refuses(script: Script) -> Test:
    """A segment out of the window acknowledges nothing. The real ACKs, which have options, are held up."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    place, written = made.near.sequence("send"), made.far.sequence("send")
    script.client.exec("nft", "add table inet held")
    script.client.exec("nft", "add chain inet held output { type filter hook output priority 0 ; }")
    script.client.exec("nft", f"add rule inet held output tcp dport {PORT} tcp doff > 5 drop")
    made.far.send_all(777)
    ends = (script.client.ipv4, made.local, script.server.ipv4, PORT)
    script.client.segment(*ends, sequence=place + (1 << 30), acknowledged=written + 777, flags=ACK)
    script.server.flush()
    script.client.exec("nft", "delete table inet held")
    made.far.until_acknowledged()
    made.near.read(777)
    seen = yield
    rows = seen.rows(TRACE, script.server)
    arrived = [number for number, row in enumerate(rows) if row["hop"] == "TCP"]
    assert (place.ret + (1 << 30)) % (1 << 32) in {rows[number]["seq"] for number in arrived}
    (acked, *_) = (number for number, row in enumerate(rows) if (row["hop"], row["data_bytes"]) == ("ACKED", 777))
    assert rows[max(number for number in arrived if number < acked)]["seq"] == place.ret % (1 << 32)


@recorded(TRACE)
def test_a_fin_that_the_backlog_merges(script: Script) -> Test:
    """While a process holds the socket, the kernel adds the FIN to the segment before it. It is no byte."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    place, acknowledged = made.near.sequence("send"), made.near.sequence("receive")
    ends = (script.client.ipv4, made.local, script.server.ipv4, PORT)
    with made.far.locked():
        for flags in (ACK, FIN | ACK):
            script.client.segment(*ends, sequence=place, acknowledged=acknowledged, flags=flags)
    made.far.until_state("CLOSE_WAIT")
    seen = yield
    rows = [row for row in seen.rows(TRACE, script.server, seq=place.ret % (1 << 32)) if row["hop"] == "TCP"]
    assert [(row["flags"], row["data_bytes"]) for row in rows] == [("FIN|ACK", 0)]


@recorded(TRACE)
def test_a_qdisc_that_delays(script: Script) -> Test:
    """tbf cuts a packet into segments, and lets one of them pass every 120 ms."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    shaped(script.client, "tbf", "rate", "100kbit", "burst", "1600", "latency", "10s")
    made.near.send_all(2896)
    made.far.read(2896)
    made.near.until_acknowledged()
    made.near.send_all(333)
    made.far.read(333)
    made.near.until_acknowledged()
    unshaped(script.client)
    seen = yield
    small = at_tracepoints(seen.rows(TRACE, script.client, lport=made.local.ret, data_bytes=333))
    taken = ["ENQUEUE"] if seen.machine.kernel.has_type("trace_event_raw_qdisc_enqueue") else []
    assert hops(small)[: 4 + len(taken)] == ["QUEUE", *taken, "DEQUEUE", "START_XMIT", "XMIT"]
    assert {row["device"] for row in small[: 4 + len(taken)]} == {VETH}
    rows = at_tracepoints(seen.rows(TRACE, script.client, lport=made.local.ret))
    whole = next(row for row in rows if row["data_bytes"] == 2896)  # its tail may be sent again meanwhile
    packet = [row for row in rows if row["packet"] == whole["packet"]]
    segments = [row for row in packet if row["hop"] == "DEQUEUE"]
    assert sum(row["data_bytes"] for row in segments) == 2896
    assert len(segments) > 1
    # The bucket holds 1600 bytes, those before them need the time of 100 kbit/s.
    assert us_since(segments[-1]) >= (2896 - 1600) * 8 / 100_000 * 1_000_000
    assert slowest(row for row in packet if row["hop"] != "ACKED")["hop"] == "DEQUEUE"
    assert {(row["device"], row["queue"]) for row in segments} == {(VETH, 0)}
    for segment in segments:
        way = [row for row in packet if row["seq"] == segment["seq"] and row["data_bytes"] == segment["data_bytes"]]
        assert hops(way) == ["DEQUEUE", "START_XMIT", "XMIT"]
        arrived = seen.rows(TRACE, script.server, seq=segment["seq"], packet=whole["packet"])
        assert hops(arrived) == list(IN)
        assert {row["data_bytes"] for row in arrived} == {segment["data_bytes"]}
        assert all(us_since(row) < us_since(segments[-1]) for row in (*way[1:], *arrived))
    assert [row["hop"] for row in packet if row["data_bytes"] == 2896] == ["QUEUE", "SEGMENTED", "ACKED"]


@recorded(TRACE)
def test_a_qdisc_that_keeps_packets(script: Script) -> Test:
    """Where the kernel has no netem, its queue only passes them on."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    delayed = script.client.netem(200)
    made.near.send_all(1234)
    made.far.read(1234)
    made.near.until_acknowledged()
    seen = yield
    rows = at_tracepoints(seen.rows(TRACE, script.client, data_bytes=1234))[: 6 if delayed.ret == 0 else 4]
    if delayed.ret:
        assert hops(rows) == list(OUT)
        return
    passed = [row for row in rows if row["hop"] != "ENQUEUE"]
    assert hops(passed) == ["QUEUE", "DEQUEUE", "START_XMIT", "XMIT", "ACKED"][: len(passed)]
    assert us_since(passed[1]) >= 199_000
    assert passed[1]["device"] == VETH
    assert slowest(row for row in rows if row["hop"] != "ACKED")["hop"] == "DEQUEUE"


@recorded(TRACE)
def test_a_qdisc_that_discards(script: Script) -> Test:
    made = pair(script, PORT)
    exchange(made.near, made.far)
    shaped(script.client, "pfifo", "limit", "0")
    made.near.send_all(4321)
    unshaped(script.client)
    made.far.read(4321)
    made.near.until_acknowledged()
    seen = yield
    rows = seen.rows(TRACE, script.client, lport=made.local.ret)
    dropped = [row for row in rows if row["hop"] == "DROPPED" and row["direction"] == "SENT"]
    assert dropped
    assert {row["before"] for row in dropped} == {"QUEUE"}
    reasons = {row["reason"] for row in dropped}
    assert reasons == {"QDISC_DROP"} or (reasons == {None} and seen.machine.kernel.enumerators("skb_drop_reason") == {})
    for row in dropped:
        assert hops(other for other in rows if other["packet"] == row["packet"])[:2] == ["QUEUE", "DROPPED"]


def sent_by(text: str) -> int:
    """The packets that a device has sent, of /proc/net/dev."""
    found = re.search(rf"{VETH}:((?:\s+\d+)+)", unquote(text))
    assert found, text
    return int(found[1].split()[9])


@recorded(TRACE)
def test_the_devices_count_the_same(script: Script) -> Test:
    """Also what the kernel sends for no socket: the last ACK of a connection."""
    for host in (script.client, script.server):
        host.exec("sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{VETH}/disable_ipv6")
    before = [host.exec("cat", "/proc/net/dev") for host in (script.client, script.server)]
    made = pair(script, PORT)
    for size in (1, 100, 1400, 20_000, 200_000):
        exchange(made.near, made.far, size, size)
    made.near.close()
    made.far.close()
    script.client.until_sockets(0, "==", state="last_ack", lport=made.local)
    script.server.until_sockets(0, "==", rport=made.local)
    after = [host.exec("cat", "/proc/net/dev") for host in (script.client, script.server)]
    seen = yield
    for host, peer, first, last in zip(
        (script.client, script.server), (script.server, script.client), before, after, strict=True
    ):
        sent = [row for row in seen.rows(TRACE, host) if row["hop"] == "XMIT"]
        received = [row for row in seen.rows(TRACE, peer) if row["hop"] == "RECEIVE"]
        assert len(sent) == len(received) == sent_by(last.data) - sent_by(first.data)


@recorded(SLOW)
def test_only_slow_hops(script: Script) -> Test:
    made = pair(script, SLOW_PORT)
    exchange(made.near, made.far)
    made.near.send_all(600)
    made.near.until_acknowledged()
    made.server.pause(150_000)
    made.far.read(600)
    seen = yield
    rows = seen.rows(SLOW, script.server, data_bytes=600)
    assert [(row["before"], row["hop"]) for row in rows] == [("TCP", "READ")]
    assert us_since(rows[0]) >= 100_000


@recorded(SUMMED)
def test_the_summary(script: Script) -> Test:
    made = pair(script, SUMMED_PORT)
    for _ in range(10):
        exchange(made.near, made.far)
    made.near.send_all(500)
    made.near.until_acknowledged()
    made.server.pause(500_000)
    made.far.read(500)
    seen = yield
    rows = seen.rows(SUMMED, script.server)
    by_hop = {row["hop"]: row for row in rows if row["direction"] == "RECEIVED"}
    assert by_hop["READ"]["count"] == 11
    assert by_hop["READ"]["max_us"] >= 500_000
    assert [row["hop"] for row in rows if row["largest"]] == ["READ"]
    assert by_hop["RECEIVE"]["count"] >= 11


def covered(rows: Iterable[dict[str, Any]], begin: int) -> int:
    """How many bytes of the stream these rows are about, up to the first gap. Sequence numbers begin again at 0."""
    at = 0
    for first, size in sorted(((row["seq"] - begin) % (1 << 32), row["data_bytes"]) for row in rows):
        if first > at:
            break
        at = max(at, first + size)
    return at


ATTEMPTS = 8  # a kernel where functions cannot be hooked runs no program in some tasks: then it is done again


def devices(lab: Lab) -> dict[tuple[int, str], int]:
    """What both devices have counted. Not /sys, which shows the namespace that mounted it."""
    found = {}
    for host in (lab.client, lab.server):
        text = host.run(Path("/proc/thread-self/net/dev").read_text)
        numbers = re.search(rf"{VETH}:((?:\s+\d+)+)", text)
        assert numbers
        received, sent = (int(numbers[1].split()[at]) for at in (1, 9))
        found |= {(host.inode, "RECEIVE"): received, (host.inode, "XMIT"): sent}
    return found


def transfer(
    lab: Lab, run_tool: Any, size: int = BYTES, family: int = socket.AF_INET
) -> tuple[CompletedRun, Counter[tuple[int, str]]]:
    """A connection that moves `size` bytes. What the tool shows, and how many packets the devices counted meanwhile."""
    with run_tool("trace", "--port", f"{PORT}", "--buffer", "64M") as tool:
        before = devices(lab)
        with lab.server.socket(family) as listener, lab.client.socket(family) as near:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((lab.server.address(family), PORT))
            listener.listen()
            near.connect(listener.getsockname())
            far, _ = listener.accept()

            def send() -> None:
                near.sendall(bytes(size))
                near.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            taken = 0
            with far:
                while data := far.recv(1 << 20):
                    taken += len(data)
            sender.join()
        until(lambda: not any(s.lport == PORT for s in lab.server.sockets()), "the end of the connection")
        lab.flush()
        after = devices(lab)
    assert taken == size
    return tool.done, Counter({place: after[place] - before[place] for place in after})


@pytest.mark.kernel
def test_no_packet_is_lost(lab, run_tool):  # type: ignore[no-untyped-def]
    """Each packet that a device counts has its row, and no other one. All bytes have all hops."""
    for _ in range(ATTEMPTS if functions_cannot_be_hooked() else 1):
        done, counted = transfer(lab, run_tool)
        assert (done.stats["lost"], done.stats["table_full"]) == (0, 0)
        shown = Counter((row["netns"], row["hop"]) for row in done.rows if row["hop"] in ("XMIT", "RECEIVE"))
        begin = next(row["seq"] for row in done.rows if row["flags"] == "SYN") + 1
        gaps = [
            hop
            for hop in ("QUEUE", "XMIT", "RECEIVE", "TCP", "READ", "ACKED")
            if covered([row for row in done.rows if row["hop"] == hop and row["data_bytes"]], begin) != BYTES
        ]
        if shown == counted and not done.stats["missed"]:
            break
    assert shown == counted
    assert not done.stats["missed"]
    assert not gaps


STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
PER_SECOND = 125_000_000  # bytes of 1 Gbit/s


@contextmanager
def measured() -> Iterator[None]:
    """The kernel measures how long BPF programs run."""
    before = STATS.read_text()
    STATS.write_text("1")
    try:
        yield
    finally:
        STATS.write_text(before)


def move(size: int, per_second: int) -> float:
    """Send so many bytes over loopback at that rate. Returns the seconds."""
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as near:
        near.connect(listener.getsockname())
        far, _ = listener.accept()

        def send() -> None:
            piece = bytes(per_second // 1000)
            for number in range(size // len(piece)):
                time.sleep(max(0.0, began + number * len(piece) / per_second - time.monotonic()))
                near.sendall(piece)
            near.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        with far:
            while far.recv(1 << 18):
                pass
        sender.join()
    return time.monotonic() - began


@pytest.mark.root
def test_what_other_traffic_pays() -> None:
    """All programs together run for at most a twentieth of the time that it takes. Others may have traffic, too."""
    shares = []
    request = Request(filter=Filter(port=(PortRange(1, 1),)), options={"min": None, "summary": None, "by": None})
    with find("trace").open(request) as run, measured():
        for _ in range(3):
            before = run.sessions[0].loaded.program_info()
            seconds = move(PER_SECOND // 2, PER_SECOND)
            after = run.sessions[0].loaded.program_info()
            ran_ns = sum(after[name][0] - before[name][0] for name in after)
            assert ran_ns > 0
            shares.append(ran_ns / 1e9 / seconds)
    assert min(shares) <= 0.05, shares
