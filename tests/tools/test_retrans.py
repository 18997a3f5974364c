"""`tcpscope retrans`: every segment that is sent again, as the kernel counts them, and what made it so."""

from __future__ import annotations

from tests.record import Script, Test, Watch, recorded

PORT = 6711
RETRANS = Watch("retrans", "--port", f"{PORT}")
SEGMENTS_OF = {"FAST": "TcpExtTCPFastRetrans", "SLOW_START": "TcpExtTCPSlowStartRetrans"}
COUNTERS = ("TcpRetransSegs", "TcpExtTCPTimeouts", *SEGMENTS_OF.values())
COUNTED = Watch("retrans", "--count", "--by", "netns,kind", "--port", f"{PORT}")


@recorded(RETRANS)
def test_data(script: Script) -> Test:
    """The tail is probed, then the RTO runs out, until the link is there again."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    near = client.socket()
    near.connect(script.server.ipv4, PORT)
    far = listener.accept()
    local = near.name()
    near.send_all(100)
    far.read(100)
    before = {name: script.client.counter(name) for name in COUNTERS}
    with script.client.losing():
        near.send_all(3000)
        near.until_field("retrans", 3)
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
    assert {row["kind"] for row in rows} <= {"RTO", "LOSS_PROBE", *SEGMENTS_OF}
    assert {row["ca_state"] for row in rows if row["kind"] in ("RTO", "SLOW_START")} == {"Loss"}  # tcp_enter_loss()
    assert {row["ca_state"] for row in rows if row["kind"] == "LOSS_PROBE"} <= {"Open", "Disorder", "CWR"}
    assert {row["ca_state"] for row in rows if row["kind"] == "FAST"} <= {"Recovery"}
    assert all(0 < row["data_bytes"] <= 3000 for row in rows)


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
    for host, kind, rows in ((script.client, "SYN", syns), (script.server, "SYNACK", answers)):
        counted = [(row["kind"], row["count"], row["segs"]) for row in seen.rows(COUNTED, host)]
        assert counted == [(kind, len(rows), len(rows))]
