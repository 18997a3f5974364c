"""Numbers, times, owners and what is older than the tool, against TCP_INFO and the programs' clocks."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import held
from tests.conftest import until
from tests.puppets import Puppet
from tests.tools.life.site import (
    CLOSE,
    CLOSE_WAIT,
    LIBRARY,
    Pair,
    Site,
    check_end,
    check_numbers,
    losing,
    opened,
    ports,
)

pytestmark = pytest.mark.kernel


def test_retransmissions(site: Site) -> None:
    """Data that had to be sent twice counts once as acknowledged."""
    pair = opened(site)
    pair.exchange()
    with losing(site.lab.client):
        pair.client.do("of[port].sendall(bytes(3000))")
        until(lambda: pair.client.info()["retrans"] >= 1, "a retransmission")
    pair.server.do("read(port, 3000)")
    rows = pair.both_shut_down()
    for end, row in rows.items():
        assert (row["syn_retrans"], row["end"]) == (pair.syn_retrans[end.role], "FIN")
    row = rows[pair.client]
    assert row["retrans"] >= 1
    assert row["acked_bytes"] == 8000 < row["tx_bytes"]


def test_what_could_not_leave(site: Site) -> None:
    """Data that this host threw away itself was sent, for the kernel, and not retransmitted."""
    pair, address = opened(site), site.lab.server.ipv4
    pair.exchange()

    def route(command: str) -> None:
        site.lab.client.run(
            site.lab.client._netlink, lambda link: link.route(command, dst=f"{address}/32", type="unreachable")
        )

    route("add")
    try:
        pair.client.do("of[port].sendall(bytes(3000))")
        assert pair.client.info()["tx_bytes"] > 5000
    finally:
        route("del")
    pair.server.do("read(port, 3000)")
    rows = pair.both_shut_down()
    assert rows[pair.client]["acked_bytes"] == rows[pair.server]["rx_bytes"] == 8000


def test_a_lost_handshake(site: Site) -> None:
    """The SYN-ACK is lost: both ends repeat theirs."""
    before = [host.counters() for host in site.lab.hosts]
    with ExitStack() as lost:
        lost.enter_context(losing(site.lab.server))
        port = next(ports)
        site.server.do("listen(port, family, address)", port=port, family=socket.AF_INET, address=site.lab.server.ipv4)
        site.client.tell("made = connect(port, family, address)", port=port, family=socket.AF_INET,
                         address=site.lab.server.ipv4)  # fmt: skip
        until(lambda: all(host.counters()["TcpRetransSegs"] > old["TcpRetransSegs"]
                          for host, old in zip(site.lab.hosts, before, strict=True)), "both to repeat")  # fmt: skip
        healed = time.monotonic()  # without a SYN-ACK there was no ACK, and so is no child yet
    site.client.answer()
    cport, begin, end = site.client.ask("made")
    site.server.do("accept(port)")
    opens = [puppet.ask("info(port)") for puppet in (site.client, site.server)]
    for puppet in (site.client, site.server):
        puppet.do("of[port].shutdown(socket.SHUT_WR)")
    ends = [puppet.ask("(reaches(port, 7), info(port))") for puppet in (site.client, site.server)]
    client = site.row(site.lab.client, lport=cport, rport=port)
    server = site.row(site.lab.server, lport=port, rport=cport)
    for row, first, (_, last) in zip((client, server), opens, ends, strict=True):
        assert row["syn_retrans"] == first["retrans"] > 0
        assert row["retrans"] == last["retrans"]
    assert 1_000_000 <= client["handshake_us"] <= (end - begin) * 1e6
    assert server["handshake_us"] is None
    assert server["duration_us"] <= (ends[1][0] - healed) * 1e6 + 1  # since the end of the handshake, not since the SYN
    for puppet in (site.client, site.server):
        puppet.do("close(port)")


def test_a_slow_handshake(site: Site) -> None:
    """The SYN-ACK is kept back for a time that the test's clock measures."""
    client, server, port = site.client, site.server, next(ports)
    server.do("listen(port, family, address)", port=port, family=socket.AF_INET6, address=site.lab.server.ipv6)

    def attempt() -> tuple[float, float, int, float, float] | None:
        """Unless a timer has run out meanwhile: on a slow machine a second is not long."""
        sent = site.lab.server.counters()["TcpOutSegs"]
        with held(site.lab.server):
            client.tell("made = connect(port, family, address)", port=port, family=socket.AF_INET6,
                        address=site.lab.server.ipv6)  # fmt: skip
            until(lambda: any((s.lport, s.state) == (port, "SYN_RECV") for s in site.lab.server.sockets()), "the SYN")
            until(lambda: site.lab.server.counters()["TcpOutSegs"] > sent, "the SYN-ACK")
            begin = time.monotonic()
            until(lambda: time.monotonic() > begin + 0.05, "50 ms")
            end = time.monotonic()
        client.answer()
        made = client.ask("made")
        server.do("accept(port)")
        retrans = [puppet.ask("info(port)")["retrans"] for puppet in (client, server)]
        for puppet in (client, server):
            puppet.do("close(port)")
        return None if any(retrans) else (begin, end, *made)

    begin, end, cport, before, after = until(attempt, "a handshake without a retransmission")
    for host, lport, rport in ((site.lab.client, cport, port), (site.lab.server, port, cport)):
        row = site.row(host, lport=lport, rport=rport)
        assert (end - begin) * 1e6 <= row["handshake_us"]
        if host is site.lab.client:  # at the server it ends a little later
            assert row["handshake_us"] <= (after - before) * 1e6
        assert row["syn_retrans"] == 0


@pytest.mark.parametrize("way", ["fin", "reset"])
def test_older_than_the_tool(site: Site, way: str) -> None:
    """Bytes from the start, the role by arithmetic, and no times."""
    pair = site.older.pairs[way]
    again = {end: end.info()["bytes_retrans"] for end in (pair.client, pair.server)}
    if way == "fin":
        pair.client.do("of[port].shutdown(socket.SHUT_WR)")
        pair.server.reaches(CLOSE_WAIT)
        pair.server.do("of[port].shutdown(socket.SHUT_WR)")
    else:
        pair.server.do("linger(port, 0); close(port)")
    for end in (pair.client,) if way == "reset" else (pair.client, pair.server):
        end.reaches(CLOSE)
        check_numbers(pair.row(end), end.info(), way == "fin", way == "fin")
        end.close()
    for end, sent, received in ((pair.client, 5000, 700), (pair.server, 700, 5000)):
        row = pair.row(end)
        assert (row["tx_bytes"] - again[end], row["acked_bytes"], row["rx_bytes"]) == (sent, sent, received)
        assert row["duration_us"] is row["established_us"] is row["handshake_us"] is row["syn_retrans"] is None
    ways = {"fin": ("FIN", "REMOTE", "LAST_ACK"), "reset": ("RST_SENT", "LOCAL", "ESTABLISHED")}
    check_end(pair.row(pair.server), *ways[way])


def test_older_without_an_owner(site: Site) -> None:
    """Nobody held them when the tool began: a child that waited, and a socket that was closed."""
    waiting, orphan = site.older.pairs["waiting"], site.older.pairs["orphan"]
    waiting.server.do("listeners.pop(port).close()")
    orphan.server.close()
    row = site.row(site.lab.server, lport=waiting.port, rport=waiting.cport)
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert (row["role"], row["pid"], row["rx_bytes"], row["duration_us"]) == ("PASSIVE", None, 0, None)
    row = site.row(site.lab.client, lport=orphan.cport, rport=orphan.port)
    check_end(row, "FIN", "LOCAL", "FIN_WAIT2")
    assert (row["role"], row["pid"], row["acked_bytes"], row["rx_bytes"]) == ("ACTIVE", None, 11, 22)
    waiting.client.close()


def test_live(site: Site) -> None:
    """What was open when the tool began came first, with the same columns."""
    pair = site.older.pairs["open"]
    names = ("fin", "reset", "open")
    expected = {
        (end.host.inode, port)
        for older in (site.older.pairs[name] for name in names)
        for end, port in ((older.server, older.port), (older.client, older.cport))
    } | {
        (site.lab.server.inode, site.older.pairs["orphan"].port),
        (site.lab.client.inode, site.older.pairs["waiting"].cport),
    }
    shown = site.tool.wait_for(lambda rows: sum(row["end"] == "OPEN" for row in rows) >= len(expected))
    rows = {(row["netns"], row["lport"]): row for row in shown if row["end"] == "OPEN"}
    assert rows.keys() == expected
    for end, port in ((pair.server, pair.port), (pair.client, pair.cport)):
        row = rows[end.host.inode, port]
        check_numbers(row, end.info(), False, False)
        check_end(row, "OPEN", None, "ESTABLISHED")
        assert (row["pid"], row["comm"], row["role"]) == (end.puppet.pid, end.puppet.comm, end.role)
        assert row["duration_us"] is None
    row = rows[site.lab.server.inode, site.older.pairs["orphan"].port]
    check_end(row, "OPEN", "REMOTE", "CLOSE_WAIT")
    assert (row["acked_bytes"], row["rx_bytes"]) == (22, 11)
    pair.client.close()
    check_end(pair.row(pair.client), "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    pair.server.close()


def test_owner_is_who_connected(site: Site) -> None:
    """Used and closed by a forked child, or by a process that got the descriptor: the owner is who called connect()."""
    other, path = Puppet(site.lab.client, "other"), f"\0{site.lab.client.netns}"
    other.do("meeting = socket.socket(socket.AF_UNIX); meeting.bind(path); meeting.listen()", path=path)
    forked, passed = opened(site), opened(site)
    forked.client.do(
        "pid = os.fork()\n"
        "if not pid:\n    of[port].sendall(b'hello'); of[port].recv(1); of[port].close(); os._exit(0)\n"
        "close(port)"
    )
    forked.server.do("read(port, 5); close(port)")
    forked.client.do("os.waitpid(pid, 0)")
    passed.client.do(
        "way = socket.socket(socket.AF_UNIX); way.connect(path)\n"
        "socket.send_fds(way, [b'x'], [of[port].fileno()]); close(port); way.close()",
        path=path,
    )
    other.do(
        "way, _ = meeting.accept(); got = socket.socket(fileno=socket.recv_fds(way, 1, 1)[1][0])\n"
        "got.sendall(b'world'); got.close()"
    )
    passed.server.do("read(port, 5); close(port)")
    for pair in (forked, passed):
        assert pair.row(pair.client)["acked_bytes"] == pair.row(pair.server)["rx_bytes"] == 5
    other.kill()


def test_owner_is_kept_after_its_end(site: Site) -> None:
    mortal = Puppet(site.lab.client, "mortal")
    mortal.do(LIBRARY)
    pair = Pair(site, site.lab, site.server, mortal)
    pair.exchange()
    mortal.kill()
    row = pair.row(pair.client)
    check_end(row, "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    assert (row["acked_bytes"], row["rx_bytes"]) == (5000, 700)
    pair.server.close()
    check_end(pair.row(pair.server), "FIN", "REMOTE", "LAST_ACK")


def test_fast_open_without_success(site: Site) -> None:
    """The server does not take the data in the SYN, and the kernel sends it again."""
    other = opened(site)
    for end in (other.client, other.server):
        end.close()
    syns = site.lab.client.counters()["TcpExtTCPSynRetrans"]
    other.client.do("of[port] = socket.socket(); of[port].sendto(b'early', socket.MSG_FASTOPEN, (address, port))",
                    address=site.lab.server.ipv4)  # fmt: skip
    other.server.do("accept(port); read(port, 5)")
    for end in (other.client, other.server):
        end.do("of[port].shutdown(socket.SHUT_WR)")
    cport = other.client.ask("of[port].getsockname()[1]")
    for end in (other.client, other.server):
        end.reaches(CLOSE)
    client = site.row(site.lab.client, lport=cport, rport=other.port)
    server = site.row(site.lab.server, lport=other.port, rport=cport)
    info = other.client.info()
    check_numbers(client, info)
    check_numbers(server, other.server.info())
    assert client["tx_bytes"] - info["bytes_retrans"] == client["acked_bytes"] == server["rx_bytes"] == 5
    assert info["bytes_retrans"] >= 5
    assert client["syn_retrans"] == site.lab.client.counters()["TcpExtTCPSynRetrans"] - syns < client["retrans"]
    for end in (other.client, other.server):
        end.close()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["4", "6"])
def test_fast_open(site: Site, family: int) -> None:
    """Data in the SYN is data."""
    port, address = next(ports), site.lab.server.address(family)

    def opens() -> list[int]:
        return [host.counters()[f"TcpExtTCPFastOpen{role}"]
                for host, role in zip(site.lab.hosts, ("Active", "Passive"), strict=True)]  # fmt: skip

    before = opens()
    site.server.do(
        "listen(port, family, address); listeners[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)",
        port=port, family=family, address=address,
    )  # fmt: skip
    site.client.do("of[port] = socket.socket(family); of[port].sendto(b'early', socket.MSG_FASTOPEN, (address, port))",
                   port=port, family=family, address=address)  # fmt: skip
    site.server.do("of[port], _ = listeners[port].accept(); read(port, 5); of[port].sendall(b'answer')")
    site.client.do("read(port, 6); of[port].sendall(b'more'); cport = of[port].getsockname()[1]")
    site.server.do("read(port, 4)")
    for puppet in (site.client, site.server):
        puppet.do("of[port].shutdown(socket.SHUT_WR)")
    infos = [puppet.ask("(reaches(port, 7), info(port))")[1] for puppet in (site.client, site.server)]
    cport = site.client.ask("cport")
    client = site.row(site.lab.client, lport=cport, rport=port)
    server = site.row(site.lab.server, lport=port, rport=cport)
    for row, info in zip((client, server), infos, strict=True):
        check_numbers(row, info)
        assert row["end"] == "FIN"
    assert (client["acked_bytes"], client["rx_bytes"], client["role"]) == (9, 6, "ACTIVE")
    assert (server["acked_bytes"], server["rx_bytes"], server["role"]) == (6, 9, "PASSIVE")
    assert opens() == [count + 1 for count in before]
    for puppet in (site.client, site.server):
        puppet.do("close(port)")


def test_fast_open_without_an_end_of_the_handshake(site: Site) -> None:
    """The child is accepted and reads in SYN_RECV, since its SYN-ACK is lost, and dies there."""
    port = next(ports)
    site.server.do(
        "listen(port, socket.AF_INET, address)\n"
        "listeners[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)",
        port=port, address=site.lab.server.ipv4,
    )  # fmt: skip
    with losing(site.lab.server):
        site.client.do(
            "of[port] = socket.socket(); of[port].setblocking(False)\n"
            "try: of[port].sendto(b'early', socket.MSG_FASTOPEN, (address, port))\n"
            "except BlockingIOError: pass\n"
            "cport = of[port].getsockname()[1]",
            port=port, address=site.lab.server.ipv4,
        )  # fmt: skip
        site.server.do("of[port], _ = listeners[port].accept(); read(port, 5); linger(port, 0); close(port)")
        row = site.row(site.lab.server, lport=port, rport=site.client.ask("cport"))
        site.client.do("close(port)")
    check_end(row, "RST_SENT", "LOCAL", "SYN_RECV")
    assert (row["pid"], row["role"], row["rx_bytes"]) == (site.server.pid, "PASSIVE", 5)
    assert row["duration_us"] is not None
    assert row["established_us"] is row["handshake_us"] is None
