"""What the tests of `connect` share: attempts, and the rows that they must have come to.

The rows of a scenario are all that its client has: nothing comes later, and nothing twice.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Sequence
from typing import Any

from tests.record import Call, Host, Process, Script, Seen, Socket, Watch
from tests.record.script import IPPROTO_TCP, TCP_SYNCNT

CONNECT = Watch("connect")
"""Without a filter: an attempt may have no port at all."""
NETWORKS = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")
OURS = ("--raddr", ",".join(NETWORKS))  # nobody else's: RFC 5737, RFC 3849
FAILED = Watch("connect", "--failed", *OURS)
COUNTED = Watch("connect", "--count", "--by", "netns,raddr,rport", *OURS)
BY_INTERVAL = Watch("connect", "--count", "--by", "netns,comm,outcome", "-i", "1", "--time", "none", *OURS)

FAMILIES = ("4", "6", "mapped")
SILENT = {"4": "198.51.100.7", "6": "2001:db8:51::7", "mapped": "::ffff:198.51.100.7"}  # never answer
NOWHERE = {"4": "203.0.113.7", "6": "2001:db8:f::7", "mapped": "::ffff:203.0.113.7"}  # no route goes there
NOBODY = "192.0.2.9"  # on the link, but not there
BEHIND = "203.0.113.130"  # the server is asked to forward, and has no route
PORT, REFUSED, OTHER = 7000, 7001, 7002
IPPROTO_MPTCP, TCP_FASTOPEN_CONNECT = 262, 30
SYNCNT_1 = ((IPPROTO_TCP, TCP_SYNCNT, 1),)
PATIENT = ((IPPROTO_TCP, TCP_SYNCNT, 127),)  # hours

Row = dict[str, Any]
Options = Sequence[tuple[int, int, int | bytes]]


class Attempt:
    """A connect(), blocking or not, as its program saw it. `socket` is still open."""

    def __init__(
        self, process: Process, address: str, port: object, how: str = "blocking", *,
        local: tuple[str, int] | None = None, options: Options = (), protocol: int = 0, socket: Socket | None = None,
    ) -> None:  # fmt: skip
        self.process = process
        self.socket = socket or made(process, address, local=local, options=options, protocol=protocol)
        if how == "blocking":
            self.first = self.last = self.socket.connect(address, port, may_fail=True)
            self._error = None
        else:
            self.first = self.socket.start(address, port)
            self.last = self.socket.until_ready(4)
            self._error = self.socket("get", 1, 4, 4)

    @property
    def errno(self) -> str:
        """What came of it: the errno's name."""
        if self._error is None or self.first.errno not in ("none", "EINPROGRESS"):
            return self.first.errno
        return errno.errorcode[self._error.ret] if self._error.ret else "none"

    @property
    def span_us(self) -> float:
        """From before the first call to the moment when its outcome was known."""
        return self.last.end_us - self.first.begin_us


class Started(Attempt):
    """A non-blocking one that is not waited for. `finish()` does."""

    def __init__(
        self, process: Process, address: str, port: object, *, local: tuple[str, int] | None = None,
        options: Options = (), socket: Socket | None = None,
    ) -> None:  # fmt: skip
        self.process = process
        self.socket = socket or made(process, address, local=local, options=options)
        self.first = self.last = self.socket.start(address, port)
        self._error = None

    def finish(self) -> Started:
        self.last = self.socket.until_ready(4)
        self._error = self.socket("get", 1, 4, 4)
        return self


def made(
    process: Process, address: str, *, local: tuple[str, int] | None = None, options: Options = (), protocol: int = 0
) -> Socket:
    """A socket for this address."""
    found = process.socket("6" if ":" in address else "4", protocol=protocol)
    for option in options:
        found.option(*option)
    if local:
        found.bind(*local)
    return found


def silence(script: Script) -> None:
    """From now on nobody answers at the addresses of SILENT."""
    for network in ("198.51.100.0/24", "2001:db8:51::/64"):
        script.server.blackhole(network)


def listening(script: Script, *ports: int, fastopen: int = 0) -> Process:
    """A server for both families, which accepts nobody."""
    server = script.server.process("server")
    for port in ports or (PORT,):
        listener = server.listener(port, "::", dual=True)
        if fastopen:
            listener.option(IPPROTO_TCP, 23, fastopen)
    return server


def syn_retransmissions(host: Host) -> Call:
    return host.counter("TcpExtTCPSynRetrans")


def shown(address: str) -> str:
    """As a row has it."""
    return address.removeprefix("::ffff:")


def version(family: str) -> int:
    return 6 if family == "6" else 4


def sees_every_call(seen: Seen) -> bool:
    """Not only the system call connect()."""
    return seen.machine.hook("connections", "attempt", "connected") == "connected__fexit"


def rows(seen: Seen, script: Script, *wanted: Row) -> list[Row]:
    """All rows of the client, which are these: one for each of `wanted`, in this order, and with these values.

    `saw` is not a column: the attempt as its program saw it, or None for one whose process is `by`.
    """
    found = seen.rows(CONNECT, script.client)
    assert len(found) == len(wanted), found
    for row, values in zip(found, wanted, strict=True):
        values = dict(values)
        saw: Attempt | None = values.pop("saw", None)
        process: Process = values.pop("by", None) or (saw.process if saw else None)  # type: ignore[assignment]
        if process is not None:
            assert (row["pid"], row["comm"], row["uid"]) == (process.pid, process.comm, 0), row
        if saw is not None:
            assert row["errno"] == values.pop("errno", saw.errno), row
            if row["latency_us"] is not None:
                assert row["latency_us"] <= saw.span_us + 1, row
        assert {name: row[name] for name in values} == values, row
    return found


def in_networks(row: Row) -> bool:
    return row["raddr"] is not None and any(
        ipaddress.ip_address(row["raddr"]) in ipaddress.ip_network(network) for network in NETWORKS
    )
