"""`tcpscope drop`: each packet of TCP that the kernel discards, why, and in which counter."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
from collections import Counter
from typing import Any
from urllib.parse import unquote

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import DEVICE, Lab
from tcpscope.lab.packets import checksum, raw_socket, syn
from tests.conftest import RunningTool, until
from tests.lacks import FUNCTIONS
from tests.record import PORTS, Call, Host, Process, Script, Seen, Socket, Test, Watch, recorded
from tests.record.script import IPPROTO_TCP, NOBODYS_MAC, SOL_SOCKET
from tests.tools.pair import pair
from tests.tools.queue.refusals import BACKLOG, FAMILIES, SMALL_BACKLOG, Run, has_rx_sk, values

DROPS = Watch("drop", "--port", PORTS)
ALL = Watch("drop", "--all", "--port", PORTS)
COUNTED = Watch("drop", "--count", "--by", "netns,reason,kind,counter", "--port", PORTS, every_kernel=False)
TRACED = Watch("drop", "--port", PORTS, lacks=FUNCTIONS)
"""By tracepoints alone."""
PORT = 8910
TCP_DEFER_ACCEPT = 9
SO_SNDBUF, SO_RCVBUF = 7, 8
TCP_TIMESTAMP = 24
CLIENT, WITHOUT_COOKIE = 1, 4  # net.ipv4.tcp_fastopen
FIN, SYN, RST, ACK = 1, 2, 4, 16
ETH_P_IP = 0x0800
REJECT = "reject with tcp reset"

Rows = list[dict[str, Any]]


def rule(host: Host, hook: str, verdict: str, match: str = f"tcp dport {PORT}") -> None:
    """From now on the host's firewall counts what matches, and then decides so."""
    host.exec("nft", "add table inet filter")
    device = "device veth0" if hook == "ingress" else ""
    host.exec("nft", f"add chain inet filter {hook} {{ type filter hook {hook} {device} priority 0 ; }}")
    host.exec("nft", f"add rule inet filter {hook} {match} counter {verdict}")


def counted_by_rules(host: Host) -> Call:
    return host.exec("nft", "list", "ruleset")


def packets_and_bytes(call: Call) -> tuple[int, int]:
    """What the only rule has counted."""
    found = re.findall(r"counter packets (\d+) bytes (\d+)", unquote(call.data))
    assert len(found) == 1, unquote(call.data)
    return int(found[0][0]), int(found[0][1])


def has_reasons(seen: Seen) -> bool:
    return bool(seen.machine.kernel.enumerators("skb_drop_reason"))


def tells_receiver(seen: Seen) -> bool:
    """Whether the tracepoint has the socket that was to receive a packet."""
    return seen.machine.kernel.parameters("sk_skb_reason_drop") is not None


def tells_handler(seen: Seen) -> bool:
    """Whether it shows what a socket discards itself, and whose it is, although the kernel has no reasons."""
    return seen.machine.hook("drops", "freed") is not None


def tells_connection(seen: Seen) -> bool:
    """Whether it shows whose it is what a connection discards itself: by the tracepoint, or by functions."""
    return tells_receiver(seen) or tells_handler(seen) or seen.machine.hook("drops", "established") is not None


def reasons(rows: Rows) -> set[str | None]:
    return {row["reason"] for row in rows}


def has_reason(seen: Seen, name: str) -> bool:
    """Whether this kernel has one of this name."""
    return f"SKB_DROP_REASON_{name}" in seen.machine.kernel.enumerators("skb_drop_reason").values()


def connection(script: Script, rport: int, family: str = "4") -> tuple[Process, Socket, Socket]:
    """The server, and both ends of a connection. No other client has its port."""
    made = pair(script, PORT, family, rport=rport)
    return made.server, made.near, made.far


def reset(script: Script, near: Socket) -> None:
    """Nothing is sent any more."""
    near.linger()
    near.close()
    script.server.flush()


def of_connection(
    seen: Seen, watch: Watch, server: Process, rport: int, reason: str, *, by_process: bool = False
) -> Rows:
    """What a connection has discarded for a reason. Without reasons: all that it has discarded itself, or for a full
    backlog what was discarded before the socket could handle it.

    From 5.17 to 6.10 a note tells the socket. That of a process may be lost. A packet that is not handled has none, but
    the one that had its address before may have left one.
    """
    before = reason == "SOCKET_BACKLOG"
    noted = has_reasons(seen) and not tells_receiver(seen)
    own = tells_connection(seen) and not (before or by_process if noted else before and not tells_receiver(seen))
    rows = seen.rows(watch, server.host)
    if not own:
        rows = rows + [row for row in seen.run(watch).rows if row["netns"] is None]
    rows = [row for row in rows if row["rport"] == rport and row["reason"] == (reason if has_reasons(seen) else None)]
    if not has_reasons(seen):
        rows = [row for row in rows if bool(re.match(r"tcp_v[46]_rcv\+", row["location"])) is before]
    for row in rows:
        assert row["pid"] in ((server.pid,) if own else (None, server.pid))
        assert row["comm"] == (server.comm if row["pid"] else None)
        assert row["state"] in (("ESTABLISHED", "CLOSE") if row["pid"] else (None,))
    assert {(row["lport"], row["direction"]) for row in rows} <= {(PORT, "RECEIVED")}
    return rows


@recorded(DROPS, COUNTED)
def test_a_port_without_a_listener(script: Script) -> Test:
    client = script.client.process("client")
    before = script.server.counter("TcpOutRsts")
    for _ in range(3):
        made = client.socket()
        made.connect(script.server.ipv4, PORT, may_fail=True)
        made.close()
    after = script.server.counter("TcpOutRsts")
    seen = yield
    rows = seen.rows(DROPS, script.server)
    assert len(rows) == after.ret - before.ret == 3
    for row in rows:
        assert (row["direction"], row["flags"], row["packet_bytes"]) == ("RECEIVED", "SYN", 60)
        assert (row["laddr"], row["lport"], row["raddr"]) == (script.server.ipv4, PORT, script.client.ipv4)
        assert (row["pid"], row["state"], row["counter"]) == (None, None, None)
        assert row["location"].startswith("tcp_v4_rcv")
        assert row["device"] == "veth0"
    named = has_reasons(seen)
    assert reasons(rows) == {"NO_SOCKET" if named else None}
    assert {row["kind"] for row in rows} == {"REFUSED" if named else None}
    counted = [(row["reason"], row["kind"], row["counter"], row["count"]) for row in seen.rows(COUNTED, script.server)]
    assert counted == [(rows[0]["reason"], rows[0]["kind"], None, 3)]


@pytest.mark.parametrize("family", ["4", "6"])
@pytest.mark.parametrize(
    ("hook", "verdict"), [("ingress", "drop"), ("prerouting", "drop"), ("input", "drop"), ("input", REJECT)]
)
@recorded(DROPS)
def test_a_firewall_that_drops_what_comes(script: Script, hook: str, family: str, verdict: str) -> Test:
    """At ingress the packet still has the socket that sent it, which is of another namespace."""
    rule(script.server, hook, verdict)
    client = script.client.process("client")
    made = client.socket(family)
    made.start(script.server.address(family), PORT)
    if verdict == "drop":
        script.client.until_counter("TcpRetransSegs", 1)
    else:
        made.outcome()
    made.close()
    script.server.flush()
    counted = counted_by_rules(script.server)
    seen = yield
    rows = seen.rows(DROPS, script.server)
    assert (len(rows), sum(row["packet_bytes"] for row in rows)) == packets_and_bytes(counted)
    assert rows
    assert reasons(rows) == {"NETFILTER_DROP" if has_reasons(seen) else None}
    for row in rows:
        assert (row["direction"], row["flags"], row["lport"]) == ("RECEIVED", "SYN", PORT)
        assert row["laddr"] == script.server.address(family)
        assert (row["pid"], row["counter"], row["device"]) == (None, None, "veth0")


@recorded(DROPS)
def test_a_firewall_that_drops_what_is_sent(script: Script) -> Test:
    rule(script.client, "output", "drop")
    client = script.client.process("client")
    made = client.socket()
    made.start(script.server.ipv4, PORT)
    script.client.until_counter("TcpExtTCPTimeouts", 1)
    local = made.name()
    made.close()
    counted = counted_by_rules(script.client)
    seen = yield
    rows = seen.rows(DROPS, script.client)
    assert (len(rows), sum(row["packet_bytes"] for row in rows)) == packets_and_bytes(counted)
    assert rows
    assert reasons(rows) == {"NETFILTER_DROP" if has_reasons(seen) else None}
    for row in rows:
        assert (row["direction"], row["flags"], row["state"], row["kind"]) == ("SENT", "SYN", "SYN_SENT", "LOST")
        assert (row["laddr"], row["lport"], row["rport"]) == (script.client.ipv4, local.ret, PORT)
        assert (row["pid"], row["comm"]) == (client.pid, client.comm)


@recorded(DROPS)
def test_a_firewall_that_drops_what_is_forwarded(script: Script) -> Test:
    far = "198.51.100.9"
    script.server.sysctl("ip_forward", 1)
    script.server.exec("ip", "route", "add", far, "dev", "veth0")
    script.client.exec("ip", "route", "add", far, "via", script.server.ipv4)
    rule(script.server, "forward", "drop")
    client = script.client.process("client")
    made = client.socket()
    made.start(far, PORT)
    script.client.until_counter("TcpRetransSegs", 1)
    made.close()
    script.server.flush()
    counted = counted_by_rules(script.server)
    seen = yield
    rows = seen.rows(DROPS, script.server)
    assert (len(rows), sum(row["packet_bytes"] for row in rows)) == packets_and_bytes(counted)
    assert {(row["direction"], row["laddr"], row["raddr"]) for row in rows} == {("RECEIVED", far, script.client.ipv4)}


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(DROPS)
def test_a_wrong_checksum(script: Script, family: str) -> Test:
    server = script.server.process("server")
    server.listener(PORT, script.server.address(family))
    before = script.server.counter("TcpInCsumErrors")
    for port in range(40001, 40005):
        here, there = script.client.address(family), script.server.address(family)
        script.client.segment(here, port, there, PORT, wrong=1)
    after = script.server.until_counter("TcpInCsumErrors", before + 4)
    seen = yield
    rows = seen.rows(DROPS, script.server)
    assert len(rows) == after.ret - before.ret == 4
    assert sorted(row["rport"] for row in rows) == list(range(40001, 40005))
    if has_reasons(seen):
        assert {(row["reason"], row["kind"], row["counter"]) for row in rows} == {
            ("TCP_CSUM", "LOST", "TcpInCsumErrors")
        }


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(DROPS)
def test_final_acks_that_a_full_accept_queue_refuses(script: Script, family: str) -> Test:
    """All SYNs are answered before listen() makes the queue shorter, so none is refused."""
    server, client = script.server.process("server"), script.client.process("client")
    address = script.server.address(family)
    listener = server.listener(PORT, address, backlog=16)
    made = [client.socket(family) for _ in range(4)]
    with script.server.held():
        for each in made:
            each.start(address, PORT)
        script.server.until_sockets(4, state="SYN_RECV", lport=PORT)
        listener.listen(0)
    script.server.until_counter("TcpExtListenOverflows", 3)
    for each in made:
        each.until_state("ESTABLISHED")
        each.linger()
        each.close()
    script.server.flush()
    after = script.server.counter("TcpExtListenOverflows")
    seen = yield
    rows = seen.rows(DROPS, script.server)
    assert {row["flags"] for row in rows} == {"ACK"}
    assert len(rows) == after.ret >= 3
    if has_reason(seen, "TCP_LISTEN_OVERFLOW"):
        assert reasons(rows) == {"TCP_LISTEN_OVERFLOW"}
    for row in rows:
        assert (row["kind"], row["counter"]) == ("REFUSED", "TcpExtListenOverflows")
        assert (row["state"], row["pid"], row["comm"]) == ("LISTEN", server.pid, server.comm)
        assert (row["laddr"], row["lport"], row["raddr"]) == (address, PORT, script.client.address(family))


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(DROPS)
def test_final_acks_of_cookies(script: Script, family: str) -> Test:
    """The accept queue is full. The listener has no request, and repeats nothing."""
    script.server.sysctl("tcp_syncookies", 2)
    run = Run(script, family, port=PORT)
    run.fill(BACKLOG)
    sent, before = script.server.counter("TcpExtSyncookiesSent"), run.overflows()
    with script.server.held():
        late = run.start(4)
        script.server.until_counter("TcpExtSyncookiesSent", sent + 4)
    for each in late:
        each.outcome()
    run.until_overflows(before, 3)
    run.end()
    seen = yield
    rows = seen.rows(DROPS, script.server, flags="ACK", lport=PORT)
    assert len(rows) == run.change("ListenOverflows") == 3
    assert {row["rport"] for row in rows} < run.ports(*late)
    refused = ("REFUSED", "LISTEN", run.owner.pid, run.owner.comm) if tells_receiver(seen) else (None,) * 4
    assert {(row["kind"], row["state"], row["pid"], row["comm"]) for row in rows} == {refused}


@recorded(DROPS)
def test_segments_that_do_not_fit_a_handshake(script: Script) -> Test:
    """In the client's name: one out of the window, one without the flag ACK. The listener has refused nobody."""
    listener = script.server.process("server").listener(PORT)
    ends = script.client.ipv4, 42107, script.server.ipv4, PORT
    with script.server.losing():
        script.client.segment(*ends, 1000, flags=SYN)
        script.server.until_sockets(state="SYN_RECV", lport=PORT)
        script.client.segment(*ends, 1001 + (1 << 30), flags=FIN)
        script.client.segment(*ends, 1001, flags=FIN)
        script.server.flush()
        waiting = script.server.diag(state="SYN_RECV", lport=PORT)
        after = script.server.counters()
        listener.close()
    seen = yield
    rows = seen.rows(DROPS, script.server, lport=PORT)
    assert (waiting.ret, after.counters["TcpExtListenDrops"]) == (1, 0)
    known = "LOST" if tells_receiver(seen) or seen.machine.hook("drops", "request") else None
    assert [(row["flags"], row["rport"], row["kind"], row["counter"]) for row in rows] == [
        ("FIN", 42107, known, None)
    ] * 2
    if has_reason(seen, "TCP_LISTEN_OVERFLOW"):
        assert rows[0]["reason"] == "TCP_OVERWINDOW"


def refusals(seen: Seen, run: Run, watch: Watch = DROPS) -> Rows:
    """What the listener has refused: as many packets as the counters say. Tracepoints alone show the SYNs, too."""
    rows = [row for row in seen.rows(watch, run.host, lport=run.port) if row["kind"] == "REFUSED"]
    counters = Counter(row["counter"] for row in rows)
    assert counters["TcpExtListenOverflows"] == run.change("ListenOverflows")
    assert counters["TcpExtTCPReqQFullDrop"] == run.change("TCPReqQFullDrop")
    assert len(rows) == counters.total() - counters[None] == run.change("ListenDrops")
    if seen.machine.kernel.enumerator("BPF_FUNC_check_mtu") is not None:  # before 5.12 a program cannot ask for it
        assert all(row["cookie"] for row in syns(rows))
    if has_rx_sk(seen.machine.kernel):
        traced = seen.rows(TRACED, run.host, lport=run.port, flags="SYN", kind="REFUSED")
        assert contents(traced) == contents(syns(rows))
    return rows


def contents(rows: Rows) -> list[str]:
    return sorted(repr(row | {"time": None}) for row in rows)


def syns(rows: Rows) -> Rows:
    """Those that are SYNs: each has the listener's owner, and no function."""
    found = [row for row in rows if row["flags"] == "SYN"]
    for row in found:
        assert (row["kind"], row["direction"], row["state"]) == ("REFUSED", "RECEIVED", "LISTEN")
        assert (row["location"], row["device"], row["stack"]) == (None, None, None)
    return found


def check_ends(rows: Rows, run: Run) -> None:
    """The local end is where the SYN went, also if the listener has all addresses."""
    here, port = run.target
    for row in rows:
        assert (row["laddr"], row["lport"], row["family"]) == (here, port, int(run.kind))
        assert (row["pid"], row["comm"], row["uid"]) == (run.owner.pid, run.owner.comm, 0)


def needs_syns(seen: Seen) -> None:
    if not seen.machine.hook("drops", "syn_exit"):
        pytest.skip("this kernel refuses fentry, and its kfree_skb has no rx_sk")


@pytest.mark.parametrize("family", FAMILIES)
@recorded(DROPS, TRACED)
def test_syns_that_a_full_syn_queue_refuses(script: Script, family: str) -> Test:
    script.server.sysctl("tcp_syncookies", 0)
    script.server.sysctl("tcp_max_syn_backlog", 256)
    run = Run(script, family, SMALL_BACKLOG, PORT)
    run.flood(40)
    requests = run.requests()
    run.end()
    seen = yield
    needs_syns(seen)
    rows = refusals(seen, run)
    assert len(rows) == 40 - requests.ret == run.change("TCPReqQFullDrop")
    assert rows == syns(rows)
    assert values(rows, "reason", "counter") == {("DERIVED:SYN_QUEUE_FULL", "TcpExtTCPReqQFullDrop")}
    assert values(rows, "packet_bytes") == {44 if run.kind == "4" else 64}  # with the option MSS
    assert len(values(rows, "raddr")) == len(rows)
    assert values(rows, "rport") == {10_000}
    check_ends(rows, run)


@recorded(DROPS, TRACED)
def test_the_last_quarter_of_the_syn_queue(script: Script) -> Test:
    """No counter has it but ListenDrops."""
    script.server.sysctl("tcp_syncookies", 0)
    script.server.sysctl("tcp_max_syn_backlog", 16)
    run = Run(script, backlog=64, port=PORT)
    run.flood(40)
    run.end()
    seen = yield
    needs_syns(seen)
    rows = refusals(seen, run)
    assert len(rows) == 40 - 13 == run.change("ListenDrops")
    assert values(rows, "reason", "counter") == {("DERIVED:SYN_QUEUE_RESERVED", "TcpExtListenDrops")}


@pytest.mark.parametrize("cookies", [1, 2])
@recorded(ALL)
def test_syns_that_are_answered_with_a_cookie(script: Script, cookies: int) -> Test:
    """The queue is full, or it is always so: nothing is discarded."""
    script.server.sysctl("tcp_syncookies", cookies)
    run = Run(script, backlog=SMALL_BACKLOG, port=PORT)
    run.flood(40)
    run.end()
    seen = yield
    assert run.change("SyncookiesSent") >= 30
    assert seen.rows(ALL, script.server, flags="SYN") == []


@pytest.mark.parametrize("family", FAMILIES)
@recorded(DROPS, TRACED)
def test_syns_that_a_full_accept_queue_refuses(script: Script, family: str) -> Test:
    run = Run(script, family, port=PORT)
    refused = run.overflow_at_syn(3)
    run.end()
    seen = yield
    needs_syns(seen)
    rows = refusals(seen, run)
    assert len(rows) == run.change("ListenOverflows") >= 3
    assert rows == syns(rows)
    assert values(rows, "reason", "counter") == {("DERIVED:ACCEPT_QUEUE_FULL", "TcpExtListenOverflows")}
    assert values(rows, "rport") == run.ports(*refused)
    check_ends(rows, run)


OF_SYNS = Watch("drop", "--reason", "DERIVED:*", "--port", PORTS, every_kernel=False)
NOT_OF_SYNS = Watch("drop", "--reason", "!derived:accept*", "--port", PORTS, every_kernel=False)
BY_COUNTER = Watch("drop", "--count", "--by", "netns,reason,kind,counter,comm", "--port", PORTS, every_kernel=False)


@pytest.mark.parametrize("family", FAMILIES)
@recorded(DROPS, TRACED)
def test_refusals_of_both_steps(script: Script, family: str) -> Test:
    """Final ACKs, which are sent again, and then SYNs. Each packet has one row."""
    run = Run(script, family, port=PORT)
    run.overflow_at_ack(4)
    before = run.overflows()
    late = run.start(3)
    run.until_overflows(before, 3)
    run.end()
    seen = yield
    needs_syns(seen)
    rows = refusals(seen, run)
    assert values(syns(rows), "rport") == run.ports(*late)
    acks = [row for row in rows if row["flags"] != "SYN"]
    assert len(values(acks, "rport")) == 4
    assert not values(acks, "rport") & run.ports(*late)
    assert {str(row["reason"]).startswith("DERIVED:") for row in acks} == {False}
    assert len(acks) + len(syns(rows)) == run.change("ListenOverflows")
    check_ends(rows, run)


@recorded(DROPS, TRACED, OF_SYNS, NOT_OF_SYNS, BY_COUNTER)
def test_chosen_and_counted_refusals(script: Script) -> Test:
    """Each run shows or counts its own. A derived reason is none of the kernel's: Linux before 5.17 has it, too."""
    run = Run(script, port=PORT)
    run.overflow_at_ack(2)
    before = run.overflows()
    run.start(3)
    run.until_overflows(before, 3)
    run.end()
    seen = yield
    needs_syns(seen)
    rows = refusals(seen, run)
    acks = [row for row in rows if row["flags"] != "SYN"]
    assert contents(seen.rows(OF_SYNS, script.server)) == contents(syns(rows)) != []
    assert contents(seen.rows(NOT_OF_SYNS, script.server)) == contents(acks) != []
    names = ("reason", "kind", "counter", "comm")
    counted = {tuple(row[name] for name in names): row["count"] for row in seen.rows(BY_COUNTER, script.server)}
    assert counted == Counter(tuple(row[name] for name in names) for row in rows)
    of_syns = counted["DERIVED:ACCEPT_QUEUE_FULL", "REFUSED", "TcpExtListenOverflows", run.owner.comm]
    assert of_syns == len(syns(rows)) >= 3


@recorded(DROPS)
def test_a_full_receive_buffer(script: Script) -> Test:
    """The window was offered when the buffer was large. Now it has no room for a segment."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    near = client.socket()
    near.connect(script.server.ipv4, PORT)
    far, local = listener.accept(), near.name()
    far.option(SOL_SOCKET, SO_RCVBUF, 1)
    near.send_all(20_000)
    script.server.until_counter("TcpExtTCPRcvQDrop", 1)
    near.linger()
    near.close()
    script.server.flush()
    after = script.server.counters()
    seen = yield
    if not tells_connection(seen):
        return  # the route and the device are no longer in the packet: the namespace is not known
    rows = seen.rows(DROPS, script.server, rport=local.ret, reason="PROTO_MEM" if has_reasons(seen) else None)
    if tells_handler(seen):
        rows = [row for row in rows if row["counter"]]
    for name in ("TcpExtTCPRcvQDrop", "TcpExtTCPOFODrop"):
        assert sum(row["counter"] == name for row in rows) == after.counters[name], name
    assert len(rows) == after.counters["TcpExtTCPRcvQDrop"] + after.counters["TcpExtTCPOFODrop"]
    for row in rows:
        assert (row["kind"], row["state"]) == ("LOST", "ESTABLISHED")
        assert (row["pid"], row["comm"]) == (server.pid, server.comm)


@recorded(DROPS)
def test_a_route_that_is_gone(script: Script) -> Test:
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    near = client.socket()
    near.connect(script.server.ipv4, PORT)
    listener.accept()
    local = near.name()
    before = script.client.counter("IpOutNoRoutes")
    script.client.exec("ip", "route", "flush", "dev", "veth0")
    near.send_all(1000)
    script.client.until_counter("IpOutNoRoutes", before + 2)
    near.linger()
    near.close()
    after = script.client.counter("IpOutNoRoutes")
    seen = yield
    rows = [row for row in seen.rows(DROPS, script.client) if row["location"].startswith("__ip_queue_xmit")]
    assert len(rows) == after.ret - before.ret >= 2
    for row in rows:
        assert (row["direction"], row["lport"], row["rport"]) == ("SENT", local.ret, PORT)
        assert (row["laddr"], row["raddr"]) == (script.client.ipv4, script.server.ipv4)
        assert row["packet_bytes"] is None  # no IP header yet
    if has_reasons(seen):
        assert {(row["reason"], row["counter"], row["kind"]) for row in rows} == {
            ("IP_OUTNOROUTES", "IpOutNoRoutes", "LOST")
        }


@recorded(DROPS, ALL)
def test_udp_is_not_shown(script: Script) -> Test:
    rule(script.server, "input", "drop", f"udp dport {PORT}")
    client = script.client.process("client")
    made = client.socket(kind=2)
    made.connect(script.server.ipv4, PORT)
    for _ in range(20):
        made.send("x")
    script.server.flush()
    counted = counted_by_rules(script.server)
    seen = yield
    assert packets_and_bytes(counted)[0] == 20
    assert seen.rows(DROPS, script.server) == seen.rows(ALL, script.server) == []


@recorded(DROPS, ALL)
def test_normal_connections(script: Script) -> Test:
    """The client closes first: its sockets go to TIME_WAIT, where the kernel handles the server's FIN."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    for _ in range(50):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        near.send_all(100)
        near.close()
        far.until_end()
        far.close()
    after_fin_wait2 = []
    for _ in range(5):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far, local = listener.accept(), near.name()
        after_fin_wait2.append(local)
        near.close()
        script.client.until_sockets(1, state="FIN_WAIT2", lport=local)
        far.close()
    waiting = script.client.until_sockets(55, state="TIME_WAIT", rport=PORT)
    script.client.flush()
    seen = yield
    assert waiting.ret == 55
    for host in script.hosts:
        assert seen.rows(DROPS, host) == []
    rows = seen.rows(ALL, script.client)
    assert {row["kind"] for row in rows} == {"HARMLESS"}
    fins = Counter(row["lport"] for row in rows if row["state"] == "TIME_WAIT" and row["flags"] == "FIN|ACK")
    assert [fins[local.ret] for local in after_fin_wait2] == [1] * 5


@recorded(DROPS)
def test_a_connection_that_is_half_closed(script: Script) -> Test:
    """The server sends on after the client's FIN. It takes each ACK, and then discards it."""
    _, near, far = connection(script, 42108)
    near.shutdown()
    far.until_state("CLOSE_WAIT")
    for _ in range(20):
        far.send_all(1000)
        far.until_acknowledged()
    far.close()
    near.until_end()
    near.close()
    script.server.flush()
    seen = yield
    for host in script.hosts:
        assert seen.rows(DROPS, host) == []


@recorded(DROPS, ALL)
def test_a_bare_ack_that_the_listener_defers(script: Script) -> Test:
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    listener.option(IPPROTO_TCP, TCP_DEFER_ACCEPT, 30)
    near = client.socket()
    near.connect(script.server.ipv4, PORT)
    near.until_state("ESTABLISHED")
    deferred = script.server.until_counter("TcpExtTCPDeferAcceptDrop", 1)
    near.send_all(10)
    listener.accept()
    seen = yield
    assert seen.rows(DROPS, script.server) == []
    rows = [row for row in seen.rows(ALL, script.server) if row["counter"] == "TcpExtTCPDeferAcceptDrop"]
    assert len(rows) == deferred.ret == 1
    assert [(row["kind"], row["flags"], row["state"]) for row in rows] == [("HARMLESS", "ACK", "LISTEN")]
    assert [(row["pid"], row["comm"]) for row in rows] == [(server.pid, server.comm)]


@recorded(DROPS)
def test_a_syn_in_a_connection(script: Script) -> Test:
    """In the client's name. The kernel answers it with a challenge ACK, whatever its sequence number is."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    near = client.socket()
    near.connect(script.server.ipv4, PORT)
    listener.accept()
    local = near.name()
    for sequence in (1, 1 << 30, 3 << 30):
        script.client.segment(script.client.ipv4, local, script.server.ipv4, PORT, sequence)
    script.server.flush()
    challenges = script.server.counter("TcpExtTCPSYNChallenge")
    near.send_all(10)
    near.until_acknowledged()
    seen = yield
    assert challenges.ret == 3
    if not tells_connection(seen):
        return
    reason = "TCP_INVALID_SYN" if has_reasons(seen) else None
    rows = seen.rows(DROPS, script.server, rport=local.ret, reason=reason)
    assert [(row["kind"], row["flags"], row["counter"], row["state"], row["comm"]) for row in rows] == [
        ("LOST", "SYN", "TcpExtTCPSYNChallenge", "ESTABLISHED", server.comm)
    ] * 3


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(DROPS)
def test_a_full_backlog(script: Script, family: str) -> Test:
    """A process holds the socket, and what comes meanwhile waits for it. It is out of the window, and not merged."""
    port = 42101 if family == "4" else 42102
    server, near, far = connection(script, port, family)
    for option in (SO_SNDBUF, SO_RCVBUF):
        far.option(SOL_SOCKET, option, 1)
    following = far.sequence("receive")
    ends = script.client.address(family), port, script.server.address(family), PORT
    before = script.server.counter("TcpExtTCPBacklogDrop")
    with far.locked():
        for number in range(160):
            script.client.segment(*ends, following + ((1 << 30) + 10 * number), flags=ACK)
        script.server.flush()
    reset(script, near)
    after = script.server.counter("TcpExtTCPBacklogDrop")
    seen = yield
    rows = of_connection(seen, DROPS, server, port, "SOCKET_BACKLOG")
    assert len(rows) == after.ret - before.ret >= 10
    handled = of_connection(seen, DROPS, server, port, "TCP_INVALID_SEQUENCE", by_process=True)
    sizes = Counter(row["packet_bytes"] for row in rows + handled if row["flags"] == "ACK")
    assert sizes[40 if family == "4" else 60] == 160  # those of the client itself have options
    assert len(handled) >= 10
    assert {row["kind"] for row in handled} == {"LOST"}
    assert {row["flags"] for row in rows} == {"ACK"}
    if has_reasons(seen):
        assert {(row["kind"], row["counter"]) for row in rows} == {("LOST", "TcpExtTCPBacklogDrop")}


@recorded(DROPS)
def test_time_stamps_that_are_too_old(script: Script) -> Test:
    """The client's clock goes back by 100 s."""
    port = 42103
    script.client.sysctl("tcp_early_retrans", 0)
    server, near, _ = connection(script, port)
    near.send_all(100)
    near.until_acknowledged()
    before = script.server.counter("TcpExtPAWSEstab")
    with near.repaired():
        now = near("get", IPPROTO_TCP, TCP_TIMESTAMP, 4)
        near.option(IPPROTO_TCP, TCP_TIMESTAMP, now + -100_000)
    for _ in range(3):
        near.send_all(1000)
    script.server.until_counter("TcpExtPAWSEstab", before + 3)
    reset(script, near)
    after = script.server.counter("TcpExtPAWSEstab")
    seen = yield
    rows = of_connection(seen, DROPS, server, port, "TCP_RFC7323_PAWS")
    assert len(rows) == after.ret - before.ret
    counter = "TcpExtPAWSEstab" if tells_connection(seen) else None
    assert {(row["kind"], row["counter"], row["packet_bytes"]) for row in rows} == {("LOST", counter, 1052)}


@recorded(DROPS, ALL)
def test_what_is_out_of_the_window(script: Script) -> Test:
    """In the client's name: beyond the window, and before it."""
    port = 42104
    server, near, far = connection(script, port)
    following = far.sequence("receive")
    ends = script.client.ipv4, port, script.server.ipv4, PORT
    before = script.server.counters()
    for number in range(5):
        script.client.segment(*ends, following + ((1 << 30) + number), flags=ACK)
    for number in range(3):
        script.client.segment(*ends, following + (-1000 - number), flags=ACK)
    script.client.segment(*ends, following + (1 << 30), flags=RST)
    script.server.flush()
    after = script.server.counters()
    near.send_all(10)
    near.until_acknowledged()
    reset(script, near)
    seen = yield
    apart = has_reason(seen, "TCP_OLD_SEQUENCE") or not has_reasons(seen)
    rows = of_connection(seen, DROPS, server, port, "TCP_INVALID_SEQUENCE")
    assert Counter(row["flags"] for row in rows) == {"ACK": 5 if apart else 8, "RST": 1}
    counts = seen.machine.kernel.enumerator("LINUX_MIB_BEYOND_WINDOW") is not None
    for row in rows:
        counted = counts and row["flags"] == "ACK"
        assert (row["kind"], row["counter"]) == ("LOST", "TcpExtBeyondWindow" if counted else None)
    beyond = after.counters["TcpExtBeyondWindow"] - before.counters["TcpExtBeyondWindow"]
    assert beyond == sum(row["counter"] is not None for row in rows)
    if apart:
        old = of_connection(seen, ALL, server, port, "TCP_OLD_SEQUENCE")
        if has_reasons(seen):
            assert of_connection(seen, DROPS, server, port, "TCP_OLD_SEQUENCE") == []
        else:
            old = [row for row in old if row["flags"] == "ACK" and row["kind"] != "LOST"]
        assert [row["kind"] for row in old if row["packet_bytes"] == 40] == ["HARMLESS"] * 3


@recorded(DROPS)
def test_a_packet_that_is_too_big(script: Script) -> Test:
    """A SYN with data, which is to be forwarded over a path with a small MTU. A SYN alone is small enough."""
    far = "198.51.100.9"
    script.server.sysctl("ip_forward", 1)
    script.server.exec("ip", "route", "add", far, "dev", "veth0", "mtu", "lock", 300)
    script.server.exec("ip", "neighbour", "add", far, "lladdr", NOBODYS_MAC, "dev", "veth0")
    script.client.exec("ip", "route", "add", far, "via", script.server.ipv4)
    script.client.sysctl("tcp_fastopen", CLIENT | WITHOUT_COOKIE)
    made = script.client.process("client").socket()
    made.blocking(False)
    sent = made.send_to("x" * 400, far, PORT, may_fail=True)
    script.client.until_counter("TcpRetransSegs", 1)
    made.close()
    script.server.flush()
    after = script.server.counters()
    seen = yield
    rows = seen.rows(DROPS, script.server)
    assert (sent.ret, sent.errno) in ((400, "none"), (-1, "EINPROGRESS"))
    assert len(rows) == after.counters["IpFragFails"] == after.counters["IcmpOutDestUnreachs"] >= 1
    named = has_reasons(seen)
    for row in rows:
        assert (row["reason"], row["kind"]) == (("PKT_TOO_BIG", "LOST") if named else (None, None))
        assert (row["direction"], row["laddr"], row["raddr"]) == ("RECEIVED", far, script.client.ipv4)
        assert row["location"].startswith("ip_forward")
        assert row["packet_bytes"] > 300


@recorded(DROPS)
def test_a_full_queue_of_the_device(script: Script) -> Test:
    """It has no room for a single packet. All that the client sends is TCP: IPv6 is off there."""
    _, near, far = connection(script, 42105)
    script.client.sysctl("ipv6/conf/veth0/disable_ipv6", 1)
    client = near.process
    script.client.exec("tc", "qdisc", "replace", "dev", "veth0", "root", "pfifo", "limit", 0)
    for _ in range(3):
        near.send_all(1000)  # what has not left is tried again
    near.linger()
    near.close()
    state = script.client.exec("tc", "-s", "qdisc", "show", "dev", "veth0", "root")
    script.client.exec("tc", "qdisc", "del", "dev", "veth0", "root")
    far.linger()
    far.close()
    script.client.flush()
    seen = yield
    found = re.search(r"dropped (\d+)", unquote(state.data))
    assert found, state.data
    rows = seen.rows(DROPS, script.client, rport=PORT, direction="SENT")
    assert len(rows) == int(found[1]) >= 4
    assert [row["flags"] for row in rows if "RST" in row["flags"]] == ["RST|ACK"]
    tells_which_limit = seen.machine.kernel.enumerators("qdisc_drop_reason")
    named = "QDISC_DROP_GENERIC" if tells_which_limit else "QDISC_DROP" if has_reasons(seen) else None
    assert reasons(rows) == {named}
    for row in rows:
        assert (row["kind"], row["counter"]) == ("LOST", None)
        assert (row["lport"], row["raddr"]) == (42105, script.server.ipv4)
        assert (row["pid"], row["comm"], row["device"]) == (client.pid, client.comm, "veth0")


CHOSEN = Watch("drop", "--reason", "TCP_*,!TCP_CSUM", "--port", PORTS, every_kernel=False)
EXCLUDED = Watch("drop", "--reason", "!NO_SOCKET,!tcp_c*", "--port", PORTS, every_kernel=False)
STACKS = Watch("drop", "--reason", "NO_SOCKET", "--stack", "--port", PORTS, every_kernel=False)


@recorded(ALL, CHOSEN, EXCLUDED, STACKS)
def test_chosen_reasons(script: Script) -> Test:
    """The same packets for each run, and each shows its own."""
    client, server = script.client.ipv4, script.server.ipv4
    listener = script.server.process("server").listener(PORT)
    script.client.segment(client, 42106, server, PORT, wrong=1)
    script.client.segment(client, 42106, server, PORT, flags=RST)
    made = script.client.process("client").socket()
    made.connect(server, PORT + 1, may_fail=True)
    made.close()
    script.client.segment(client, 42106, server, PORT + 1, flags=ACK)
    script.server.flush()
    listener.close()
    after = script.server.counters()
    seen = yield
    if not has_reasons(seen):
        for watch in (CHOSEN, EXCLUDED, STACKS):
            run = seen.recording.runs[watch.name]
            assert (run.status, run.stdout) == (3, "")
            assert "this kernel gives no reasons; Linux does since 5.17" in run.stderr
        pytest.skip("this kernel gives no reasons")

    def those(watch: Watch) -> Rows:
        return [row | {"time": None, "stack": None} for row in seen.rows(watch, script.server)]

    rows = those(ALL)
    found = Counter(row["reason"] for row in rows)
    assert found["TCP_CSUM"] == after.counters["TcpInCsumErrors"] == 1
    assert found["NO_SOCKET"] == after.counters["TcpOutRsts"] == 2
    assert those(CHOSEN) == [row for row in rows if row["reason"].startswith("TCP_") and row["reason"] != "TCP_CSUM"]
    shown = [row for row in rows if row["reason"] not in ("NO_SOCKET", "TCP_CSUM") and row["kind"] != "HARMLESS"]
    assert those(EXCLUDED) == shown
    assert those(STACKS) == [row for row in rows if row["reason"] == "NO_SOCKET"]
    for row in seen.rows(STACKS, script.server):
        functions = [frame.partition("+")[0] for frame in row["stack"]]
        assert functions.index("tcp_v4_rcv") < functions.index("ip_local_deliver_finish"), row["stack"]


@pytest.mark.kernel
@pytest.mark.parametrize("words", [0, 4])
def test_an_ip_header_that_is_too_short(lab: Lab, run_tool: type[RunningTool], words: int) -> None:
    """Discarded where it is received, while it has its sender's socket. Nobody knows where its TCP header is."""
    packet = syn(lab.client.ipv4, 10_000, lab.server.ipv4, PORT, 1)
    packet = bytes([0x40 | words]) + packet[1:]
    mac = bytes.fromhex(lab.server.mac.replace(":", ""))
    with run_tool("drop", "--all", "--netns", str(lab.server.inode)) as tool:
        with lab.client.run(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)) as raw:
            raw.sendto(packet, (DEVICE, ETH_P_IP, 0, 0, mac))
        lab.flush()
        (row,) = tool.stop().rows
    assert (row["laddr"], row["raddr"]) == (lab.server.ipv4, lab.client.ipv4)
    assert (row["lport"], row["rport"], row["flags"]) == (None, None, None)


NETDEV = f"""add table netdev t
add chain netdev t c {{{{ type filter hook ingress device {DEVICE} priority 0; }}}}
add rule netdev t c tcp dport {PORT} {{verdict}}"""


@pytest.mark.kernel
@pytest.mark.parametrize("local", [PORT, PORT + 1])
def test_the_ingress_of_a_device(lab: Lab, run_tool: type[RunningTool], local: int) -> None:
    """Discarded while the packet has its sender's socket, whose local port may be the port that the packet is for."""
    lab.server.run(subprocess.run, ["nft", NETDEV.format(verdict="drop")], check=True)
    with run_tool("drop", "--lport", str(PORT), "--netns", str(lab.server.inode)) as tool:
        client = lab.client.socket(socket.AF_INET)
        client.bind((lab.client.ipv4, local))
        client.setblocking(False)
        client.connect_ex((lab.server.ipv4, PORT))
        lab.flush()
        rows = tool.stop().rows
    assert {(row["direction"], row["raddr"], row["rport"]) for row in rows} == {("RECEIVED", lab.client.ipv4, local)}
    assert {(row["pid"], row["cookie"], row["state"]) for row in rows} == {(None, None, None)}


HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
PADDING = bytes([1, 4, 0, 0, 0, 0])  # the option PadN


def with_extensions(packet: bytes, *types: int) -> bytes:
    """The IPv6 packet with these extension headers. Each second one has 16 bytes, the others 8."""
    added = b""
    for index, (kind, following) in enumerate(zip(types, [*types[1:], socket.IPPROTO_TCP], strict=True)):
        if kind == FRAGMENT:
            added += bytes([following, 0, 0, 0, 0, 0, 0, 1])  # the only one
        elif index % 2:
            added += bytes([following, 1]) + PADDING + bytes([1, 6]) + bytes(6)
        else:
            added += bytes([following, 0]) + PADDING
    (size,) = struct.unpack("!H", packet[4:6])
    return packet[:4] + struct.pack("!HB", size + len(added), types[0]) + packet[7:40] + added + packet[40:]


@pytest.mark.kernel
@pytest.mark.parametrize(
    "types", [(HOP_BY_HOP,), (DESTINATION,), (FRAGMENT,), (HOP_BY_HOP, DESTINATION, FRAGMENT, DESTINATION)]
)
@pytest.mark.parametrize("verdict", ["drop", ""])
def test_ipv6_extension_headers(lab: Lab, run_tool: type[RunningTool], verdict: str, types: tuple[int, ...]) -> None:
    """A firewall drops the SYN before its header is looked at, or the port is closed."""
    lab.server.run(subprocess.run, ["nft", NETDEV.format(verdict=f"counter {verdict}")], check=True)
    packets = [with_extensions(syn(lab.client.ipv6, port, lab.server.ipv6, PORT, 1), *types) for port in (4711, 4712)]
    with run_tool("drop", "--lport", str(PORT), "--netns", str(lab.server.inode)) as tool:
        with lab.client.run(raw_socket, socket.AF_INET6) as raw:
            for packet in packets:
                raw.sendto(packet, (lab.server.ipv6, 0))
        lab.flush()
        stopped = tool.stop()
        counted = lab.server.run(subprocess.run, ["nft", "list", "ruleset"], capture_output=True, text=True).stdout
    assert f"counter packets 2 bytes {2 * len(packets[0])}" in counted
    assert [(row["rport"], row["flags"]) for row in stopped.rows] == [(4711, "SYN"), (4712, "SYN")]
    assert {(row["laddr"], row["raddr"], row["packet_bytes"]) for row in stopped.rows} == {
        (lab.server.ipv6, lab.client.ipv6, len(packets[0]))
    }
    assert stopped.stats["missed"] == 0


@pytest.mark.kernel
def test_too_many_extension_headers(lab: Lab, run_tool: type[RunningTool]) -> None:
    """The kernel takes as many as it likes, and looks for the port. The tool says that it has not seen one."""
    packet = with_extensions(syn(lab.client.ipv6, 4711, lab.server.ipv6, PORT, 1), *[DESTINATION] * 9)
    with run_tool("drop", "--netns", str(lab.server.inode)) as tool:
        with lab.client.run(raw_socket, socket.AF_INET6) as raw:
            raw.sendto(packet, (lab.server.ipv6, 0))
        lab.flush()
        stopped = tool.stop()
    assert (stopped.rows, stopped.stats["missed"]) == ([], 1)


@pytest.mark.kernel
def test_an_ipv6_packet_that_is_too_big(lab: Lab, run_tool: type[RunningTool]) -> None:
    """To be forwarded over a path with the smallest MTU. A packet of exactly that size is forwarded."""
    far = "2001:db8:51::9"
    lab.server.sysctl("ipv6/conf/all/forwarding", 1)
    for host, command in (
        (lab.server, ["route", "add", far, "dev", DEVICE, "mtu", "lock", "1280"]),
        (lab.server, ["neighbour", "add", far, "lladdr", NOBODYS_MAC, "dev", DEVICE]),
        (lab.client, ["route", "add", far, "via", lab.server.ipv6]),
    ):
        host.run(subprocess.run, ["ip", "-6", *command], check=True)
    made = syn(lab.client.ipv6, 4711, far, PORT, 1)
    before = lab.server.counters()
    with run_tool("drop", "--lport", str(PORT), "--netns", str(lab.server.inode)) as tool:
        with lab.client.run(raw_socket, socket.AF_INET6) as raw:
            for size in (1280, 1281, 1400):
                packet = made[:4] + struct.pack("!H", size - 40) + made[6:]
                raw.sendto(packet + bytes(size - len(packet)), (far, 0))
        lab.flush()
        rows = tool.stop().rows
    after = lab.server.counters()
    named = bool(Kernel().enumerators("skb_drop_reason"))
    assert [row["packet_bytes"] for row in rows] == [1281, 1400]
    assert after["Ip6InTooBigErrors"] - before["Ip6InTooBigErrors"] == 2
    for row in rows:
        assert (row["reason"], row["kind"]) == (("PKT_TOO_BIG", "LOST") if named else (None, None))
        assert (row["direction"], row["laddr"], row["raddr"]) == ("RECEIVED", far, lab.client.ipv6)
        assert row["location"].startswith("ip6_forward")


def segment(source: str, sport: int, target: str, dport: int, sequence: int, acknowledged: int, data: bytes) -> bytes:
    """An IPv4 packet with an ACK and data."""
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!HHIIBBHHH", sport, dport, sequence, acknowledged, 5 << 4, ACK, 1000, 0, 0)
    pseudo = addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(header) + len(data))
    header = header[:16] + struct.pack("!H", checksum(pseudo + header + data)) + header[18:]
    return struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0) + addresses + header + data


def sequences(connection: socket.socket) -> tuple[int, int]:
    """The next sequence number that a socket sends, and the one it waits for."""
    TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, OFF_WITHOUT_PROBE = 19, 20, 21, -1
    found = []
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    for queue in (2, 1):  # TCP_SEND_QUEUE, TCP_RECV_QUEUE
        connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        found.append(connection.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_WITHOUT_PROBE)
    return found[0], found[1]


UNACKED, SND_WND = 24, 228  # where struct tcp_info has them


def in_tcp_info(connection: socket.socket, offset: int) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SND_WND + 4)
    return int(struct.unpack_from("I", info, offset)[0])


@pytest.mark.kernel
def test_data_that_begins_at_the_end_of_the_window(lab: Lab, run_tool: type[RunningTool]) -> None:
    """In the client's name. It passes tcp_sequence(), and tcp_data_queue() discards it."""
    lab.client.sysctl("tcp_timestamps", 0)
    listener = lab.server.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)  # so the kernel does not let it grow
    listener.bind((lab.server.ipv4, PORT))
    listener.listen()
    near = lab.client.socket(socket.AF_INET)
    near.connect((lab.server.ipv4, PORT))
    far, peer = listener.accept()
    near.sendall(bytes(100))
    assert far.recv(100, socket.MSG_WAITALL) == bytes(100)
    until(lambda: not in_tcp_info(near, UNACKED), "the window with the last ACK")
    following, answered = sequences(near)
    window = in_tcp_info(near, SND_WND)
    ends = lab.client.ipv4, peer[1], lab.server.ipv4, PORT
    with run_tool("drop", "--lport", str(PORT), "--netns", str(lab.server.inode)) as tool:
        with lab.client.run(raw_socket, socket.AF_INET) as raw:
            for number in (0, 1):
                raw.sendto(segment(*ends, following + window + number, answered, b"late"), (lab.server.ipv4, 0))
        lab.flush()
        rows = tool.stop().rows
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    assert [(row["raddr"], row["rport"], row["packet_bytes"]) for row in rows] == [(lab.client.ipv4, peer[1], 44)] * 2
    if Kernel().enumerators("skb_drop_reason"):
        assert [row["reason"] for row in rows] == ["TCP_OVERWINDOW", "TCP_INVALID_SEQUENCE"]
    assert {(row["kind"], row["state"], row["pid"]) for row in rows} == {("LOST", "ESTABLISHED", os.getpid())}


@pytest.mark.kernel
def test_a_count_for_which_the_reason_says_all(lab: Lab, run_tool: type[RunningTool]) -> None:
    """Then the program does not read the packets. Others on this machine may be discarded for the same reason."""
    packet = segment(lab.client.ipv4, 42111, lab.server.ipv4, PORT, 1, 1, b"data")
    with run_tool("drop", "--count", "--by", "reason,kind,counter,direction") as tool:
        with lab.client.run(raw_socket, socket.AF_INET) as raw:
            for _ in range(50):
                raw.sendto(packet[:-1] + b"!", (lab.server.ipv4, 0))
        lab.flush()
        rows = tool.stop().rows
    if not Kernel().enumerators("skb_drop_reason"):
        pytest.skip("this kernel gives no reasons")
    assert lab.server.counters()["TcpInCsumErrors"] == 50
    (row,) = [row for row in rows if row["reason"] == "TCP_CSUM"]
    assert (row["kind"], row["counter"], row["direction"]) == ("LOST", "TcpInCsumErrors", "RECEIVED")
    assert row["count"] >= 50
