"""`tcpscope retrans`: every segment that is sent again, as the kernel counts them, and what made it so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import accumulate
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any

import pytest

from tcpscope.request import Request
from tcpscope.tool import Stream, find
from tests.record import Call, Script, Seen, Test, Watch, recorded
from tests.record.script import Process, Socket
from tests.tools.pair import exchange, pair, without_timers

PORT = 6711
RETRANS = Watch("retrans", "--port", f"{PORT}")
SEGMENTS_OF = {"FAST": "TcpExtTCPFastRetrans", "SLOW_START": "TcpExtTCPSlowStartRetrans"}
COUNTERS = ("TcpRetransSegs", "TcpExtTCPTimeouts", "TcpExtTCPLossProbes", *SEGMENTS_OF.values())
NOT_KNOWN = 0x7FFFFFFF  # TCP_INFINITE_SSTHRESH
ACK = 16
BACKOFF = 4  # where TCP_INFO has it
COUNTED = Watch("retrans", "--count", "--by", "netns,kind,state", "--port", f"{PORT}")


def connection(script: Script) -> tuple[Process, Socket, Socket, Call]:
    """The client's process, both sockets and the local port. 100 bytes have been sent and acknowledged."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    return made.client, *made.ends


def us_between(first: dict[str, Any], last: dict[str, Any]) -> float:
    return (datetime.fromisoformat(last["time"]) - datetime.fromisoformat(first["time"])) / timedelta(microseconds=1)


@recorded(RETRANS)
def test_data(script: Script) -> Test:
    """The tail is probed, then the RTO runs out, until the link is there again."""
    client, near, far, local = connection(script)
    before = {name: script.client.counter(name) for name in COUNTERS}
    with script.client.losing():
        near.send_all(3000)
        near.until_field("retrans", 3)
        during = near.info()
    far.read(3000)
    near.until_acknowledged()
    last = near.info()
    after = {name: script.client.counter(name) for name in before}
    seen = yield
    rows = [row for row in seen.rows(RETRANS, script.client, lport=local.ret) if row["errno"] == "none"]
    assert {(row["pid"], row["comm"]) for row in rows} == {(client.pid, client.comm)}
    assert {(row["raddr"], row["rport"], row["state"]) for row in rows} == {(script.server.ipv4, PORT, "ESTABLISHED")}
    assert sum(row["segs"] for row in rows) == last.info["retrans"]
    assert last.info["retrans"] == after["TcpRetransSegs"].ret - before["TcpRetransSegs"].ret
    counted = {name: after[name].ret - before[name].ret for name in COUNTERS}
    for kind, name in SEGMENTS_OF.items():
        assert sum(row["segs"] for row in rows if row["kind"] == kind) == counted[name], kind
    assert sum(row["kind"] == "RTO" for row in rows) == counted["TcpExtTCPTimeouts"] >= 1
    probes = sum(row["kind"] == "LOSS_PROBE" for row in rows)
    assert probes == counted["TcpExtTCPLossProbes"]  # all was sent: none sends new data
    assert {row["kind"] for row in rows} <= {"RTO", "LOSS_PROBE", *SEGMENTS_OF}
    assert {row["ca_state"] for row in rows if row["kind"] in ("RTO", "SLOW_START")} == {"Loss"}  # tcp_enter_loss()
    assert {row["ca_state"] for row in rows if row["kind"] == "LOSS_PROBE"} <= {"Open", "Disorder", "CWR"}
    assert {row["ca_state"] for row in rows if row["kind"] == "FAST"} <= {"Recovery"}
    assert all(0 < row["data_bytes"] <= 3000 for row in rows)
    assert all(100 <= row["offset"] < row["offset"] + row["data_bytes"] <= 3100 for row in rows)
    assert {row["offset"] for row in rows if row["kind"] == "RTO"} >= {100}
    sent = list(accumulate(row["segs"] for row in rows))
    then = rows[sent.index(during.info["retrans"])]  # the last one before the application looked
    doubled = then["kind"] == "RTO"  # after that
    assert (then["cwnd"], then["lost_segs"], then["sacked_segs"], then["backoff"] + doubled) == tuple(
        during.info[name] for name in ("cwnd", "lost", "sacked", "backoff")
    )
    assert then["ssthresh"] == (during.info["ssthresh"] if during.info["ssthresh"] < NOT_KNOWN else None)
    assert then["rto_us"] << doubled == during.info["rto_us"]
    assert (then["srtt_us"], then["since_us"]) == (during.info["srtt_us"], None)


@recorded(RETRANS, COUNTED)
def test_handshakes(script: Script) -> Test:
    """The SYN-ACKs are lost: the client repeats its SYN, and the listener answers."""
    server, client = script.server.process("server"), script.client.process("client")
    server.listener(PORT)
    with script.server.losing():
        near = client.socket()
        connecting = near.connect(script.server.ipv4, PORT, wait=False)
        for host in script.hosts:
            host.until_counter("TcpRetransSegs", 1)
    connecting.join()
    again = {host: host.counter("TcpRetransSegs") for host in script.hosts}
    handshakes = {host: host.counter("TcpExtTCPSynRetrans") for host in script.hosts}
    local = near.name()
    seen = yield
    syns = seen.rows(RETRANS, script.client, lport=local.ret, kind="SYN")
    answers = seen.rows(RETRANS, script.server, rport=local.ret)
    for row in syns:
        assert (row["comm"], row["state"], row["segs"], row["data_bytes"]) == (client.comm, "SYN_SENT", 1, 0)
    for row in answers:
        assert (row["kind"], row["comm"], row["state"], row["segs"]) == ("SYNACK", server.comm, "SYN_RECV", 1)
        assert row["ca_state"] is None
        assert (row["laddr"], row["lport"], row["raddr"]) == (script.server.ipv4, PORT, script.client.ipv4)
    assert len(syns) == again[script.client].ret >= 1
    assert len(answers) == again[script.server].ret >= 1
    assert [handshakes[host].ret for host in script.hosts] == [again[host].ret for host in script.hosts]
    for host, kind, rows in ((script.client, "SYN", syns), (script.server, "SYNACK", answers)):
        counted = [(row["kind"], row["count"], row["segs"]) for row in seen.rows(COUNTED, host)]
        assert [group for group in counted if group[0] != "SPURIOUS"] == [(kind, len(rows), len(rows))]
    # The first SYN had arrived: its time stamp is echoed (tcp_try_undo_spurious_syn()).
    spurious = [(row["comm"], row["segs"]) for row in seen.rows(RETRANS, lport=local.ret, kind="SPURIOUS")]
    assert spurious == ([(client.comm, len(syns))] if seen.machine.hook("retrans", "undone") else [])


@recorded(RETRANS)
def test_a_lost_syn(script: Script) -> Test:
    """It was needed again."""
    server, client = script.server.process("server"), script.client.process("client")
    server.listener(PORT)
    near = client.socket()
    with script.client.losing():
        connecting = near.connect(script.server.ipv4, PORT, wait=False)
        script.client.until_counter("TcpRetransSegs", 1)
    connecting.join()
    local, again = near.name(), script.client.counter("TcpRetransSegs")
    near.send_all(10)
    near.until_acknowledged()
    seen = yield
    rows = seen.rows(RETRANS, script.client, lport=local.ret)
    assert [row["kind"] for row in rows] == ["SYN"] * again.ret
    assert {row["offset"] for row in rows} == {None}


UNDONE = ("TcpExtTCPFullUndo", "TcpExtTCPPartialUndo", "TcpExtTCPLossUndo")
BY_DSACK = "TcpExtTCPDSACKUndo"


@recorded(RETRANS)
def test_it_was_not_needed(script: Script) -> Test:
    """The ACKs are late: the RTO runs out, and then they say that everything had arrived."""
    client, near, _, local = connection(script)
    before = {name: script.client.counter(name) for name in UNDONE}
    with script.server.held():
        near.send_all(3000)
        near.until_field("retrans", 2)
    near.until_acknowledged()
    for _ in range(2):
        near.send_all(10)
        near.until_acknowledged()
    after = {name: script.client.counter(name) for name in UNDONE}
    seen = yield
    rows = seen.rows(RETRANS, script.client, lport=local.ret)
    spurious = [row for row in rows if row["kind"] == "SPURIOUS"]
    if not seen.machine.hook("retrans", "undone"):
        assert not seen.machine.kernel.has_typedef("btf_trace_tcp_cong_state_set") and not spurious
        return
    assert len(spurious) == sum(after[name].ret - before[name].ret for name in UNDONE) >= 1
    first = next(row for row in rows if row["kind"] == "RTO")
    last = spurious[0]
    assert (last["pid"], last["comm"], last["offset"]) == (client.pid, client.comm, first["offset"])
    assert abs(last["since_us"] - us_between(first, last)) <= 1
    again = rows[rows.index(first) : rows.index(last)]
    assert last["segs"] == sum(row["segs"] for row in again)
    assert last["ca_state"] in ("Open", "Disorder")


@recorded(RETRANS)
def test_duplicate_acks_without_a_loss(script: Script) -> Test:
    """They come in the server's name, as if it had got segments in another order. Its own ACK is late, and undoes."""
    for host in script.hosts:
        host.sysctl("tcp_sack", 0)
    without_timers(script)
    client, near, far, local = connection(script)
    following, answered = near.sequence("send"), near.sequence("receive")
    before = script.client.counters()
    ends = script.server.ipv4, PORT, script.client.ipv4, local
    with far.locked():
        near.send_all(5000)
        script.server.flush()
        client.pause(5000)  # time stamps count milliseconds
        with script.client.losing():  # the ACK is for what came first
            for _ in range(4):  # the first one opens the window, which makes it no duplicate
                script.server.segment(*ends, answered, following, flags=ACK)
            near.until_field("retrans", 1)
    far.read(5000)
    near.until_acknowledged()
    near.send_all(10)  # without SACK it stays in Recovery until newer data is acknowledged
    near.until_acknowledged()
    over, last, after = near.until_field("ca_state", 0, "=="), near.info(), script.client.counters()
    seen = yield
    rows = seen.rows(RETRANS, script.client, lport=local.ret)
    counted = after.counters - before.counters
    assert over.ret == counted["TcpExtTCPTimeouts"] == counted["TcpExtTCPLossProbes"] == 0
    again = [row for row in rows if row["kind"] != "SPURIOUS"]
    assert {(row["kind"], row["ca_state"], row["errno"]) for row in again} == {("FAST", "Recovery", "none")}
    assert sum(row["segs"] for row in again) == counted["TcpRetransSegs"] == last.info["retrans"]
    assert sum(row["segs"] for row in again) == counted["TcpExtTCPFastRetrans"] >= counted["TcpExtTCPRenoRecovery"] == 1
    assert again[0]["offset"] == 100
    check_undone(seen, rows, counted)


def check_undone(seen: Seen, rows: list[dict[str, Any]], counted: Counter[str], least: int = 1) -> None:
    """A row for each time that the kernel has taken its reaction back."""
    undone = [row for row in rows if row["kind"] == "SPURIOUS"]
    if not seen.machine.hook("retrans", "undone"):
        assert not seen.machine.kernel.has_typedef("btf_trace_tcp_cong_state_set") and not undone
        return
    by_ack = sum(counted[name] for name in UNDONE)
    assert by_ack <= len(undone) <= by_ack + counted[BY_DSACK]  # those in Recovery
    assert len(undone) >= least
    for row in undone:
        assert row["ca_state"] in ("Open", "Disorder")
        before = rows[: rows.index(row)]
        first = next(other for other in before if abs(row["since_us"] - us_between(other, row)) <= 1)
        assert (first["kind"] in ("FAST", "RACK_TIMEOUT"), first["offset"]) == (True, row["offset"])
        assert row["segs"] == sum(other["segs"] for other in before[before.index(first) :])


@recorded(RETRANS)
def test_reordering(script: Script) -> Test:
    """In a queue of this host every fifth packet overtakes four others: they count as lost, and are still there."""
    script.client.sysctl("tcp_early_retrans", 0)  # a loss probe that is not sent counts as well
    client, near, far, local = connection(script)
    near.option(IPPROTO_TCP, TCP_NODELAY, 1)
    netem = "netem", "delay", "50ms", "reorder", "100%", "gap", 5
    reordering = script.client.exec("tc", "qdisc", "replace", "dev", "veth0", "root", *netem, may_fail=True)
    before = script.client.counters()
    receiving = far.read(60_000, wait=False)
    for _ in range(60):
        near.send_all(1000)
    receiving.join()
    near.until_acknowledged()
    last, after = near.info(), script.client.counters()
    seen = yield
    if reordering.ret:
        assert seen.machine.config["netem"] == "no"
        pytest.skip("this kernel is built without sch_netem")
    rows = seen.rows(RETRANS, script.client, lport=local.ret, state="ESTABLISHED")
    counted = after.counters - before.counters
    assert counted["TcpExtTCPSACKReorder"] >= 1
    segs = Counter[str]()
    for row in rows:
        segs[row["kind"]] += row["segs"]
    del segs["SPURIOUS"]
    assert segs.total() == counted["TcpRetransSegs"] == last.info["retrans"]
    assert segs["FAST"] + segs["RACK_TIMEOUT"] == counted["TcpExtTCPFastRetrans"]
    assert segs["SLOW_START"] == counted["TcpExtTCPSlowStartRetrans"]
    assert sum(row["kind"] == "RTO" for row in rows) == counted["TcpExtTCPTimeouts"]
    assert segs["LOSS_PROBE"] == counted["TcpExtTCPLossProbes"] == 0
    assert {row["comm"] for row in rows} <= {client.comm}
    assert counted["TcpExtTCPSpuriousRtxHostQueues"] >= 1
    if seen.machine.kernel.has_type("trace_event_raw_tcp_retransmit_skb"):
        assert sum(row["errno"] == "EBUSY" for row in rows) == counted["TcpExtTCPSpuriousRtxHostQueues"]
    check_undone(seen, rows, counted, least=0)


class Detour:
    """What the server receives passes a link within it first. There it waits, or is put into another order.

    The client's host knows nothing of it: it has sent the segment, and may send it again.
    """

    def __init__(self, script: Script) -> None:
        self.script, self.address, self.mac = script, script.server.ipv4, "02:00:c0:00:02:77"
        self.local = "local", self.address, "dev", "veth0", "table", "local"
        self.ip("link", "add", "out", "type", "veth", "peer", "name", "in", "address", self.mac)
        for name, value in {
            "ip_forward": 1,
            "tcp_early_demux": 0,  # what has found its socket is not forwarded
            "conf/all/rp_filter": 0,
            "conf/in/rp_filter": 0,
            "neigh/out/mcast_solicit": 0,
            "neigh/out/app_solicit": 10_000,
        }.items():
            script.server.sysctl(f"ipv4/{name}", value)
        for name in ("in", "out"):
            self.ip("link", "set", name, "up")
        self.ip("rule", "add", "iif", "in", "lookup", 100)
        self.ip("route", "add", "local", self.address, "dev", "lo", "table", 100)
        self.ip("route", "add", self.address, "dev", "out")

    def ip(self, *words: object) -> Call:
        return self.script.server.exec("ip", *words)

    def close(self) -> None:
        """From now on what the client sends takes it. Until `release()` it waits there."""
        self.ip("route", "del", *self.local)

    def open(self) -> None:
        self.ip("route", "add", *self.local)

    @contextmanager
    def taken(self) -> Iterator[None]:
        self.close()
        yield
        self.script.server.flush()
        self.open()

    def release(self) -> None:
        self.ip("neighbour", "replace", self.address, "lladdr", self.mac, "dev", "out")


@pytest.mark.parametrize("stamped", [True, False], ids=["time stamps", "none"])
@recorded(RETRANS)
def test_a_segment_that_many_others_overtake(script: Script, stamped: bool) -> Test:
    """The client sends it again. Then the first one arrives, and at last the second, which the server answers by DSACK.

    With time stamps the ACK of the first one shows it already. Without them the DSACK does, when Recovery is over.
    """
    script.client.sysctl("tcp_timestamps", int(stamped))
    without_timers(script)
    client, near, far, local = connection(script)
    detour = Detour(script)
    before = script.client.counters()
    with detour.taken():
        near.send_all(1000)
    with script.server.held():
        for _ in range(5):
            near.send_all(1000)
        client.pause(5000)  # time stamps count milliseconds
        script.server.flush()
        detour.close()
    near.until_field("retrans", 1)
    script.server.flush()
    detour.open()
    detour.release()
    far.read(6000)
    near.until_acknowledged()
    script.client.until_counter("TcpExtTCPDSACKRecv", 1)
    over, last = near.until_field("ca_state", 0, "=="), near.info()
    after = script.client.counters()
    seen = yield
    rows = seen.rows(RETRANS, script.client, lport=local.ret)
    counted = after.counters - before.counters
    assert over.ret == counted["TcpExtTCPTimeouts"] == counted["TcpExtTCPLossProbes"] == 0
    assert (rows[0]["kind"], rows[0]["offset"], rows[0]["segs"]) == ("FAST", 100, 1)
    assert [row["kind"] for row in rows] == ["FAST", "SPURIOUS"][: len(rows)]
    assert counted["TcpRetransSegs"] == counted["TcpExtTCPDSACKRecv"] == last.info["retrans"] == 1
    assert (counted["TcpExtTCPFullUndo"], counted[BY_DSACK]) == ((1, 0) if stamped else (0, 1))
    check_undone(seen, rows, counted, least=int(stamped))
    assert stamped or len(rows) == 1


@recorded(RETRANS)
def test_many_segments_in_another_order(script: Script) -> Test:
    """Behind the client's host every fourth packet overtakes those of 30 ms: the kernel takes them for lost."""
    without_timers(script)
    _, near, far, local = connection(script)
    detour = Detour(script)
    detour.release()
    script.client.exec("ip", "link", "set", "veth0", "gso_max_segs", 1)
    netem = "netem", "delay", "30ms", "reorder", "100%", "gap", 4
    reordering = script.server.exec("tc", "qdisc", "replace", "dev", "out", "root", *netem, may_fail=True)
    before = script.client.counters()
    with detour.taken():
        receiving = far.read(200_000, wait=False)
        near.send_all(200_000)
        receiving.join()
        near.until_acknowledged()
    over, last = near.until_field("ca_state", 0, "=="), near.info()
    after = script.client.counters()
    seen = yield
    if reordering.ret:
        assert seen.machine.config["netem"] == "no"
        pytest.skip("this kernel is built without sch_netem")
    rows = seen.rows(RETRANS, script.client, lport=local.ret, state="ESTABLISHED")
    counted = after.counters - before.counters
    assert over.ret == counted["TcpExtTCPTimeouts"] == counted["TcpExtTCPLossProbes"] == 0
    again = [row for row in rows if row["kind"] != "SPURIOUS"]
    assert {row["kind"] for row in again} <= {"FAST", "RACK_TIMEOUT"}
    assert sum(row["segs"] for row in again) == counted["TcpRetransSegs"] == last.info["retrans"] >= 1
    assert counted["TcpExtTCPFastRetrans"] == counted["TcpRetransSegs"]
    assert counted["TcpExtTCPDSACKRecv"] >= 1
    check_undone(seen, rows, counted)


def spurious(seen: Any, script: Script) -> list[dict[str, Any]]:
    return [row for host in script.hosts for row in seen.rows(RETRANS, host, kind="SPURIOUS")]


@recorded(RETRANS)
def test_the_socket_is_gone(script: Script) -> Test:
    """Sockets end while their SYN counts as lost. A child that gets such an address begins in the state Open."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    with script.client.losing():
        gone = [client.socket() for _ in range(8)]
        for near in gone:
            near.start(script.server.ipv4, PORT)
        script.client.until_counter("TcpRetransSegs", len(gone))
        for near in gone:
            near.close()
    for _ in range(16):
        client.socket().connect(script.server.ipv4, PORT)
        listener.accept()
    seen = yield
    assert not spurious(seen, script)


@recorded(RETRANS)
def test_a_lost_probe(script: Script) -> Test:
    """The episode before has ended, and its marker is cleared when this host drops a segment of its own."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    near = client.socket()
    near.connect(script.server.ipv4, PORT)
    near.option(IPPROTO_TCP, TCP_NODELAY, 1)
    far = listener.accept()
    near.send_all(100)
    far.read(100)
    with script.client.losing():
        near.send_all(3000)
        near.until_field("retrans", 2)
    far.read(3000)
    near.until_acknowledged()
    before = near.field("retrans")
    with script.client.losing():
        near.send_all(3000)
        near.until_field("retrans", before + 1)
        dropping = "tc", "qdisc", "replace", "dev", "veth0", "root", "pfifo", "limit", "0"
        script.client.exec(*dropping, may_fail=True)
        near.send_all(10)
        script.client.exec("tc", "qdisc", "del", "dev", "veth0", "root", may_fail=True)
    far.read(3010)
    near.until_acknowledged()
    seen = yield
    assert not spurious(seen, script)


@recorded(RETRANS)
def test_the_original_has_not_left(script: Script) -> Test:
    """The segment still waits in this host's queue when the RTO runs out: nothing is sent again."""
    client, near, _, local = connection(script)
    with script.client.held():
        near.send_all(1000)
        client.until("info", near.slot, BACKOFF, 1, op=">=", value=2)
        during = near.info()
    near.until_acknowledged()
    seen = yield
    rows = seen.rows(RETRANS, script.client, lport=local.ret)
    assert during.info["retrans"] == 0
    if seen.machine.kernel.has_type("trace_event_raw_tcp_retransmit_skb"):
        assert {(row["errno"], row["segs"]) for row in rows} == {("EBUSY", 0)}
        assert sum(row["kind"] == "RTO" for row in rows) >= 2
    else:
        assert not rows


@recorded(RETRANS)
def test_a_full_queue_of_this_host(script: Script) -> Test:
    """The segment is lost, and the device's queue has no room for its retransmissions. The kernel counts those, too."""
    _, near, far, local = connection(script)
    names = ("TcpRetransSegs", "TcpExtTCPRetransFail")
    before = {name: script.client.counter(name) for name in names}
    with script.client.losing():
        near.send_all(1000)
        script.client.exec("tc", "qdisc", "replace", "dev", "veth0", "root", "pfifo", "limit", 0)
        script.client.until_counter(names[1], before[names[1]] + 2)
        script.client.exec("tc", "qdisc", "replace", "dev", "veth0", "root", "pfifo", "limit", 1000)
    far.read(1000)
    near.until_acknowledged()
    after = {name: script.client.counter(name) for name in names}
    seen = yield
    rows = seen.rows(RETRANS, script.client, lport=local.ret)
    segs, failed = (after[name].ret - before[name].ret for name in names)
    assert sum(row["segs"] for row in rows) == segs - failed >= 1
    without_room = [row for row in rows if row["errno"] == "ENOBUFS"]
    assert {row["errno"] for row in rows} <= {"none", "ENOBUFS"}
    if seen.machine.kernel.has_type("trace_event_raw_tcp_retransmit_skb"):
        assert len(without_room) == failed >= 2
        assert {row["segs"] for row in without_room} == {0}
    else:
        assert not without_room


LOSS = "table inet loss { chain in { type filter hook input priority 0; tcp dport %d numgen inc mod %d 1 drop; }; }"


def every_one_lost(script: Script, modulus: int) -> Call:
    """From now on the server's firewall drops one packet of so many. `ret` is not 0 without nftables."""
    return script.server.exec("nft", LOSS % (PORT, modulus), may_fail=True)


@recorded(RETRANS, COUNTED)
def test_every_fifth_is_lost(script: Script) -> Test:
    """Each kind is what the kernel counts, as rows and as groups."""
    _, near, far, local = connection(script)
    dropping = every_one_lost(script, 5)
    before = script.client.counters()
    receiving = far.read(300_000, wait=False)
    near.send_all(300_000)
    receiving.join()
    near.until_acknowledged()
    last, after = near.info(), script.client.counters()
    seen = yield
    if dropping.ret:
        pytest.skip("this kernel has no nftables with numgen")
    rows = seen.rows(RETRANS, script.client, lport=local.ret, state="ESTABLISHED")  # the FIN may be dropped, too
    rows = [row for row in rows if row["kind"] != "SPURIOUS"]
    sent = [row for row in rows if row["errno"] == "none"]
    counted = after.counters - before.counters
    segs = Counter[str]()
    for row in sent:
        segs[row["kind"]] += row["segs"]
    assert segs.total() == counted["TcpRetransSegs"] == last.info["retrans"] >= 10
    assert segs["FAST"] + segs["RACK_TIMEOUT"] == counted["TcpExtTCPFastRetrans"] >= 1
    assert segs["SLOW_START"] == counted["TcpExtTCPSlowStartRetrans"]
    assert sum(row["kind"] == "RTO" for row in rows) == counted["TcpExtTCPTimeouts"]
    assert sum(row["kind"] == "LOSS_PROBE" for row in rows) <= counted["TcpExtTCPLossProbes"]  # one may send new data
    assert all(100 <= row["offset"] < row["offset"] + row["data_bytes"] <= 300_100 for row in rows)
    groups = {
        row["kind"]: (row["count"], row["segs"])
        for row in seen.rows(COUNTED, script.client)
        if row["state"] == "ESTABLISHED"
    }
    of_all = Counter(row["kind"] for row in rows)
    assert {kind: groups[kind] for kind in of_all} == {
        kind: (of_all[kind], sum(row["segs"] for row in rows if row["kind"] == kind)) for kind in of_all
    }


@pytest.mark.parametrize(
    ("options", "skipped"),
    [
        ({"count": False, "by": None}, ()),
        ({"count": True, "by": None}, ()),
        ({"count": True, "by": "comm, kind"}, ()),
        ({"count": True, "by": "comm"}, ("undone",)),
    ],
)
def test_groups_count_retransmissions(options: dict[str, Any], skipped: tuple[str, ...]) -> None:
    tool = find("retrans")
    assert isinstance(tool, Stream)
    assert tool.skip(Request(options=options)) == skipped
