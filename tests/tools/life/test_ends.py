"""Who closes first and how a connection ends, against what the programs did."""

from __future__ import annotations

import pytest

from tests.record import Script, Test, recorded
from tests.record.script import IPPROTO_TCP, SOL_SOCKET, TCP_LINGER2
from tests.tools.life.site import LIFE, PORT, Pair, check_end, check_numbers, ended, hooked

TCP_USER_TIMEOUT, SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT = 18, 9, 4, 5, 6


@pytest.mark.parametrize("family", ["4", "6", "mapped"])
@recorded(LIFE)
def test_both_close(script: Script, family: str) -> Test:
    """The server closes first. Both ends agree with TCP_INFO after it, and with the programs' clocks."""
    pair = Pair(script, family)
    pair.exchange(5000, 100_000)
    pair.server.socket.shutdown()
    pair.server.socket.until_state("FIN_WAIT2")
    rest = pair.client.socket.until_end()
    closing = pair.client.socket.shutdown()
    over = {}
    for end in (pair.server, pair.client):
        over[end.role] = end.socket.until_state("CLOSE"), end.socket.info()
        end.socket.close()
    seen = yield
    assert rest.ret == 0
    for role, established, closed_by, state in (
        ("PASSIVE", pair.server.socket.accepted, "LOCAL", "FIN_WAIT2"),
        ("ACTIVE", pair.connected, "REMOTE", "LAST_ACK"),
    ):
        row, (closed, last) = pair.row(seen, role), over[role]
        check_numbers(row, last.info)
        check_end(row, "FIN", closed_by, state)
        assert row["syn_retrans"] == pair.syn_retrans(role)
        if role == "ACTIVE" or not row["syn_retrans"]:
            assert 0 < row["handshake_us"] <= established.end_us - pair.connected.begin_us
        assert closing.begin_us - established.end_us - 1 <= row["established_us"] <= row["duration_us"]
        assert row["duration_us"] <= closed.end_us - pair.connected.begin_us + 1
        assert row["tx_bytes"] - last.info["bytes_retrans"] == row["acked_bytes"]
    row = pair.row(seen, "ACTIVE")
    assert abs(row["duration_us"] - row["established_us"] - row["handshake_us"]) <= 1
    assert (row["acked_bytes"], row["rx_bytes"]) == (5000, 100_000)


@pytest.mark.concurrent  # both ends at a time
@recorded(LIFE)
def test_simultaneous_close(script: Script) -> Test:
    pair = Pair(script)
    pair.exchange()
    with script.client.held(), script.server.held():
        for end in pair.ends:
            end.socket.shutdown()
            end.socket.until_state("FIN_WAIT1")
    infos = {}
    for end in pair.ends:
        end.socket.until_state("CLOSE")
        infos[end.role] = end.socket.info()
        end.socket.close()
    seen = yield
    for role, last in infos.items():
        row = pair.row(seen, role)
        check_end(row, "FIN", "LOCAL", "CLOSING")
        check_numbers(row, last.info)


@recorded(LIFE)
def test_a_timewait_socket_waits_for_the_fin(script: Script) -> Test:
    pair = Pair(script)
    pair.exchange()
    before = pair.server.socket.info()
    pair.server.socket.close()
    script.server.until_sockets(0, "==", state="FIN_WAIT1")
    pair.client.socket.close()
    script.client.until_sockets(0, "==", state="LAST_ACK")
    seen = yield
    row, info = pair.row(seen, "PASSIVE"), before.info
    check_end(row, "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    assert (row["tx_bytes"], row["acked_bytes"]) == (info["tx_bytes"], info["acked"])
    assert info["tx_bytes"] - info["bytes_retrans"] == info["acked"] == 700
    assert (row["rx_bytes"], row["tx_data_segs"], row["rx_data_segs"]) == (
        info["received"],
        info["tx_data_segs"],
        info["rx_data_segs"],
    )
    check_end(pair.row(seen, "ACTIVE"), "FIN", "REMOTE", "LAST_ACK")


@pytest.mark.parametrize("why", ["unread", "linger"])
@pytest.mark.parametrize("closed", [False, True], ids=["first", "second"])
@recorded(LIFE)
def test_close_sends_a_reset(script: Script, why: str, closed: bool) -> Test:
    """Unread data, or SO_LINGER of 0; before the other end has closed, or after it."""
    pair = Pair(script)
    pair.exchange()
    if why == "unread":
        pair.client.socket.send("never read")
        pair.server.socket.until_ready()
    else:
        pair.server.socket.linger(0)
    if closed:
        pair.client.socket.shutdown()
        pair.server.socket.until_state("CLOSE_WAIT")
    pair.client.socket.until_state("FIN_WAIT2" if closed else "ESTABLISHED")
    pair.server.socket.close()
    pair.client.socket.until_state("CLOSE")
    last = pair.client.socket.info()
    pair.client.socket.close()
    seen = yield
    row = pair.row(seen, "PASSIVE")
    check_end(row, "RST_SENT", *(("REMOTE", "CLOSE_WAIT") if closed else ("LOCAL", "ESTABLISHED")))
    assert (row["acked_bytes"], row["rx_bytes"]) == (700, 5010 if why == "unread" else 5000)
    row = pair.row(seen, "ACTIVE")
    check_end(row, "RST_RECEIVED", *(("LOCAL", "FIN_WAIT2") if closed else ("REMOTE", "ESTABLISHED")), "ECONNRESET")
    check_numbers(row, last.info, closed, False)


@recorded(LIFE)
def test_unread_data_after_both_fins(script: Script) -> Test:
    """The last of the two FINs is on its way; close() makes it a reset all the same."""
    pair = Pair(script)
    pair.exchange()
    pair.client.socket.send("never read")
    pair.client.socket.shutdown()
    pair.server.socket.until_state("CLOSE_WAIT")
    with script.server.held():
        pair.server.socket.shutdown()
        pair.server.socket.until_state("LAST_ACK")
        pair.server.socket.close()
    pair.client.socket.close()
    seen = yield
    row = pair.row(seen, "PASSIVE")
    check_end(row, "RST_SENT", "REMOTE", "LAST_ACK")
    assert (row["acked_bytes"], row["rx_bytes"]) == (700, 5010)


@recorded(LIFE)
def test_a_reset_with_data_on_its_way(script: Script) -> Test:
    """What had not been acknowledged by then is not among the acknowledged bytes, at either end."""
    pair = Pair(script)
    pair.exchange()
    with script.client.losing():
        pair.client.socket.send_all(3000)
        pair.client.socket.linger(0)
        at_close = pair.client.socket.info()
        pair.client.socket.close()
        script.client.until_sockets(0, "==", rport=PORT)
    # The reset was lost, too: the server hears of it when it sends.
    pair.server.socket.send("anybody?")
    pair.server.socket.until_state("CLOSE")
    at_end = pair.server.socket.info()
    pair.server.socket.close()
    seen = yield
    row, info = pair.row(seen, "ACTIVE"), at_close.info
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert (row["acked_bytes"], row["rx_bytes"]) == (info["acked"] - 1, info["received"]) == (5000, 700)
    assert 8000 <= info["tx_bytes"] <= row["tx_bytes"]
    row, info = pair.row(seen, "PASSIVE"), at_end.info
    check_end(row, "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
    check_numbers(row, info, False, False)
    assert (row["tx_bytes"] - info["bytes_retrans"], row["acked_bytes"], row["rx_bytes"]) == (708, 700, 5000)


@recorded(LIFE)
def test_data_after_close(script: Script) -> Test:
    """The remote end sends to a socket that nobody holds."""
    pair = Pair(script)
    pair.exchange()
    pair.server.socket.option(IPPROTO_TCP, TCP_LINGER2, 120)  # stays a full socket
    pair.server.socket.close()
    script.server.until_sockets(state="FIN_WAIT2", lport=PORT)
    pair.client.socket.send("to nobody")
    pair.client.socket.until_state("CLOSE")
    last = pair.client.socket.info()
    pair.client.socket.close()
    seen = yield
    # tcp_reset() takes the packet since 5.11; before, and where functions cannot be hooked, nothing tells.
    told_apart = hooked(seen, "reset_received__fentry") and seen.machine.kernel.parameters("tcp_reset") == 2
    end = "RST_SENT" if told_apart else "RST"
    check_end(pair.row(seen, "PASSIVE"), end, "LOCAL", "FIN_WAIT2", "ECONNRESET")
    row, info = pair.row(seen, "ACTIVE"), last.info
    check_end(row, "RST_RECEIVED", "REMOTE", "CLOSE_WAIT", "EPIPE")
    check_numbers(row, info, False, True)
    assert (row["tx_bytes"] - info["bytes_retrans"], row["acked_bytes"]) == (5009, 5000)


@recorded(LIFE)
def test_data_after_close_with_the_ack_of_the_fin(script: Script) -> Test:
    """The socket goes from FIN_WAIT1 through FIN_WAIT2 to its end for one packet."""
    pair = Pair(script)
    pair.exchange()
    segments = pair.client.socket.field("tx_segs")
    with script.client.losing():
        pair.server.socket.close()
        pair.client.socket.until_field("tx_segs", segments + 1)  # an acknowledgement that is lost
        script.server.lose()  # no further FIN, and no acknowledgement of one without data
    pair.client.socket.send("to nobody")
    script.server.until_sockets(0, "==", lport=PORT, rport=pair.local)
    script.server.find()
    pair.client.socket.until_state("CLOSE")
    pair.client.socket.close()
    seen = yield
    end = "RST_SENT" if hooked(seen, "timewait__fexit", "timewait__kprobe") else None
    check_end(pair.row(seen, "PASSIVE"), end, "LOCAL", "FIN_WAIT2")
    check_end(pair.row(seen, "ACTIVE"), "RST_RECEIVED", "REMOTE", "CLOSE_WAIT", "EPIPE")


@recorded(LIFE)
def test_no_wait_for_the_fin(script: Script) -> Test:
    """TCP_LINGER2 below zero: a reset instead of FIN_WAIT2."""
    pair = Pair(script)
    pair.exchange()
    pair.server.socket.option(IPPROTO_TCP, TCP_LINGER2, -1)
    pair.server.socket.close()
    pair.client.socket.until_state("CLOSE")
    pair.client.socket.close()
    script.server.until_sockets(0, "==", lport=PORT, rport=pair.local)
    seen = yield
    check_end(pair.row(seen, "PASSIVE"), "RST_SENT", "LOCAL", "FIN_WAIT2")


@recorded(LIFE)
def test_silence(script: Script) -> Test:
    """Nobody answers any more: one end sends and gives up, the other only asks whether anybody is there."""
    sender, asker, closer = (Pair(script, port=PORT + number) for number in range(3))
    for pair in (sender, asker, closer):
        pair.exchange()
    before = sender.client.socket.info()
    for pair in (sender, closer):
        pair.client.socket.option(IPPROTO_TCP, TCP_USER_TIMEOUT, 300)
    with script.client.losing():
        asker.client.socket.option(SOL_SOCKET, SO_KEEPALIVE, 1)
        for option in (TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT):
            asker.client.socket.option(IPPROTO_TCP, option, 1)
        sender.client.socket.send("nobody hears this")
        closer.client.socket.shutdown()
        for pair in (sender, closer, asker):
            pair.client.socket.until_state("CLOSE")
        at_end = sender.client.socket.info(), closer.client.socket.info()
    for pair in (sender, closer, asker):
        pair.client.socket.close()
        pair.server.socket.close()
    seen = yield
    row = sender.row(seen, "ACTIVE")
    check_end(row, "TIMEOUT", None, "ESTABLISHED", "ETIMEDOUT")
    check_numbers(row, at_end[0].info, False, False)
    assert row["retrans"] > before.info["retrans"]
    assert row["acked_bytes"] == 5000
    assert row["tx_bytes"] == before.info["tx_bytes"] + 17 * (1 + row["retrans"] - before.info["retrans"])
    row = closer.row(seen, "ACTIVE")
    check_end(row, "TIMEOUT", "LOCAL", "FIN_WAIT1", "ETIMEDOUT")
    check_numbers(row, at_end[1].info, False, False)
    row = asker.row(seen, "ACTIVE")
    check_end(row, "KEEPALIVE", None, "ESTABLISHED", "ETIMEDOUT")
    assert row["duration_us"] >= 2_000_000
    assert row["acked_bytes"] == 5000


@recorded(LIFE)
def test_killed(script: Script) -> Test:
    """By `ss -K`, where the kernel has it (CONFIG_INET_DIAG_DESTROY)."""
    pair = Pair(script)
    pair.exchange()
    error = script.server.destroy(PORT, pair.local)
    script.client.flush()  # the RST
    pair.server.socket.shutdown("both", may_fail=True)  # only where it was not killed
    pair.client.socket.shutdown("both", may_fail=True)
    pair.server.socket.until_state("CLOSE")
    pair.client.socket.until_state("CLOSE")
    for end in pair.ends:
        end.socket.close()
    seen = yield
    if error.errno == "EOPNOTSUPP":
        assert seen.machine.kernel.parameters("tcp_diag_destroy") is None
        pytest.skip("this kernel has no ss -K")
    assert error.errno == "none"
    row = pair.row(seen, "PASSIVE")
    check_end(row, "KILLED", "LOCAL", "ESTABLISHED", "ECONNABORTED")
    assert (row["acked_bytes"], row["rx_bytes"]) == (700, 5000)
    check_end(pair.row(seen, "ACTIVE"), "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")


@recorded(LIFE)
def test_disconnect(script: Script) -> Test:
    """connect() to AF_UNSPEC clears the socket; its numbers are those from before, and it may be used again."""
    pair = Pair(script)
    other = PORT + 1
    pair.listener.process.listener(other)
    pair.exchange()
    before = pair.client.socket.info()
    pair.client.socket.disconnect()
    pair.server.socket.until_state("CLOSE")
    pair.client.socket.connect(script.server.ipv4, other)
    pair.client.socket.send("again")
    again_at = pair.client.socket.name()
    pair.client.socket.until_acknowledged()
    again = pair.client.socket.info()
    pair.client.socket.close()
    script.client.until_sockets(0, "==", state="FIN_WAIT1")
    pair.server.socket.close()
    seen = yield
    row = pair.row(seen, "ACTIVE")
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    sent = row["tx_bytes"] - before.info["bytes_retrans"]
    assert (sent, row["acked_bytes"], row["rx_bytes"]) == (5000, 5000, 700)
    check_end(pair.row(seen, "PASSIVE"), "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
    row = ended(seen, script.client, lport=again_at.ret, rport=other)
    check_end(row, "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    sent = row["tx_bytes"] - again.info["bytes_retrans"]
    assert (row["role"], sent, row["acked_bytes"], row["rx_bytes"]) == ("ACTIVE", 5, 5, 0)


@recorded(LIFE)
def test_disconnect_without_a_reset(script: Script) -> Test:
    pair = Pair(script)
    pair.exchange()
    before = pair.server.socket.info()
    pair.client.socket.shutdown()
    pair.server.socket.until_state("CLOSE_WAIT")
    with script.server.held():
        pair.server.socket.shutdown()
        pair.server.socket.until_state("LAST_ACK")
        pair.server.socket.disconnect()
    for end in pair.ends:
        end.socket.close()
    seen = yield
    row = pair.row(seen, "PASSIVE")
    check_end(row, None, "REMOTE", "LAST_ACK")
    sent = row["tx_bytes"] - before.info["bytes_retrans"]
    assert (sent, row["acked_bytes"], row["rx_bytes"]) == (700, 700, 5000)


@recorded(LIFE)
def test_never_accepted(script: Script) -> Test:
    """The listener goes, and its children with it."""
    pair = Pair(script, accept=False)
    pair.client.socket.send("hello?")
    script.server.until_sockets(6, "==", "recv_q", lport=PORT, rport=pair.local)
    pair.listener.close()
    pair.client.socket.until_state("CLOSE")
    pair.client.socket.close()
    seen = yield
    row = pair.row(seen, "PASSIVE")
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert row["rx_bytes"] == 6
    check_end(pair.row(seen, "ACTIVE"), "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
