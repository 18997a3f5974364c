"""Two hosts on one machine: network namespaces joined by a veth pair.

    with Lab() as lab:
        lab.server.sysctl("tcp_syncookies", 0)
        listener = lab.server.socket(socket.AF_INET)
        lab.client.spawn(["ping", "-c1", lab.server.ipv4])
        lab.server.counters()["TcpExtListenOverflows"]

A lab does not touch the machine's own network. The pair is created inside the two namespaces, and no address,
route or device outside of them. The end of the `with` block ends the processes and removes the namespaces. If a
lab was killed, the next one removes its namespaces.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tcpscope.errors import NotPermittedError, UnsupportedError, UsageError
from tcpscope.lab import processes
from tcpscope.lab.namespaces import Namespace, sweep
from tcpscope.lab.sockets import Socket, tcp_sockets
from tcpscope.snmp import counters_in

if TYPE_CHECKING:
    from types import TracebackType

P = ParamSpec("P")
T = TypeVar("T")

DEVICE = "veth0"
NOBODYS_MAC = "02:00:c0:00:02:ff"
TC_H_ROOT = 0xFFFFFFFF
NETEM_PACKETS = 100_000  # as many as are on their way at most: it drops what comes in above
COUNTER_FILES = ("snmp", "netstat", "snmp6")

_numbers = itertools.count(1)


class Host:
    """One end of the pair, with the addresses `ipv4`, `ipv6`, `mac`. `inode` is that of its network namespace."""

    def __init__(self, role: str, number: int, lab: int) -> None:
        self.role = role
        self.ipv4 = f"192.0.2.{number}"  # RFC 5737, RFC 3849: addresses that nobody has
        self.ipv6 = f"2001:db8::{number}"
        self.mac = f"02:00:c0:00:02:{number:02x}"
        self.peer: Host
        self._children: list[subprocess.Popen[Any]] = []
        self._sockets: list[socket.socket] = []
        self._namespace = Namespace(f"{lab}-{role}")
        self.netns = self._namespace.name
        self.inode = self._namespace.inode

    def __repr__(self) -> str:
        return f"<Host {self.role} {self.netns} {self.ipv4} {self.ipv6}>"

    def address(self, family: int) -> str:
        """The host's address in `socket.AF_INET` or `socket.AF_INET6`."""
        return self.ipv6 if family == socket.AF_INET6 else self.ipv4

    # What runs in the host

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the thread of this process that lives in the host. Calls run one after the other."""
        return self._namespace.run(function, *args, **kwargs)

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket of this host, for use in any thread. The lab closes it at its end."""
        made = self.run(socket.socket, family, kind, protocol)
        self._sockets.append(made)
        return made

    def spawn(self, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in the host. `options` are those of `subprocess.Popen`. The lab kills it at its end."""
        child = self.run(processes.start, argv, **options)
        self._children.append(child)
        return child

    # What the kernel says about it

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """Set a sysctl of this host if a value is given, and return its value. The name is `tcp_syncookies`,
        `somaxconn`, or a path below `/proc/sys/net` such as `ipv4/neigh/veth0/app_solicit`."""

        def access() -> str:
            for directory in ("", "ipv4", "core", "ipv6"):
                path = Path("/proc/sys/net", directory, name)
                if path.is_file():
                    if value is not None:
                        path.write_text(f"{value}\n")
                    return path.read_text().strip()
            raise UnsupportedError(f"this kernel has no sysctl '{name}' in a network namespace")

        try:
            return self.run(access)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise UsageError(f"sysctl '{name}' does not take the value '{value}'") from error
            raise _not_permitted(error) from error

    def counters(self) -> dict[str, int]:
        """All SNMP counters of this host, with the names of `nstat`: `TcpExtListenOverflows`."""
        # Not /proc/net, which shows the namespace of the process's first thread.
        texts = self.run(lambda: [Path("/proc/thread-self/net", name).read_text() for name in COUNTER_FILES])
        return {name: value for text in texts for name, value in counters_in(text).items()}

    def sockets(self) -> list[Socket]:
        """The TCP sockets of this host: see `tcpscope.lab.sockets`."""
        return self.run(tcp_sockets)

    # What lies between it and its peer

    def netem(self, delay_ms: float = 0, loss_percent: float = 0) -> None:
        """Delay and lose what this host sends, if the kernel has netem. Two zeros end this."""

        def replace(link: Any) -> None:
            index = socket.if_nametoindex(DEVICE)
            if delay_ms or loss_percent:
                netem = {"delay": int(delay_ms * 1000), "loss": loss_percent, "limit": NETEM_PACKETS}
                link.tc("replace", "netem", index, "1:", **netem)
            else:
                link.tc("del", index=index, parent=TC_H_ROOT)

        try:
            self.run(self._netlink, replace)
        except LookupError as error:
            if delay_ms or loss_percent:
                raise UnsupportedError(
                    "this kernel cannot delay or lose packets",
                    "it has no netem (CONFIG_NET_SCH_NETEM, module sch_netem)",
                ) from error

    def one_segment_at_a_time(self) -> None:
        """Hand each segment that this host sends to the link by itself. A veth carries many as one packet otherwise."""
        self.run(
            self._netlink,
            lambda link: link.link("set", index=socket.if_nametoindex(DEVICE), gso_max_segs=1),
        )

    def hold(self) -> None:
        """Hold what this host sends to its peer until `release()`. No packet is lost, and they stay in order.

        The host forgets its peer's link address. The kernel queues packets for a neighbour without an address, so
        this works without netem. A scenario uses it to order packets that would otherwise race.
        """
        self.run(self._netlink, lambda link: self._neighbours(link, "del"))

    def release(self) -> None:
        """Send the packets that `hold()` has held back."""
        self.run(self._netlink, lambda link: self._neighbours(link, "replace"))

    def lose(self) -> None:
        """Lose what this host sends to its peer until `release()`: it goes to a link address that nobody has."""
        self.run(self._netlink, lambda link: self._neighbours(link, "replace", NOBODYS_MAC))

    def blackhole(self, prefix: str) -> None:
        """Route `prefix` from the peer to this host, and drop it here. So its addresses never answer."""
        family = socket.AF_INET6 if ":" in prefix else socket.AF_INET
        self.run(self._netlink, lambda link: link.route("replace", dst=prefix, type="blackhole", family=family))
        self.peer.run(
            self.peer._netlink,
            lambda link: link.route("replace", dst=prefix, gateway=self.address(family), family=family),
        )

    def drop(self, hook: str, port: int) -> None:
        """Let this host's firewall drop what comes for a port (hook `input`), or what goes to one (`output`)."""
        chain = f"add chain inet lab {hook} {{ type filter hook {hook} priority 0 ; }}"
        rules = f"add table inet lab\n{chain}\nadd rule inet lab {hook} tcp dport {port} counter drop\n"
        try:
            nft = self.spawn(["nft", "-f", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            raise UnsupportedError("the lab's firewall needs the program nft", "package nftables") from None
        _, complaint = nft.communicate(rules)
        if nft.returncode:
            raise UnsupportedError("this kernel takes no firewall rule", complaint.strip().splitlines()[-1])

    def _netlink(self, action: Callable[[Any], T]) -> T:
        """`action` with an IPRoute of this host. ENOENT and ENODEV become LookupError."""
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            with IPRoute() as link:
                return action(link)
        except NetlinkError as error:
            if error.code in (errno.ENOENT, errno.ENODEV):
                raise LookupError(str(error)) from error
            if error.code in (errno.EPERM, errno.EACCES):
                raise _not_permitted(OSError(error.code, str(error))) from error
            raise

    def _set_link(self, state: str) -> None:
        self.run(
            self._netlink,
            lambda link: link.link("set", index=socket.if_nametoindex(DEVICE), state=state),
        )

    def _neighbours(self, link: Any, command: str, mac: str | None = None) -> None:
        for address, family in ((self.peer.ipv4, socket.AF_INET), (self.peer.ipv6, socket.AF_INET6)):
            details = {"state": "permanent", "lladdr": mac or self.peer.mac} if command == "replace" else {}
            link.neigh(command, dst=address, ifindex=socket.if_nametoindex(DEVICE), family=family, **details)

    def _configure(self, link: Any) -> None:
        """Set addresses and neighbours, without duplicate address detection and ARP: they work at once."""
        from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

        for family in ("ipv4", "ipv6"):
            # The kernel asks user space for unresolved neighbours and gets no answer: see hold().
            for name, value in (("mcast_solicit", 0), ("app_solicit", 10_000), ("unres_qlen_bytes", 1 << 24)):
                self.sysctl(f"{family}/neigh/{DEVICE}/{name}", value)
        for name, value in (("keep_addr_on_down", 1), ("router_solicitations", 0), ("accept_ra", 0)):
            self.sysctl(f"ipv6/conf/{DEVICE}/{name}", value)
        index = socket.if_nametoindex(DEVICE)
        link.link("set", index=1, state="up")
        link.addr("add", index=index, address=self.ipv4, prefixlen=24)
        link.addr("add", index=index, address=self.ipv6, prefixlen=64, family=socket.AF_INET6, flags=IFA_F_NODAD)
        link.link("set", index=index, state="up")
        self._neighbours(link, "replace")

    def _close(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was never read may be lost
                        pipe.close()
        for made in self._sockets:
            made.close()
        self._namespace.close()


class Lab:
    """A `client` and a `server`, each with an IPv4 and an IPv6 address, and one link between them."""

    client: Host
    server: Host

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.client, self.server

    def __enter__(self) -> Lab:
        sweep()
        number = next(_numbers)
        with self._stack:
            self.client = Host("client", 1, number)
            self._stack.callback(self.client._close)
            self.server = Host("server", 2, number)
            self._stack.callback(self.server._close)
            self.client.peer, self.server.peer = self.server, self.client
            self.client.run(self.client._netlink, self._join)
            # The link is removed first. A socket that is still open keeps its namespace alive.
            self._stack.callback(self.client.run, self.client._netlink, self._part)
            for host in self.hosts:
                host.run(host._netlink, host._configure)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _join(self, link: Any) -> None:
        server = os.open(Path("/run/netns", self.server.netns), os.O_RDONLY | os.O_CLOEXEC)
        try:
            link.link(
                "add",
                ifname=DEVICE,
                kind="veth",
                address=self.client.mac,
                peer={"ifname": DEVICE, "address": self.server.mac, "net_ns_fd": server},
            )
        except Exception as error:
            if getattr(error, "code", None) == errno.EOPNOTSUPP:
                raise UnsupportedError("this kernel cannot join two namespaces", "CONFIG_VETH is not set") from error
            raise
        finally:
            os.close(server)

    def _part(self, link: Any) -> None:
        with contextlib.suppress(LookupError, OSError):
            link.link("del", index=socket.if_nametoindex(DEVICE))

    def freeze(self) -> None:
        """Take the link down. When this returns, no packet is in flight, and no counter of packets changes any more."""
        self.client._set_link("down")
        self.flush()

    def flush(self) -> None:
        """Wait until the hosts have processed all packets that were sent before. (System calls return earlier.)"""
        for host in self.hosts:
            host.run(_flush_backlogs)

    def thaw(self) -> None:
        """Bring the link up again. Retransmissions continue when their timers expire."""
        self.client._set_link("up")
        for host in self.hosts:
            host.release()


def _flush_backlogs() -> None:
    """Wait until every CPU has processed the packets that it received before.

    A veth puts packets into the CPU's backlog, a queue. A packet to ourselves passes this queue after them.
    """
    allowed = os.sched_getaffinity(0)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
            echo.bind(("127.0.0.1", 0))
            for cpu in allowed:
                os.sched_setaffinity(0, {cpu})
                echo.sendto(b"", echo.getsockname())
                echo.recv(1)
    finally:
        os.sched_setaffinity(0, allowed)


def _not_permitted(error: OSError) -> OSError | NotPermittedError:
    if error.errno not in (errno.EPERM, errno.EACCES):
        return error
    return NotPermittedError(
        f"cannot set up the lab's network: {error.strerror}",
        "run as root, or with CAP_NET_ADMIN",
        ("CAP_NET_ADMIN",),
    )


@contextlib.contextmanager
def held(host: Host) -> Iterator[None]:
    """`with held(lab.server):` sends what the server sends inside the block at its end, in order."""
    host.hold()
    try:
        yield
    finally:
        host.release()
