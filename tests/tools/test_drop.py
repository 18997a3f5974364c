"""`tcpscope drop`: each packet of TCP that the kernel discards, why, and in which counter."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any
from urllib.parse import unquote

import pytest

from tests.record import PORTS, Call, Host, Script, Seen, Test, Watch, recorded
from tests.record.script import IPPROTO_TCP, SOL_SOCKET

DROPS = Watch("drop", "--port", PORTS)
ALL = Watch("drop", "--all", "--port", PORTS)
COUNTED = Watch("drop", "--count", "--by", "netns,reason,kind,counter", "--port", PORTS, every_kernel=False)
PORT = 8910
TCP_DEFER_ACCEPT = 9
SO_RCVBUF = 8
SYN, ACK = 2, 16
REJECT = "reject with tcp reset"

Rows = list[dict[str, Any]]


def rule(host: Host, hook: str, verdict: str, match: str = f"tcp dport {PORT}") -> None:
    """From now on the host's firewall counts what matches, and then decides so."""
    host.exec("nft", "add table inet filter")
    host.exec("nft", f"add chain inet filter {hook} {{ type filter hook {hook} priority 0 ; }}")
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


def reasons(rows: Rows) -> set[str | None]:
    return {row["reason"] for row in rows}


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
@pytest.mark.parametrize(("hook", "verdict"), [("prerouting", "drop"), ("input", "drop"), ("input", REJECT)])
@recorded(DROPS)
def test_a_firewall_that_drops_what_comes(script: Script, hook: str, family: str, verdict: str) -> Test:
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


@recorded(DROPS)
def test_final_acks_that_a_full_accept_queue_refuses(script: Script) -> Test:
    """All SYNs are answered before listen() makes the queue shorter, so none is refused."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT, backlog=16)
    made = [client.socket() for _ in range(4)]
    with script.server.held():
        for each in made:
            each.start(script.server.ipv4, PORT)
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
    if (
        has_reasons(seen)
        and "SKB_DROP_REASON_TCP_LISTEN_OVERFLOW" in seen.machine.kernel.enumerators("skb_drop_reason").values()
    ):
        assert reasons(rows) == {"TCP_LISTEN_OVERFLOW"}
    for row in rows:
        assert (row["kind"], row["counter"]) == ("REFUSED", "TcpExtListenOverflows")
        assert (row["state"], row["pid"], row["comm"]) == ("LISTEN", server.pid, server.comm)
        assert (row["laddr"], row["lport"], row["raddr"]) == (script.server.ipv4, PORT, script.client.ipv4)


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
    if not tells_receiver(seen):
        return  # the route and the device are no longer in the packet: the namespace is not known
    rows = seen.rows(DROPS, script.server, rport=local.ret, reason="PROTO_MEM")
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
    if not tells_receiver(seen):
        return
    rows = seen.rows(DROPS, script.server, rport=local.ret, reason="TCP_INVALID_SYN")
    assert [(row["kind"], row["flags"], row["counter"], row["state"], row["comm"]) for row in rows] == [
        ("LOST", "SYN", "TcpExtTCPSYNChallenge", "ESTABLISHED", server.comm)
    ] * 3
