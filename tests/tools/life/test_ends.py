"""Who closes first and how a connection ends, against what the programs did."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack
from errno import EOPNOTSUPP

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab import sockets
from tcpscope.lab.hosts import Host, held
from tests.conftest import until
from tests.tools.life.site import (
    CLOSE,
    CLOSE_WAIT,
    ESTABLISHED,
    FIN_WAIT1,
    FIN_WAIT2,
    LAST_ACK,
    SOCK_DESTROY,
    Site,
    check_end,
    check_numbers,
    hooked,
    losing,
    opened,
)

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("family", ["4", "6", "mapped"])
def test_both_close(site: Site, family: str) -> None:
    """The server closes first. Both ends agree with TCP_INFO after it, and with the programs' clocks."""
    pair = opened(site, family)
    pair.exchange(5000, 100_000)
    pair.server.do("of[port].shutdown(socket.SHUT_WR)")
    pair.server.reaches(FIN_WAIT2)
    pair.client.do("assert of[port].recv(1) == b''; begin = time.monotonic(); of[port].shutdown(socket.SHUT_WR)")
    begin = pair.client.ask("begin")
    for which, established, closed_by, state in (
        (pair.server, pair.accepted, "LOCAL", "FIN_WAIT2"),
        (pair.client, pair.after, "REMOTE", "LAST_ACK"),
    ):
        end = which.reaches(CLOSE)
        row, info = pair.row(which), which.info()
        check_numbers(row, info)
        check_end(row, "FIN", closed_by, state)
        assert row["syn_retrans"] == pair.syn_retrans[which.role]  # a slow machine lets timers run out
        if which is pair.client or not row["syn_retrans"]:
            assert 0 < row["handshake_us"] <= (established - pair.before) * 1e6
        assert (begin - established) * 1e6 - 1 <= row["established_us"] <= row["duration_us"]
        assert row["duration_us"] <= (end - pair.before) * 1e6 + 1
        assert row["tx_bytes"] - info["bytes_retrans"] == row["acked_bytes"]
        which.close()
    row = pair.row(pair.client)
    assert abs(row["duration_us"] - row["established_us"] - row["handshake_us"]) <= 1
    assert (row["acked_bytes"], row["rx_bytes"]) == (5000, 100_000)


def test_simultaneous_close(site: Site) -> None:
    pair = opened(site)
    pair.exchange()
    with held(site.lab.client), held(site.lab.server):
        for end in (pair.client, pair.server):
            end.do("of[port].shutdown(socket.SHUT_WR)")
            end.reaches(FIN_WAIT1)
    for end in (pair.client, pair.server):
        end.reaches(CLOSE)
        row = pair.row(end)
        check_end(row, "FIN", "LOCAL", "CLOSING")
        check_numbers(row, end.info())
        end.close()


def test_a_timewait_socket_waits_for_the_fin(site: Site) -> None:
    pair = opened(site)
    pair.exchange()
    info = pair.server.info()
    pair.server.close()
    row = pair.row(pair.server)
    check_end(row, "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    assert (row["tx_bytes"], row["acked_bytes"]) == (info["tx_bytes"], info["acked"])
    assert info["tx_bytes"] - info["bytes_retrans"] == info["acked"] == 700
    assert (row["rx_bytes"], row["tx_data_segs"], row["rx_data_segs"]) == (
        info["received"], info["tx_data_segs"], info["rx_data_segs"]
    )  # fmt: skip
    pair.client.close()
    check_end(pair.row(pair.client), "FIN", "REMOTE", "LAST_ACK")


@pytest.mark.parametrize("why", ["unread", "linger"])
@pytest.mark.parametrize("closed", [False, True], ids=["first", "second"])
def test_close_sends_a_reset(site: Site, why: str, closed: bool) -> None:
    """Unread data, or SO_LINGER of 0; before the other end has closed, or after it."""
    pair = opened(site)
    pair.exchange()
    if why == "unread":
        pair.client.do("of[port].send(b'never read')")
        pair.server.do("select.select([of[port]], [], [])")
    else:
        pair.server.do("linger(port, 0)")
    if closed:
        pair.client.do("of[port].shutdown(socket.SHUT_WR)")
        pair.server.reaches(CLOSE_WAIT)
    pair.client.reaches(FIN_WAIT2 if closed else ESTABLISHED)
    pair.server.close()
    row = pair.row(pair.server)
    check_end(row, "RST_SENT", *(("REMOTE", "CLOSE_WAIT") if closed else ("LOCAL", "ESTABLISHED")))
    assert (row["acked_bytes"], row["rx_bytes"]) == (700, 5010 if why == "unread" else 5000)
    pair.client.reaches(CLOSE)
    row = pair.row(pair.client)
    check_end(row, "RST_RECEIVED", *(("LOCAL", "FIN_WAIT2") if closed else ("REMOTE", "ESTABLISHED")), "ECONNRESET")
    check_numbers(row, pair.client.info(), closed, False)
    pair.client.close()


def test_unread_data_after_both_fins(site: Site) -> None:
    """The last of the two FINs is on its way; close() makes it a reset all the same."""
    pair = opened(site)
    pair.exchange()
    pair.client.do("of[port].send(b'never read'); of[port].shutdown(socket.SHUT_WR)")
    pair.server.reaches(CLOSE_WAIT)
    with held(site.lab.server):
        pair.server.do("of[port].shutdown(socket.SHUT_WR)")
        pair.server.reaches(LAST_ACK)
        pair.server.close()
        row = pair.row(pair.server)
        check_end(row, "RST_SENT", "REMOTE", "LAST_ACK")
        assert (row["acked_bytes"], row["rx_bytes"]) == (700, 5010)
    pair.client.close()


def test_a_reset_with_data_on_its_way(site: Site) -> None:
    """What had not been acknowledged by then is not among the acknowledged bytes, at either end."""
    pair = opened(site)
    pair.exchange()
    with losing(site.lab.client):
        pair.client.do("of[port].sendall(bytes(3000)); linger(port, 0)")
        info = pair.client.info()
        pair.client.close()
        row = pair.row(pair.client)
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert (row["acked_bytes"], row["rx_bytes"]) == (info["acked"] - 1, info["received"]) == (5000, 700)
    assert 8000 <= info["tx_bytes"] <= row["tx_bytes"]
    # The reset was lost, too: the server hears of it when it sends.
    pair.server.do("of[port].send(b'anybody?')")
    pair.server.reaches(CLOSE)
    row = pair.row(pair.server)
    check_end(row, "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
    info = pair.server.info()
    check_numbers(row, info, False, False)
    assert (row["tx_bytes"] - info["bytes_retrans"], row["acked_bytes"], row["rx_bytes"]) == (708, 700, 5000)
    pair.server.close()


def told_apart() -> bool:
    """tcp_reset() takes the packet since 5.11; before, and where functions cannot be hooked, nothing tells."""
    return hooked("reset_received__fentry") and Kernel().parameters("tcp_reset") == 2


def test_data_after_close(site: Site) -> None:
    """The remote end sends to a socket that nobody holds."""
    pair = opened(site)
    pair.exchange()
    pair.server.do("of[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 120)")  # stays a full socket
    pair.server.close()
    until(lambda: any((s.lport, s.state) == (pair.port, "FIN_WAIT2") for s in site.lab.server.sockets()), "its end")
    pair.client.do("of[port].send(b'to nobody')")
    pair.client.reaches(CLOSE)
    check_end(pair.row(pair.server), "RST_SENT" if told_apart() else "RST", "LOCAL", "FIN_WAIT2", "ECONNRESET")
    row = pair.row(pair.client)
    check_end(row, "RST_RECEIVED", "REMOTE", "CLOSE_WAIT", "EPIPE")
    info = pair.client.info()
    check_numbers(row, info, False, True)
    assert (row["tx_bytes"] - info["bytes_retrans"], row["acked_bytes"]) == (5009, 5000)
    pair.client.close()


def test_data_after_close_with_the_ack_of_the_fin(site: Site) -> None:
    """The socket goes from FIN_WAIT1 through FIN_WAIT2 to its end for one packet."""
    pair = opened(site)
    pair.exchange()
    segments = pair.client.info()["tx_segs"]
    with ExitStack() as lost:
        with losing(site.lab.client):
            pair.server.close()
            until(lambda: pair.client.info()["tx_segs"] > segments, "an acknowledgement that is lost")
            lost.enter_context(losing(site.lab.server))  # no further FIN, and no acknowledgement of one without data
        pair.client.do("of[port].send(b'to nobody')")
    end = "RST_SENT" if hooked("timewait__fexit", "timewait__kprobe") else None
    check_end(pair.row(pair.server), end, "LOCAL", "FIN_WAIT2")
    pair.client.reaches(CLOSE)
    check_end(pair.row(pair.client), "RST_RECEIVED", "REMOTE", "CLOSE_WAIT", "EPIPE")
    pair.client.close()


def test_no_wait_for_the_fin(site: Site) -> None:
    """TCP_LINGER2 below zero: a reset instead of FIN_WAIT2."""
    pair = opened(site)
    pair.exchange()
    pair.server.do("of[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, -1)")
    pair.server.close()
    check_end(pair.row(pair.server), "RST_SENT", "LOCAL", "FIN_WAIT2")
    pair.client.reaches(CLOSE)
    pair.client.close()


def test_silence(site: Site) -> None:
    """Nobody answers any more: one end sends and gives up, the other only asks whether anybody is there."""
    sender, asker, closer = opened(site), opened(site), opened(site)
    for pair in (sender, asker, closer):
        pair.exchange()
    before = sender.client.info()
    sender.client.do("of[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)")
    closer.client.do("of[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)")
    with losing(site.lab.client):
        asker.client.do(
            "of[port].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n"
            "for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):\n"
            "    of[port].setsockopt(socket.IPPROTO_TCP, option, 1)"
        )
        sender.client.do("of[port].send(b'nobody hears this')")
        closer.client.do("of[port].shutdown(socket.SHUT_WR)")
        for pair in (sender, closer, asker):
            pair.client.reaches(CLOSE)
        row = sender.row(sender.client)
        check_end(row, "TIMEOUT", None, "ESTABLISHED", "ETIMEDOUT")
        check_numbers(row, sender.client.info(), False, False)
        assert row["retrans"] > before["retrans"]
        assert row["acked_bytes"] == 5000
        assert row["tx_bytes"] == before["tx_bytes"] + 17 * (1 + row["retrans"] - before["retrans"])
        row = closer.row(closer.client)
        check_end(row, "TIMEOUT", "LOCAL", "FIN_WAIT1", "ETIMEDOUT")
        check_numbers(row, closer.client.info(), False, False)
        row = asker.row(asker.client)
        check_end(row, "KEEPALIVE", None, "ESTABLISHED", "ETIMEDOUT")
        assert row["duration_us"] >= 2_000_000
        assert row["acked_bytes"] == 5000
    for pair in (sender, closer, asker):
        pair.client.close()
        pair.server.close()


def destroy(host: Host, lport: int, rport: int) -> int:
    """`ss -K` for one connection to the peer: 0, or the error's number."""

    def ask() -> int:
        source, target = (socket.inet_aton(address).ljust(16, b"\0") for address in (host.ipv4, host.peer.ipv4))
        body = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
        body += struct.pack("!HH", lport, rport) + source + target + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, sockets.NETLINK_SOCK_DIAG) as netlink:
            size = sockets.HEADER.size + len(body)
            netlink.send(sockets.HEADER.pack(size, SOCK_DESTROY, sockets.NLM_F_REQUEST | 4, 0, 0) + body)
            return -int(struct.unpack_from("=i", netlink.recv(4096), sockets.HEADER.size)[0])

    return host.run(ask)


def test_killed(site: Site) -> None:
    pair = opened(site)
    pair.exchange()
    error = destroy(site.lab.server, pair.port, pair.cport)
    if error == EOPNOTSUPP:
        assert Kernel().parameters("tcp_diag_destroy") is None
        pytest.skip("this kernel has no ss -K")
    assert error == 0
    pair.server.reaches(CLOSE)
    row = pair.row(pair.server)
    check_end(row, "KILLED", "LOCAL", "ESTABLISHED", "ECONNABORTED")
    assert (row["acked_bytes"], row["rx_bytes"]) == (700, 5000)
    pair.client.reaches(CLOSE)
    check_end(pair.row(pair.client), "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
    for end in (pair.client, pair.server):
        end.close()


def test_disconnect(site: Site) -> None:
    """connect() to AF_UNSPEC clears the socket; its numbers are those from before, and it may be used again."""
    pair, other = opened(site), opened(site, accept=False)
    pair.exchange()
    other.client.close()
    info = pair.client.info()
    pair.client.do("disconnect(port)")
    row = pair.row(pair.client)
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert (row["tx_bytes"] - info["bytes_retrans"], row["acked_bytes"], row["rx_bytes"]) == (5000, 5000, 700)
    check_end(pair.row(pair.server), "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
    pair.client.do("of[port].connect((address, other)); of[port].send(b'again')", address=site.lab.server.ipv4,
                   other=other.port)  # fmt: skip
    cport = pair.client.ask("of[port].getsockname()[1]")
    pair.client.do("acknowledged(port)")
    again = pair.client.info()["bytes_retrans"]
    pair.client.close()
    row = site.row(site.lab.client, lport=cport, rport=other.port)
    check_end(row, "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    assert (row["role"], row["tx_bytes"] - again, row["acked_bytes"], row["rx_bytes"]) == ("ACTIVE", 5, 5, 0)
    pair.server.close()
    other.server.do("listeners.pop(port).close()")


def test_disconnect_without_a_reset(site: Site) -> None:
    pair = opened(site)
    pair.exchange()
    info = pair.server.info()
    pair.client.do("of[port].shutdown(socket.SHUT_WR)")
    pair.server.reaches(CLOSE_WAIT)
    with held(site.lab.server):
        pair.server.do("of[port].shutdown(socket.SHUT_WR)")
        pair.server.reaches(LAST_ACK)
        pair.server.do("disconnect(port)")
    row = pair.row(pair.server)
    check_end(row, None, "REMOTE", "LAST_ACK")
    assert (row["tx_bytes"] - info["bytes_retrans"], row["acked_bytes"], row["rx_bytes"]) == (700, 700, 5000)
    for end in (pair.client, pair.server):
        end.close()


def test_never_accepted(site: Site) -> None:
    """The listener goes, and its children with it."""
    pair = opened(site, accept=False)
    pair.client.do("of[port].send(b'hello?')")
    until(lambda: any(s.lport == pair.port and s.rport and s.recv_q == 6 for s in site.lab.server.sockets()), "data")
    pair.server.do("listeners.pop(port).close()")
    row = pair.row(pair.server)
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert row["rx_bytes"] == 6
    pair.client.reaches(CLOSE)
    check_end(pair.row(pair.client), "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
    pair.client.close()
