"""`life` against what the programs did, their clocks, and TCP_INFO of the same sockets.

A socket that was shut down in both directions keeps its counters while its program holds it: TCP_INFO is read after the
end, and every number must be the same. One tool watches both hosts of one lab; each connection has a port of its own.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import EOPNOTSUPP
from typing import Any, NamedTuple

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tcpscope.lab import sockets
from tcpscope.lab.hosts import DEVICE, Host, Lab, held
from tests.conftest import RunningTool, until
from tests.puppets import Puppet

pytestmark = pytest.mark.kernel

PORTS = range(8000, 9000)
SOCK_DESTROY = 21
TFO_WITHOUT_COOKIES = 0x207  # client, server, neither needs a cookie
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 7, 8, 9, 11

# What every program knows. `of`: its socket by port of the listener. struct tcp_info: include/uapi/linux/tcp.h.
LIBRARY = """
import ctypes, select
of, listeners, libc = {}, {}, ctypes.CDLL(None, use_errno=True)
U32 = {"srtt_us": 68, "retrans": 100, "tx_segs": 136, "rx_segs": 140, "min_rtt_us": 148, "rx_data_segs": 152,
       "tx_data_segs": 156}
U64 = {"acked": 120, "received": 128, "tx_bytes": 200}
def info(port):
    raw = of[port].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    found = {name: struct.unpack_from("=I", raw, at)[0] for name, at in U32.items()}
    return found | {name: struct.unpack_from("=Q", raw, at)[0] for name, at in U64.items()} | {"state": raw[0]}
def reaches(port, state):
    while of[port].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != state:
        select.select([], [], [], 0.001)
    return time.monotonic()
def listen(port, family, address):
    listeners[port] = made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((address, port))
    made.listen()
def connect(port, family, address):
    of[port] = made = socket.socket(family)
    before = time.monotonic()
    made.connect((address, port))
    return made.getsockname()[1], before, time.monotonic()
def read(port, size):
    while size:
        size -= len(of[port].recv(min(size, 65536), socket.MSG_WAITALL))
def linger(port, seconds):
    of[port].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
def disconnect(port):
    if libc.connect(of[port].fileno(), bytes(16), 16):
        raise OSError(ctypes.get_errno(), "connect to AF_UNSPEC")
def close(port):
    of.pop(port).close()
"""

Row = dict[str, Any]
ports = iter(PORTS)


class End(NamedTuple):
    """One end of a connection: a program, and what of the program's sockets it is."""

    host: Host
    puppet: Puppet
    port: int
    role: str

    def do(self, code: str, **names: Any) -> None:
        self.puppet.do(code, port=self.port, **names)

    def ask(self, code: str, **names: Any) -> Any:
        return self.puppet.ask(code, port=self.port, **names)

    def info(self) -> dict[str, int]:
        found: dict[str, int] = self.ask("info(port)")
        return found

    def reaches(self, state: int) -> float:
        seen: float = self.ask("reaches(port, state)", state=state)
        return seen

    def close(self) -> None:
        self.do("close(port)")


class Older(NamedTuple):
    """What existed before the tool."""

    pairs: dict[str, Pair]
    waiting: int
    orphan: int


class Site(NamedTuple):
    lab: Lab
    server: Puppet
    client: Puppet
    older: Older
    tool: RunningTool

    def row(self, host: Host, **wanted: Any) -> Row:
        """The row of the one connection that has ended there, with these values."""

        def found(rows: list[Row]) -> list[Row]:
            return [
                row
                for row in rows
                if row["netns"] == host.inode
                and row["end"] != "OPEN"
                and all(row[name] == value for name, value in wanted.items())
            ]

        (row,) = found(self.tool.wait_for(found))
        return row


class Pair:
    """A connection: `server` has accepted it, `client` has opened it."""

    def __init__(
        self,
        site: Site | None,
        lab: Lab,
        server: Puppet,
        client: Puppet,
        family: str = "4",
        *,
        accept: bool = True,
    ) -> None:
        self.site = site
        self.port = next(ports)
        self.family = 4 if family in ("4", "mapped") else 6
        self.server = End(lab.server, server, self.port, "PASSIVE")
        self.client = End(lab.client, client, self.port, "ACTIVE")
        kind = socket.AF_INET if family == "4" else socket.AF_INET6
        there, bound = {
            "4": (lab.server.ipv4, lab.server.ipv4),
            "6": (lab.server.ipv6, lab.server.ipv6),
            "mapped": (f"::ffff:{lab.server.ipv4}", "::"),
        }[family]
        self.server.do("listen(port, family, address)", family=kind, address=bound)
        self.cport, self.before, self.after = self.client.ask(
            "connect(port, family, address)", family=kind, address=there
        )
        if accept:
            self.server.do("of[port], _ = listeners[port].accept()")

    def row(self, end: End) -> Row:
        """How this end ended, once it has."""
        assert self.site is not None
        here, there = (self.port, self.cport) if end is self.server else (self.cport, self.port)
        row = self.site.row(end.host, lport=here, rport=there)
        kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
        assert (row["laddr"], row["raddr"]) == (end.host.address(kind), end.host.peer.address(kind))
        assert (row["family"], row["role"]) == (self.family, end.role)
        assert (row["pid"], row["comm"], row["uid"]) == (end.puppet.pid, end.puppet.comm, 0)
        return row

    def exchange(self, tx: int = 5000, rx: int = 700) -> None:
        """The client sends so much and receives so much; both have read all."""
        self.client.puppet.tell("of[port].sendall(bytes(size))", port=self.port, size=tx)
        self.server.do("read(port, size)", size=tx)
        self.client.puppet.answer()
        self.server.puppet.tell("of[port].sendall(bytes(size))", port=self.port, size=rx)
        self.client.do("read(port, size)", size=rx)
        self.server.puppet.answer()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab, ExitStack() as stack:
        for host in lab.hosts:
            host.sysctl("tcp_fastopen", TFO_WITHOUT_COOKIES)
        server, client = Puppet(lab.server, "server"), Puppet(lab.client, "client")
        for puppet in (server, client):
            puppet.do(LIBRARY)
        pairs = {name: Pair(None, lab, server, client) for name in ("fin", "reset", "open")}
        for pair in pairs.values():
            pair.exchange(5000, 700)
        waiting = Pair(None, lab, server, client, accept=False)
        orphan = Pair(None, lab, server, client)
        orphan.client.do("of[port].setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 120)")
        orphan.exchange(11, 22)
        orphan.client.close()
        orphan.server.reaches(CLOSE_WAIT)
        tool = stack.enter_context(
            RunningTool("life", "--live", "--port", f"{PORTS.start}-{PORTS.stop - 1}", "--laddr",
                        f"{lab.server.ipv4},{lab.client.ipv4},{lab.server.ipv6},{lab.client.ipv6}")
        )  # fmt: skip
        made = Site(lab, server, client, Older(pairs, waiting.port, orphan.port), tool)
        for pair in (*pairs.values(), waiting, orphan):
            pair.site = made
        pairs |= {"waiting": waiting, "orphan": orphan}
        yield made
        done = tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0


def opened(site: Site, family: str = "4", **options: Any) -> Pair:
    return Pair(site, site.lab, site.server, site.client, family, **options)


def check_numbers(row: Row, info: dict[str, int], fin_sent: bool = True, fin_received: bool = True) -> None:
    """The same numbers that TCP_INFO has. It counts a SYN and a FIN like a byte."""
    names = ("tx_bytes", "retrans", "tx_segs", "rx_segs", "tx_data_segs", "rx_data_segs", "srtt_us", "min_rtt_us")
    assert {name: row[name] for name in names} == {name: info[name] for name in names}
    assert row["acked_bytes"] == info["acked"] - (row["role"] == "ACTIVE") - fin_sent
    assert row["rx_bytes"] == info["received"] - fin_received


def check_end(row: Row, end: str | None, closed_by: str | None, state: str, errno: str = "none") -> None:
    assert (row["end"], row["closed_by"], row["state"], row["errno"]) == (end, closed_by, state, errno)


@contextmanager
def losing(host: Host) -> Iterator[None]:
    """Inside of the block nothing arrives that the host sends: it goes to a link address that nobody has."""

    def send_to(mac: str) -> None:
        def replace(link: Any) -> None:
            for family in (socket.AF_INET, socket.AF_INET6):
                link.neigh("replace", dst=host.peer.address(family), ifindex=socket.if_nametoindex(DEVICE),
                           family=family, state="permanent", lladdr=mac)  # fmt: skip

        host.run(host._netlink, replace)

    send_to("02:00:c0:00:02:ff")
    try:
        yield
    finally:
        send_to(host.peer.mac)


def hooked(*names: str) -> bool:
    """Whether this kernel offers one of the functions, by the kernel's own account."""
    spec = Spec.of("connections")
    chosen = plan(spec, plan_refusals(spec, Kernel()))
    return any(use.program is not None and use.program.name in names for use in chosen.values())


@pytest.mark.parametrize("family", ["4", "6", "mapped"])
def test_both_close(site: Site, family: str) -> None:
    """The server closes first. Both ends agree with TCP_INFO after it, and with the programs' clocks."""
    pair = opened(site, family)
    pair.exchange(5000, 100_000)
    pair.server.do("of[port].shutdown(socket.SHUT_WR)")
    pair.server.reaches(FIN_WAIT2)
    pair.client.do("assert of[port].recv(1) == b''; begin = time.monotonic(); of[port].shutdown(socket.SHUT_WR)")
    end = pair.client.reaches(CLOSE)
    begin = pair.client.ask("begin")
    pair.server.reaches(CLOSE)
    for which, closed_by, state in ((pair.server, "LOCAL", "FIN_WAIT2"), (pair.client, "REMOTE", "LAST_ACK")):
        row = pair.row(which)
        check_numbers(row, which.info())
        check_end(row, "FIN", closed_by, state)
        assert row["syn_retrans"] == 0  # others there may be: a slow machine lets timers run out
        assert 0 < row["handshake_us"] <= (pair.after - pair.before) * 1e6
        assert (begin - pair.after) * 1e6 - 1 <= row["established_us"] <= row["duration_us"]
        assert row["duration_us"] <= (end - pair.before) * 1e6 + 1
        which.close()
    row = pair.row(pair.client)
    assert abs(row["duration_us"] - row["established_us"] - row["handshake_us"]) <= 1
    assert (row["tx_bytes"], row["acked_bytes"], row["rx_bytes"]) == (5000, 5000, 100_000)


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
    assert (row["tx_bytes"], row["acked_bytes"]) == (info["tx_bytes"], info["acked"]) == (700, 700)
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
    check_numbers(row, pair.server.info(), False, False)
    assert (row["tx_bytes"], row["acked_bytes"], row["rx_bytes"]) == (708, 700, 5000)
    pair.server.close()


def told_apart() -> bool:
    """tcp_reset() takes the packet since 5.13; before, and where functions cannot be hooked, nothing tells."""
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
    check_numbers(row, pair.client.info(), False, True)
    assert (row["tx_bytes"], row["acked_bytes"]) == (5009, 5000)
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
        assert row["retrans"] > 0
        assert row["acked_bytes"] == 5000
        assert row["tx_bytes"] == 5000 + 17 * (1 + row["retrans"])
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


def test_retransmissions(site: Site) -> None:
    """Data that had to be sent twice counts once as acknowledged."""
    pair = opened(site)
    pair.exchange()
    with losing(site.lab.client):
        pair.client.do("of[port].sendall(bytes(3000))")
        until(lambda: pair.client.info()["retrans"] >= 1, "a retransmission")
    pair.server.do("read(port, 3000)")
    for end in (pair.client, pair.server):
        end.do("of[port].shutdown(socket.SHUT_WR)")
    for end in (pair.client, pair.server):
        end.reaches(CLOSE)
        row = pair.row(end)
        check_numbers(row, end.info())
        assert (row["syn_retrans"], row["end"]) == (0, "FIN")
        end.close()
    row = pair.row(pair.client)
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
    for end in (pair.client, pair.server):
        end.do("of[port].shutdown(socket.SHUT_WR)")
    for end in (pair.client, pair.server):
        end.reaches(CLOSE)
        row = pair.row(end)
        check_numbers(row, end.info())
        end.close()
    assert pair.row(pair.client)["acked_bytes"] == pair.row(pair.server)["rx_bytes"] == 8000


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
    site.client.answer()
    cport, begin, end = site.client.ask("made")
    site.server.do("of[port], _ = listeners[port].accept()")
    infos = [puppet.ask("info(port)") for puppet in (site.client, site.server)]
    for puppet in (site.client, site.server):
        puppet.do("close(port)")
    client = site.row(site.lab.client, lport=cport, rport=port)
    server = site.row(site.lab.server, lport=port, rport=cport)
    for row, info in zip((client, server), infos, strict=True):
        assert row["syn_retrans"] == row["retrans"] == info["retrans"] > 0
    assert 1_000_000 <= client["handshake_us"] <= (end - begin) * 1e6
    assert server["handshake_us"] is None
    assert server["duration_us"] < client["duration_us"]


def test_a_slow_handshake(site: Site) -> None:
    """The SYN-ACK is kept back for a time that the test's clock measures."""
    client, server, port = site.client, site.server, next(ports)
    server.do("listen(port, family, address)", port=port, family=socket.AF_INET6, address=site.lab.server.ipv6)
    with held(site.lab.server):
        client.tell("made = connect(port, family, address)", port=port, family=socket.AF_INET6,
                    address=site.lab.server.ipv6)  # fmt: skip
        until(lambda: any(s.lport == port and s.state == "SYN_RECV" for s in site.lab.server.sockets()), "the SYN")
        begin = time.monotonic()
        until(lambda: time.monotonic() > begin + 0.05, "50 ms")
        end = time.monotonic()
    client.answer()
    cport, before, after = client.ask("made")
    server.do("of[port], _ = listeners[port].accept()")
    for puppet in (client, server):
        puppet.do("close(port)")
    for host, lport, rport in ((site.lab.client, cport, port), (site.lab.server, port, cport)):
        row = site.row(host, lport=lport, rport=rport)
        assert (end - begin) * 1e6 <= row["handshake_us"]
        if host is site.lab.client:  # at the server it ends a little later
            assert row["handshake_us"] <= (after - before) * 1e6
        assert row["syn_retrans"] == 0


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
    pair.client.do("disconnect(port)")
    row = pair.row(pair.client)
    check_end(row, "RST_SENT", "LOCAL", "ESTABLISHED")
    assert (row["tx_bytes"], row["acked_bytes"], row["rx_bytes"]) == (5000, 5000, 700)
    check_end(pair.row(pair.server), "RST_RECEIVED", "REMOTE", "ESTABLISHED", "ECONNRESET")
    pair.client.do("of[port].connect((address, other)); of[port].send(b'again')", address=site.lab.server.ipv4,
                   other=other.port)  # fmt: skip
    cport = pair.client.ask("of[port].getsockname()[1]")
    pair.client.close()
    row = site.row(site.lab.client, lport=cport, rport=other.port)
    check_end(row, "FIN_WAIT2", "LOCAL", "FIN_WAIT2")
    assert (row["role"], row["tx_bytes"], row["acked_bytes"], row["rx_bytes"]) == ("ACTIVE", 5, 5, 0)
    pair.server.close()
    other.server.do("listeners.pop(port).close()")


def test_disconnect_without_a_reset(site: Site) -> None:
    pair = opened(site)
    pair.exchange()
    pair.client.do("of[port].shutdown(socket.SHUT_WR)")
    pair.server.reaches(CLOSE_WAIT)
    with held(site.lab.server):
        pair.server.do("of[port].shutdown(socket.SHUT_WR)")
        pair.server.reaches(LAST_ACK)
        pair.server.do("disconnect(port)")
    row = pair.row(pair.server)
    check_end(row, None, "REMOTE", "LAST_ACK")
    assert (row["tx_bytes"], row["acked_bytes"], row["rx_bytes"]) == (700, 700, 5000)
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


@pytest.mark.parametrize("way", ["fin", "reset"])
def test_older_than_the_tool(site: Site, way: str) -> None:
    """Bytes from the start, the role by arithmetic, and no times."""
    pair = site.older.pairs[way]
    if way == "fin":
        for end in (pair.client, pair.server):
            end.do("of[port].shutdown(socket.SHUT_WR)")
    else:
        pair.server.do("linger(port, 0); close(port)")
    for end in (pair.client,) if way == "reset" else (pair.client, pair.server):
        end.reaches(CLOSE)
        check_numbers(pair.row(end), end.info(), way == "fin", way == "fin")
        end.close()
    for end, sent, received in ((pair.client, 5000, 700), (pair.server, 700, 5000)):
        row = pair.row(end)
        assert (row["tx_bytes"], row["acked_bytes"], row["rx_bytes"]) == (sent, sent, received)
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
    rows = {(row["netns"], row["lport"]): row for row in site.tool.rows if row["end"] == "OPEN"}
    names = ("fin", "reset", "open")
    assert rows.keys() == {
        (end.host.inode, port)
        for older in (site.older.pairs[name] for name in names)
        for end, port in ((older.server, older.port), (older.client, older.cport))
    } | {
        (site.lab.server.inode, site.older.pairs["orphan"].port),
        (site.lab.client.inode, site.older.pairs["waiting"].cport),
    }
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
    other = opened(site, accept=False)
    other.client.close()
    other.client.do("of[port] = socket.socket(); of[port].sendto(b'early', socket.MSG_FASTOPEN, (address, port))",
                    address=site.lab.server.ipv4)  # fmt: skip
    other.server.do("first, _ = listeners[port].accept(); first.close(); of[port], _ = listeners[port].accept()\n"
                    "read(port, 5)")  # fmt: skip
    for end in (other.client, other.server):
        end.do("of[port].shutdown(socket.SHUT_WR)")
    cport = other.client.ask("of[port].getsockname()[1]")
    for end in (other.client, other.server):
        end.reaches(CLOSE)
    client = site.row(site.lab.client, lport=cport, rport=other.port)
    server = site.row(site.lab.server, lport=other.port, rport=cport)
    check_numbers(client, other.client.info())
    check_numbers(server, other.server.info())
    assert (client["tx_bytes"], client["acked_bytes"], client["retrans"], client["syn_retrans"]) == (10, 5, 1, 0)
    assert server["rx_bytes"] == 5
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
