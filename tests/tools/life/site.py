"""What the tests of `life` stand on.

A socket that was shut down in both directions keeps its counters while its program holds it: TCP_INFO is read after the
end, and every number must be the same. One tool watches both hosts of one lab; each connection has a port of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import DEVICE, Host, Lab
from tests.conftest import RunningTool
from tests.puppets import Puppet

PORTS = range(8000, 9000)
SOCK_DESTROY = 21
TFO_WITHOUT_COOKIES = 0x207  # client, server, neither needs a cookie
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 5, 7, 8, 9, 11

# What every program knows. `of`: its socket by port of the listener. struct tcp_info: include/uapi/linux/tcp.h.
LIBRARY = """
import ctypes, fcntl, select, termios
of, listeners, libc = {}, {}, ctypes.CDLL(None, use_errno=True)
U32 = {"srtt_us": 68, "retrans": 100, "tx_segs": 136, "rx_segs": 140, "min_rtt_us": 148, "rx_data_segs": 152,
       "tx_data_segs": 156}
U64 = {"acked": 120, "received": 128, "tx_bytes": 200, "bytes_retrans": 208}
def info(port):
    raw = of[port].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    found = {name: struct.unpack_from("=I", raw, at)[0] for name, at in U32.items()}
    return found | {name: struct.unpack_from("=Q", raw, at)[0] for name, at in U64.items()} | {"state": raw[0]}
def reaches(port, state):
    while of[port].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != state:
        select.select([], [], [], 0.001)
    return time.monotonic()
def acknowledged(port):
    while struct.unpack("i", fcntl.ioctl(of[port], termios.TIOCOUTQ, bytes(4)))[0]:
        select.select([], [], [], 0.001)
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
def accept(port):
    of[port], _ = listeners[port].accept()
    return time.monotonic()
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
        # Nothing but SYNs has been sent so far. accept() takes the child's lock: then it is ESTABLISHED.
        self.syn_retrans = {"ACTIVE": self.client.info()["retrans"]}
        if accept:
            self.accepted = self.server.ask("accept(port)")
            self.syn_retrans["PASSIVE"] = self.server.info()["retrans"]

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
        """The client sends so much and receives so much; both have read all, and nothing is repeated afterwards."""
        self.client.puppet.tell("of[port].sendall(bytes(size))", port=self.port, size=tx)
        self.server.do("read(port, size)", size=tx)
        self.client.puppet.answer()
        self.server.puppet.tell("of[port].sendall(bytes(size))", port=self.port, size=rx)
        self.client.do("read(port, size)", size=rx)
        self.server.puppet.answer()
        for end in (self.client, self.server):
            end.do("acknowledged(port)")


    def both_shut_down(self) -> dict[End, Row]:
        """Both ends send their FIN at once. The row of each, which is what TCP_INFO says at its end."""
        ends = (self.client, self.server)
        for end in ends:
            end.do("of[port].shutdown(socket.SHUT_WR)")
        rows = {}
        for end in ends:
            end.reaches(CLOSE)
            rows[end] = self.row(end)
            check_numbers(rows[end], end.info())
            end.close()
        return rows


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
