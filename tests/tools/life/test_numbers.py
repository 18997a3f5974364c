"""Numbers, times, owners and what is older than the tool, against TCP_INFO and the programs' clocks."""

from __future__ import annotations

import pytest

from tests.record import Call, Script, Test, recorded
from tests.record.script import IPPROTO_TCP, TCP_FASTOPEN
from tests.tools.life.site import LIFE, PORT, TFO_WITHOUT_COOKIES, Pair, Row, check_end, check_numbers, ended


@recorded(LIFE)
def test_retransmissions(script: Script) -> Test:
    """Data that had to be sent twice counts once as acknowledged."""
    pair = Pair(script)
    pair.exchange()
    with script.client.losing():
        pair.client.socket.send_all(3000)
        pair.client.socket.until_field("retrans", 1)
    pair.server.socket.read(3000)
    infos = pair.both_shut_down()
    seen = yield
    for role, last in infos.items():
        row = pair.row(seen, role)
        check_numbers(row, last.info)
        assert (row["syn_retrans"], row["end"]) == (pair.syn_retrans(role), "FIN")
    row = pair.row(seen, "ACTIVE")
    assert row["retrans"] >= 1
    assert row["acked_bytes"] == 8000 < row["tx_bytes"]


@recorded(LIFE)
def test_what_could_not_leave(script: Script) -> Test:
    """Data that this host threw away itself was sent, for the kernel, and not retransmitted."""
    pair = Pair(script)
    pair.exchange()
    script.client.exec("ip", "route", "add", "unreachable", f"{script.server.ipv4}/32")
    pair.client.socket.send_all(3000)
    thrown_away = pair.client.socket.info()
    script.client.exec("ip", "route", "del", "unreachable", f"{script.server.ipv4}/32")
    pair.server.socket.read(3000)
    infos = pair.both_shut_down()
    seen = yield
    assert thrown_away.info["tx_bytes"] > 5000
    for role, last in infos.items():
        check_numbers(pair.row(seen, role), last.info)
    assert pair.row(seen, "ACTIVE")["acked_bytes"] == pair.row(seen, "PASSIVE")["rx_bytes"] == 8000


@recorded(LIFE)
def test_a_lost_handshake(script: Script) -> Test:
    """The SYN-ACK is lost: both ends repeat theirs."""
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(PORT)
    with script.server.losing():
        near = client.socket()
        connecting = near.connect(script.server.ipv4, PORT, wait=False)
        for host in script.hosts:
            host.until_counter("TcpRetransSegs", 1)
        healed = server.now()  # without a SYN-ACK there was no ACK, and so is no child yet
    connecting.join()
    local = near.name()
    far = listener.accept()
    opens = {"ACTIVE": near.info(), "PASSIVE": far.info()}
    for made in (near, far):
        made.shutdown()
    ends = {}
    for role, made in (("ACTIVE", near), ("PASSIVE", far)):
        ends[role] = made.until_state("CLOSE"), made.info()
        made.close()
    seen = yield
    rows = {
        "ACTIVE": ended(seen, script.client, lport=local.ret, rport=PORT),
        "PASSIVE": ended(seen, script.server, lport=PORT, rport=local.ret),
    }
    for role, row in rows.items():
        assert row["syn_retrans"] == opens[role].info["retrans"] > 0
        assert row["retrans"] == ends[role][1].info["retrans"]
    assert 1_000_000 <= rows["ACTIVE"]["handshake_us"] <= connecting.took_us
    assert rows["PASSIVE"]["handshake_us"] is None
    # Since the end of the handshake, not since the SYN.
    assert rows["PASSIVE"]["duration_us"] <= ends["PASSIVE"][0].end_us - healed.begin_us + 1


@recorded(LIFE)
def test_a_slow_handshake(script: Script) -> Test:
    """The SYN-ACK is kept back for a time that the programs' clock measures.

    Of three handshakes at least one is without a repeated SYN or SYN-ACK: on a busy machine a second may pass.
    """
    server, client = script.server.process("server"), script.client.process("client")
    tried = []
    for port in range(PORT, PORT + 3):
        listener = server.listener(port, script.server.ipv6)
        before = script.server.counter("TcpOutSegs")
        with script.server.held():
            near = client.socket("6")
            connecting = near.connect(script.server.ipv6, port, wait=False)
            script.server.until_sockets(state="SYN_RECV", lport=port)
            script.server.until_counter("TcpOutSegs", before + 1)  # the SYN-ACK
            waited = server.pause(50_000)
        connecting.join()
        local = near.name()
        far = listener.accept()
        tried.append((port, local, connecting, waited, near.info(), far.info()))
        near.close(), far.close()
        script.client.until_sockets(0, "==", lport=local, state="FIN_WAIT1")
        script.server.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    undisturbed = 0
    for port, local, connecting, waited, at_client, at_server in tried:
        repeated = [info.info["retrans"] for info in (at_client, at_server)]
        rows = [
            ended(seen, script.client, lport=local.ret, rport=port),
            ended(seen, script.server, lport=port, rport=local.ret),
        ]
        assert [row["syn_retrans"] for row in rows] == repeated
        if any(repeated):
            continue
        undisturbed += 1
        assert all(waited.took_us <= row["handshake_us"] for row in rows)
        assert rows[0]["handshake_us"] <= connecting.took_us  # at the server it ends a little later
    assert undisturbed > 0


@pytest.mark.parametrize("way", ["fin", "reset"])
@recorded(LIFE)
def test_older_than_the_tool(script: Script, way: str) -> Test:
    """Bytes from the start, the role by arithmetic, and no times."""
    with script.older():
        pair = Pair(script)
        pair.exchange(5000, 700)
        before = {end.role: end.socket.info() for end in pair.ends}
    if way == "fin":
        pair.client.socket.shutdown()
        pair.server.socket.until_state("CLOSE_WAIT")
        pair.server.socket.shutdown()
    else:
        pair.server.socket.linger(0)
        pair.server.socket.close()
    at_end = {}
    for end in (pair.client,) if way == "reset" else pair.ends:
        end.socket.until_state("CLOSE")
        at_end[end.role] = end.socket.info()
        end.socket.close()
    seen = yield
    for role, last in at_end.items():
        check_numbers(pair.row(seen, role), last.info, way == "fin", way == "fin")
    for role, sent, received in (("ACTIVE", 5000, 700), ("PASSIVE", 700, 5000)):
        row = pair.row(seen, role)
        again = before[role].info["bytes_retrans"]
        assert (row["tx_bytes"] - again, row["acked_bytes"], row["rx_bytes"]) == (sent, sent, received)
        assert row["duration_us"] is row["established_us"] is row["handshake_us"] is row["syn_retrans"] is None
    check_live(seen.rows(LIFE, script.client), "ACTIVE")
    check_live(seen.rows(LIFE, script.server), "PASSIVE")
    ways = {"fin": ("FIN", "REMOTE", "LAST_ACK"), "reset": ("RST_SENT", "LOCAL", "ESTABLISHED")}
    check_end(pair.row(seen, "PASSIVE"), *ways[way])


@recorded(LIFE)
def test_older_and_never_accepted(script: Script) -> Test:
    """A child that waited when the tool began: nobody holds it."""
    with script.older():
        pair = Pair(script, accept=False)
        script.server.until_sockets(state="ESTABLISHED", lport=PORT)
    pair.listener.close()
    pair.client.socket.until_state("CLOSE")
    pair.client.socket.close()
    seen = yield
    row = ended(seen, script.server, lport=PORT, rport=pair.local.ret)
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert (row["role"], row["pid"], row["rx_bytes"], row["duration_us"]) == ("PASSIVE", None, 0, None)
    check_live(seen.rows(LIFE, script.client), "ACTIVE")
    check_live(seen.rows(LIFE, script.server))  # what nobody holds is not shown


@recorded(LIFE)
def test_older_and_closed(script: Script) -> Test:
    """A full socket in FIN_WAIT2 that nobody holds any more; its remote end is open, and older, too."""
    with script.older():
        script.client.sysctl("tcp_fin_timeout", 3600)  # a full socket for so long, less a minute
        pair = Pair(script)
        pair.exchange(11, 22)
        pair.client.socket.close()
        pair.server.socket.until_state("CLOSE_WAIT")
        script.client.until_sockets(state="FIN_WAIT2", rport=PORT)
    pair.server.socket.close()
    script.client.until_sockets(0, "==", rport=PORT, state="FIN_WAIT2")
    script.server.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    row = ended(seen, script.client, lport=pair.local.ret, rport=PORT)
    check_end(row, "FIN", "LOCAL", "FIN_WAIT2")
    assert (row["role"], row["pid"], row["acked_bytes"], row["rx_bytes"]) == ("ACTIVE", None, 11, 22)
    check_live(seen.rows(LIFE, script.client))  # what nobody holds is not shown
    (live,) = check_live(seen.rows(LIFE, script.server), "PASSIVE")
    check_end(live, "OPEN", "REMOTE", "CLOSE_WAIT")
    assert (live["acked_bytes"], live["rx_bytes"]) == (22, 11)


def check_live(rows: list[Row], *roles: str) -> list[Row]:
    """What was open when the tool began came first: these ends, each with an owner, and no others."""
    live = [row for row in rows if row["end"] == "OPEN"]
    assert rows[: len(live)] == live
    assert [row["role"] for row in live] == list(roles)
    assert all(row["pid"] for row in live)
    return live


@recorded(LIFE)
def test_live(script: Script) -> Test:
    """What was open when the tool began came first, with the same columns."""
    with script.older():
        pair = Pair(script)
        pair.exchange(5000, 700)
    infos = {end.role: end.socket.info() for end in pair.ends}
    pair.client.socket.close()
    script.client.until_sockets(0, "==", rport=PORT, state="FIN_WAIT1")
    pair.server.socket.close()
    script.server.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    for end, port in ((pair.server, PORT), (pair.client, pair.local.ret)):
        rows = seen.rows(LIFE, end.host)
        assert [row["end"] == "OPEN" for row in rows] == [True, False]
        row = rows[0]
        assert row["lport"] == port
        check_numbers(row, infos[end.role].info, False, False)
        check_end(row, "OPEN", None, "ESTABLISHED")
        assert (row["pid"], row["comm"], row["role"]) == (end.process.pid, end.process.comm, end.role)
        assert row["duration_us"] is None
    check_end(pair.row(seen, "ACTIVE"), "FIN_WAIT2", "LOCAL", "FIN_WAIT2")


@recorded(LIFE)
def test_owner_is_who_connected_not_its_child(script: Script) -> Test:
    """Used and closed by a forked child."""
    pair = Pair(script)
    child = pair.client.process.fork("child")
    same = child.at(pair.client.socket)
    pair.client.socket.close()
    same.send("hello")
    pair.server.socket.read(5)
    pair.server.socket.send("x")
    same.read(1)
    same.close()
    end = pair.server.socket.until_end()
    pair.server.socket.close()
    script.server.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    assert end.ret == 0
    assert pair.row(seen, "ACTIVE")["acked_bytes"] == pair.row(seen, "PASSIVE")["rx_bytes"] == 5


@recorded(LIFE)
def test_owner_is_who_connected_not_who_got_it(script: Script) -> Test:
    """Used and closed by a process that got the descriptor."""
    pair = Pair(script)
    got = script.client.process("other").take(pair.client.socket)
    pair.client.socket.close()
    got.send("world")
    pair.server.socket.read(5)
    got.close()
    end = pair.server.socket.until_end()
    pair.server.socket.close()
    script.server.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    assert end.ret == 0
    assert pair.row(seen, "ACTIVE")["acked_bytes"] == pair.row(seen, "PASSIVE")["rx_bytes"] == 5


@recorded(LIFE)
def test_owner_is_kept_after_its_end(script: Script) -> Test:
    mortal = script.client.process("mortal")
    pair = Pair(script, client=mortal)
    pair.exchange()
    mortal.kill()
    script.client.until_sockets(0, "==", rport=PORT, state="FIN_WAIT1")
    pair.server.socket.close()
    script.server.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    row = pair.row(seen, "ACTIVE")
    check_end(row, "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    assert (row["acked_bytes"], row["rx_bytes"]) == (5000, 700)
    check_end(pair.row(seen, "PASSIVE"), "FIN", "REMOTE", "LAST_ACK")


def allow_fast_open(script: Script) -> None:
    for host in script.hosts:
        host.sysctl("tcp_fastopen", TFO_WITHOUT_COOKIES)


@recorded(LIFE)
def test_fast_open_without_success(script: Script) -> Test:
    """The server does not take the data in the SYN, and the kernel sends it again."""
    allow_fast_open(script)
    listener = script.server.process("server").listener(PORT)
    near = script.client.process("client").socket()
    syns = script.client.counter("TcpExtTCPSynRetrans")
    near.send_to("early", script.server.ipv4, PORT)
    far = listener.accept()
    far.read(5)
    local = near.name()
    near.shutdown(), far.shutdown()
    near.until_state("CLOSE"), far.until_state("CLOSE")
    at_client, at_server = near.info(), far.info()
    again = script.client.counter("TcpExtTCPSynRetrans")
    near.close(), far.close()
    seen = yield
    client = ended(seen, script.client, lport=local.ret, rport=PORT)
    server = ended(seen, script.server, lport=PORT, rport=local.ret)
    info = at_client.info
    check_numbers(client, info)
    check_numbers(server, at_server.info)
    assert client["tx_bytes"] - info["bytes_retrans"] == client["acked_bytes"] == server["rx_bytes"] == 5
    assert info["bytes_retrans"] >= 5
    assert client["syn_retrans"] == again.ret - syns.ret < client["retrans"]


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(LIFE)
def test_fast_open(script: Script, family: str) -> Test:
    """Data in the SYN is data."""
    allow_fast_open(script)
    address = script.server.address(family)

    def opens() -> list[Call]:
        return [
            host.counter(f"TcpExtTCPFastOpen{role}")
            for host, role in zip(script.hosts, ("Active", "Passive"), strict=True)
        ]

    before = opens()
    listener = script.server.process("server").listener(PORT, address)
    listener.option(IPPROTO_TCP, TCP_FASTOPEN, 5)
    near = script.client.process("client").socket(family)
    near.send_to("early", address, PORT)
    far = listener.accept()
    far.read(5)
    far.send("answer")
    near.read(6)
    near.send("more")
    local = near.name()
    far.read(4)
    near.shutdown(), far.shutdown()
    near.until_state("CLOSE"), far.until_state("CLOSE")
    infos = near.info(), far.info()
    after = opens()
    near.close(), far.close()
    seen = yield
    client = ended(seen, script.client, lport=local.ret, rport=PORT)
    server = ended(seen, script.server, lport=PORT, rport=local.ret)
    for row, last in zip((client, server), infos, strict=True):
        check_numbers(row, last.info)
        assert row["end"] == "FIN"
    assert (client["acked_bytes"], client["rx_bytes"], client["role"]) == (9, 6, "ACTIVE")
    assert (server["acked_bytes"], server["rx_bytes"], server["role"]) == (6, 9, "PASSIVE")
    assert [count.ret for count in after] == [count.ret + 1 for count in before]


@recorded(LIFE)
def test_fast_open_without_an_end_of_the_handshake(script: Script) -> Test:
    """The child is accepted and reads in SYN_RECV, since its SYN-ACK is lost, and dies there."""
    allow_fast_open(script)
    server = script.server.process("server")
    listener = server.listener(PORT)
    listener.option(IPPROTO_TCP, TCP_FASTOPEN, 5)
    with script.server.losing():
        near = script.client.process("client").socket()
        near.blocking(False)
        near.send_to("early", script.server.ipv4, PORT, may_fail=True)
        local = near.name()
        far = listener.accept()
        far.read(5)
        far.linger(0)
        far.close()
        script.server.until_sockets(0, "==", lport=PORT, rport=local)
        near.close()
    seen = yield
    row = ended(seen, script.server, lport=PORT, rport=local.ret)
    check_end(row, "RST_SENT", "LOCAL", "SYN_RECV")
    assert (row["pid"], row["role"], row["rx_bytes"]) == (server.pid, "PASSIVE", 5)
    assert row["duration_us"] is not None
    assert row["established_us"] is row["handshake_us"] is None
