"""The filters that all tools share.

A row must match all options that are given. It matches an option if it matches one of its values. `--port` matches
either end. A value that is not known matches no filter: with `--pid` a row without an owner is not shown.

An IPv4-mapped IPv6 address (::ffff:192.0.2.1) is IPv4 everywhere in tcpscope: it has family 4 and is written
192.0.2.1. Addresses are stored and compared as 16 bytes in the mapped form, in which an IPv4 prefix is 96 bits
longer. `::/0` is all of IPv6 and none of IPv4.

`Filter.matches` specifies the kernel's filter (bpf/filter.bpf.h).
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from tcpscope.errors import NotPermittedError, UnsupportedError, UsageError, did_you_mean
from tcpscope.kernel import netns as namespaces
from tcpscope.kernel import pidns
from tcpscope.quantities import whole

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Family = Literal[4, 6]
Ports = int | str | Iterable[int | str]
"""Ports as a caller gives them: a number, text with commas (`80,8000-8100`), or several of these."""
Numbers = int | str | Iterable[int | str]
"""PIDs, users, cgroups or namespaces as a caller gives them: one, text with commas, or several of these."""
Names = str | Iterable[str]
"""Names as a caller gives them: text with commas, or several of these."""
Networks = str | Address | Network | Iterable[str | Address | Network]
"""Addresses and networks as a caller gives them: one, text with commas, or several of these."""

_MAPPED = bytes(10) + b"\xff\xff"
_COMM_SIZE = 15  # TASK_COMM_LEN without its NUL
_MAX_PID = 4_194_304  # PID_MAX_LIMIT
_MAX_UID = 2**32 - 2  # 2**32 - 1 is "no user"
_HOST = re.compile(r"(?=.{1,253}$)(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z][A-Za-z0-9_-]{0,62}\.?")
_VALUES = ("pid", "comm", "uid", "cgroup", "netns")  # options whose values are compared for equality
_MOUNTINFO = Path("/proc/self/mountinfo")
_Wanted = TypeVar("_Wanted")


class PortRange(NamedTuple):
    """The ports from `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows to show. A field that is None or empty matches every row. One number or name stands for a tuple.

    `cgroup` has cgroup v2 ids; each means that cgroup and all below it. `netns` has inode numbers.
    """

    pid: tuple[int, ...] = ()
    comm: tuple[str, ...] = ()
    uid: tuple[int, ...] = ()
    cgroup: tuple[int, ...] = ()
    netns: tuple[int, ...] = ()
    family: Family | None = None
    lport: tuple[PortRange, ...] = ()
    rport: tuple[PortRange, ...] = ()
    port: tuple[PortRange, ...] = ()
    laddr: tuple[Network, ...] = ()
    raddr: tuple[Network, ...] = ()

    @property
    def names_ends(self) -> bool:
        """Whether it leaves out connections of the same process, by their addresses, ports or family."""
        return any((self.family, self.lport, self.rport, self.port, self.laddr, self.raddr))

    @property
    def names_owners(self) -> bool:
        """Whether it leaves out connections of other processes."""
        return any((self.pid, self.comm, self.uid, self.cgroup))

    @property
    def names_ports(self) -> bool:
        """Whether it leaves out connections to other ports."""
        return any((self.lport, self.rport, self.port))

    def __post_init__(self) -> None:
        for name in _VALUES:
            value = getattr(self, name)
            if not isinstance(value, tuple):
                object.__setattr__(self, name, () if value is None else (value,))

    @classmethod
    def from_options(
        cls,
        *,
        pid: Numbers | None = None,
        comm: Names | None = None,
        uid: Numbers | None = None,
        cgroup: Numbers | None = None,
        netns: Numbers | None = None,
        ipv4: bool = False,
        ipv6: bool = False,
        family: int | None = None,
        lport: Ports | None = None,
        rport: Ports | None = None,
        port: Ports | None = None,
        laddr: Networks | None = None,
        raddr: Networks | None = None,
        told: Callable[[str], object] = lambda line: None,
    ) -> Filter:
        """Make a filter of values as on the command line. Raises `UsageError`.

        None means that the option is not given. `ipv4` and `ipv6` are the flags -4 and -6. `family` is for callers
        that have the number 4 or 6. `told` gets a line for each host name that was looked up.
        """
        wanted = cls(
            pid=_each(parse_pid, pid, "PID"),
            comm=_each(parse_comm, comm, "name"),
            uid=_each(parse_uid, uid, "user"),
            cgroup=_each(parse_cgroup, cgroup, "cgroup"),
            netns=_each(parse_netns, netns, "network namespace"),
            family=_family(ipv4, ipv6, family),
            lport=_given(parse_ports, lport) or (),
            rport=_given(parse_ports, rport) or (),
            port=_given(parse_ports, port) or (),
            laddr=() if laddr is None else parse_networks(laddr, told),
            raddr=() if raddr is None else parse_networks(raddr, told),
        )
        wanted._check_versions()
        wanted._check_ports()
        return wanted

    @property
    def is_empty(self) -> bool:
        """Whether every row matches."""
        return self == Filter()

    def matches(self, row: object) -> bool:
        """Whether a row (a mapping, or an object with attributes) matches.

        Its fields have the names of the filter's fields. Addresses are 16 bytes. None, or no such field, means "not
        known". Only the kernel knows whether a cgroup is below one of the filter's; it says so in `in_cgroup`.
        """
        get: Callable[[str], Any]
        get = row.get if isinstance(row, Mapping) else lambda name: getattr(row, name, None)
        for name in ("pid", "comm", "uid", "netns"):
            wanted = getattr(self, name)
            if wanted and get(name) not in wanted:
                return False
        if self.family is not None and get("family") != self.family:
            return False
        if self.cgroup and get("cgroup") not in self.cgroup and not get("in_cgroup"):
            return False
        return (
            _in_any(self.lport, get("lport"))
            and _in_any(self.rport, get("rport"))
            and (_in_any(self.port, get("lport")) or _in_any(self.port, get("rport")))
            and _in_networks(self.laddr, get("laddr"))
            and _in_networks(self.raddr, get("raddr"))
        )

    def describe(self) -> list[tuple[str, str]]:
        """The options that make this filter, as pairs of name and value."""
        options = [(f"--{name}", ",".join(map(str, values))) for name in _VALUES if (values := getattr(self, name))]
        if self.family:
            options.append((f"-{self.family}", ""))
        for name in ("lport", "rport", "port"):
            if ranges := getattr(self, name):
                options.append((f"--{name}", _joined(ranges)))
        for name in ("laddr", "raddr"):
            if networks := getattr(self, name):
                options.append((f"--{name}", ",".join(map(network_text, networks))))
        return options

    def _check_versions(self) -> None:
        asked: dict[str, int] = {f"-{self.family}": self.family} if self.family else {}
        for option, networks in (("--laddr", self.laddr), ("--raddr", self.raddr)):
            versions = {network.version for network in networks}
            if len(versions) == 1:
                asked[option] = versions.pop()
        if len(set(asked.values())) > 1:
            raise UsageError(
                ", ".join(f"{option} asks for IPv{version}" for option, version in asked.items()),
                "a connection is of one of them",
            )

    def _check_ports(self) -> None:
        if not (self.port and self.lport and self.rport):
            return
        if not any(_overlap(a, b) for a in self.port for b in self.lport + self.rport):
            raise UsageError(
                f"--port {_joined(self.port)} is neither in --lport {_joined(self.lport)}"
                f" nor in --rport {_joined(self.rport)}"
            )


def parse_pid(value: str | int) -> int:
    """The id of a process that exists."""
    pid = _number(value, "PID", 1, _MAX_PID)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        raise UsageError(f"no process with PID {pid}") from None
    except PermissionError:
        pass  # it exists
    process = _process_of_thread(pid)
    if process != pid:
        raise UsageError(f"{pid} is a thread", f"its process has PID {process}")
    return pid


def parse_comm(value: str) -> str:
    """The name of a process as the kernel has it, at most 15 bytes."""
    if not isinstance(value, str):
        raise UsageError(f"process name {value!r} is no text")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise UsageError(f"process name {value!r} is not UTF-8") from None
    if not 0 < size <= _COMM_SIZE:
        raise UsageError(f"process name {value!r} has {size} bytes", f"the kernel keeps 1 to {_COMM_SIZE}")
    if "\0" in value:
        raise UsageError(f"process name {value!r} has a NUL in it")
    return value


def parse_uid(value: str | int) -> int:
    """A user's number or name."""
    text = str(value).strip()
    if _is_number(text):
        return _number(text, "user id", 0, _MAX_UID)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        names = [user.pw_name for user in pwd.getpwall()]
        raise UsageError(f"no user {text!r}", did_you_mean(text, names)) from None


def parse_cgroup(value: str | int) -> int:
    """The id of a cgroup v2, from the id itself or from its path.

    The path may be that of the file system (/sys/fs/cgroup/system.slice) or that of /proc/PID/cgroup
    (/system.slice). An id is not checked: its cgroup may be outside of our cgroup namespace.
    """
    text = str(value).strip()
    if _is_number(text):
        return _number(text, "cgroup id", 1, 2**64 - 1)
    mount = cgroup_mount()
    below = Path(text)
    if not below.is_relative_to(mount):
        below = mount / text.lstrip("/")
    try:
        path = below.resolve(strict=True)
        if text and path.is_dir() and path.is_relative_to(mount.resolve()):
            return path.stat().st_ino
    except (OSError, ValueError, RuntimeError):
        pass
    raise UsageError(f"no cgroup {text!r} in {mount}", did_you_mean(below.name, _folders(below.parent)))


def parse_netns(value: str | int) -> int:
    """The inode number of a network namespace: the number, its name in /run/netns, `pid:N`, or a path to it.

    If it cannot be known whether the namespace of a number exists, the number is taken, with a warning.
    """
    text = str(value).strip()
    names = [path.name for path in namespaces.named()]
    if isinstance(value, str) and text in names:
        path = str(namespaces.NAMED / text)
    elif _is_number(text):
        inode = _number(text, "network namespace", 1, 2**32 - 1)
        exists = namespaces.exists(inode)
        if exists is False:
            raise UsageError(f"no network namespace {inode}", "no process, mount, open file or socket holds it")
        if exists is None:
            warnings.warn(f"network namespace {inode} is not found; not all processes can be looked at", stacklevel=2)
        return inode
    elif text.startswith("pid:"):
        path = f"/proc/{parse_pid(text.removeprefix('pid:'))}/ns/net"
        if not pidns.proc_is_ours():
            raise UsageError(f"{text!r}: /proc is not that of this PID namespace", "give the namespace's inode number")
    elif "/" in text:
        path = text
    else:
        raise UsageError(
            f"no network namespace {text!r} in {namespaces.NAMED}",
            did_you_mean(text, names) or "give a name, an inode number or pid:N",
        )
    try:
        return namespaces.inode_of(path)
    except PermissionError:
        raise NotPermittedError(
            f"cannot look at the network namespace {text!r}", "needs CAP_SYS_PTRACE", ("CAP_SYS_PTRACE",)
        ) from None
    except (OSError, ValueError):
        raise UsageError(f"{text!r} is not a network namespace") from None


def parse_ports(value: Ports) -> tuple[PortRange, ...]:
    """Ports and ranges of ports (`80,443,8000-8100`), sorted. Ranges that touch are joined."""
    merged: list[PortRange] = []
    for ports in sorted(map(_port_range, map(str, _items(value, "port")))):
        before = merged.pop() if merged and ports.first <= merged[-1].last + 1 else ports
        merged.append(PortRange(before.first, max(before.last, ports.last)))
    return tuple(merged)


def parse_networks(value: Networks, told: Callable[[str], object] = lambda line: None) -> tuple[Network, ...]:
    """Addresses and networks (`192.0.2.1,2001:db8::/32`), IPv4 first. Networks that touch are joined.

    The name of a host stands for all of its addresses, which are looked up now; `told` gets a line that says them.
    """
    networks = [network for item in _items(value, "address") for network in _networks(str(item), told)]
    ipv4 = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
    ipv6 = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return (*ipaddress.collapse_addresses(ipv4), *ipaddress.collapse_addresses(ipv6))


def parse_network(text: str) -> Network:
    """A network, or an address as one. A v4-mapped one is IPv4."""
    return _network(text.strip())


@lru_cache(maxsize=1 << 14)
def address_bytes(address: str | Address) -> bytes:
    """The 16 bytes of an address, IPv4 in its mapped form."""
    try:
        packed = ipaddress.ip_address(address).packed
    except ValueError:
        raise UsageError(f"{address!r} is not an address", "such as 192.0.2.1 or 2001:db8::1") from None
    return packed if len(packed) == 16 else _MAPPED + packed


@lru_cache(maxsize=1 << 14)
def address_text(address: bytes) -> str:
    """The inverse of `address_bytes`. A mapped address is written as IPv4."""
    if address.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)


def network_bytes(network: Network) -> tuple[bytes, bytes]:
    """Address and mask of a network, 16 bytes each, for the kernel's filter."""
    mask = network.netmask.packed
    return address_bytes(network.network_address), mask.rjust(16, b"\xff")


def network_text(network: Network) -> str:
    """The text of a network, without the prefix length if it is one address."""
    return str(network if network.num_addresses > 1 else network.network_address)


def _given(parse: Callable[[Any], _Wanted], value: object) -> _Wanted | None:
    return None if value is None else parse(value)


def _each(parse: Callable[[Any], _Wanted], value: Numbers | Names | None, what: str) -> tuple[_Wanted, ...]:
    """What `parse` makes of each value, without repetitions."""
    return () if value is None else tuple(dict.fromkeys(map(parse, _items(value, what))))


def _items(value: Any, what: str) -> list[Any]:
    """The values of a text with commas, or of several such values. What is no text stays what it is."""
    several = value if isinstance(value, Iterable) and not isinstance(value, str | Network) else [value]
    items = [item for one in several for item in (map(str.strip, one.split(",")) if isinstance(one, str) else [one])]
    if "" in items or not items:
        text = ",".join(map(str, items))
        raise UsageError(f"a value is missing in {text!r}", f"give one {what} or more, separated by commas")
    return items


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _number(value: str | int, what: str, lowest: int, highest: int) -> int:
    number = whole(str(value), highest)
    if number is None or number < lowest:
        raise UsageError(f"{what} {str(value).strip()!r} is not a number from {lowest} to {highest}")
    return number


def _port_range(text: str) -> PortRange:
    bounds = [bound.strip() for bound in text.split("-")]
    if len(bounds) > 2 or not all(map(_is_number, bounds)):
        port = _port_of_service(text)
        if port is None:
            hint = "such as 443, 8000-8100 or https"
            raise UsageError(f"port {text!r} is neither a number, nor a range, nor a service in /etc/services", hint)
        return PortRange(port, port)
    first, last = (_number(bound, "port", 1, 65535) for bound in (bounds[0], bounds[-1]))
    if first > last:
        raise UsageError(f"port range {text!r} is reversed", f"did you mean {last}-{first}?")
    return PortRange(first, last)


def _port_of_service(name: str) -> int | None:
    try:
        return socket.getservbyname(name, "tcp") if name.isascii() and name.isprintable() else None
    except OSError:
        return None


def _networks(text: str, told: Callable[[str], object]) -> list[Network]:
    """The network that `text` is, or all addresses of the host whose name it is."""
    if not _HOST.fullmatch(text):
        return [_network(text)]
    try:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"no address is known of the host {text!r}", str(error.strerror)) from None
    addresses = list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))
    told(f"{text} is {', '.join(addresses)}")
    return list(map(_network, addresses))


def _network(text: str) -> Network:
    if "%" in text:
        raise UsageError(f"{text!r} has a zone", f"leave out '%' and what follows: {text.partition('%')[0]!r}")
    try:
        network = _unmapped(ipaddress.ip_network(text, strict=False))
    except ValueError:
        hint = "such as 192.0.2.1, 10.0.0.0/8 or 2001:db8::/32"
        raise UsageError(f"{text!r} is neither an address nor a network", hint) from None
    if address_bytes(text.partition("/")[0]) != address_bytes(network.network_address):
        raise UsageError(f"{text!r} has bits set behind its prefix", f"the network is {network}")
    return network


def _unmapped(network: Network) -> Network:
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def _family(ipv4: bool, ipv6: bool, family: int | None) -> Family | None:
    if family not in (None, 4, 6):
        raise UsageError(f"family {family!r} is neither 4 nor 6")
    ipv4 |= family == 4
    ipv6 |= family == 6
    if ipv4 and ipv6:
        raise UsageError("-4 and -6 exclude each other", "leave out both to see IPv4 and IPv6")
    return 4 if ipv4 else 6 if ipv6 else None


def _process_of_thread(pid: int) -> int:
    """The process of a thread, or the process itself (proc_pid_status(5), `Tgid`)."""
    if not pidns.proc_is_ours():
        return pid
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return pid
    found = re.search(r"^Tgid:\s+(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else pid


def cgroup_mount() -> Path:
    """Where cgroup v2 is mounted: not always /sys/fs/cgroup (proc_pid_mountinfo(5))."""
    for line in os.fsdecode(_MOUNTINFO.read_bytes()).splitlines():
        mount, _, source = line.partition(" - ")
        if source.startswith("cgroup2 "):
            escaped = mount.split(" ")[4]
            return Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped))
    raise UnsupportedError("cgroup v2 is not mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")


def _folders(parent: Path) -> Iterator[str]:
    try:
        yield from (entry.name for entry in parent.iterdir() if entry.is_dir())
    except (OSError, ValueError):
        return


def _in_any(ranges: tuple[PortRange, ...], port: int | None) -> bool:
    return not ranges or any(port in ports for ports in ranges)


def _in_networks(networks: tuple[Network, ...], address: bytes | None) -> bool:
    return not networks or (address is not None and any(_ip(address) in network for network in networks))


@lru_cache(maxsize=1 << 14)
def _ip(address: bytes) -> Address:
    return ipaddress.ip_address(address[12:] if address.startswith(_MAPPED) else address)


def _overlap(a: PortRange, b: PortRange) -> bool:
    return a.first <= b.last and b.first <= a.last


def _joined(ranges: tuple[PortRange, ...]) -> str:
    return ",".join(map(str, ranges))
