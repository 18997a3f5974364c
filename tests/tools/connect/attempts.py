"""Attempts to connect, and the rows that they must have come to."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from tests.record import Call, Host, Process, Script, Seen, Socket, Watch
from tests.record.script import IPPROTO_TCP, POLLOUT, SO_ERROR, SO_REUSEADDR, SOL_SOCKET, TCP_FASTOPEN, TCP_SYNCNT

CONNECT = Watch("connect")
"""Without a filter: an attempt may have no port at all."""

FAMILIES = ("4", "6", "mapped")
SILENT = {"4": "198.51.100.7", "6": "2001:db8:51::7", "mapped": "::ffff:198.51.100.7"}  # never answer
NOWHERE = {"4": "203.0.113.7", "6": "2001:db8:f::7", "mapped": "::ffff:203.0.113.7"}  # no route goes there
PORT, REFUSED, OTHER = 7000, 7001, 7002

Row = dict[str, Any]
Options = Sequence[tuple[int, int, int | bytes]]

SYNCNT_1 = ((IPPROTO_TCP, TCP_SYNCNT, 1),)
REUSED = ((SOL_SOCKET, SO_REUSEADDR, 1),)


class Attempt:
    """A connect() as its program saw it. Its socket stays open.

    `how` is "blocking"; "nonblocking", which waits until the outcome is known; or "started", which does not wait:
    `finish()` does. Without `socket` it makes one.
    """

    def __init__(
        self,
        process: Process,
        address: str,
        port: object,
        how: str = "blocking",
        *,
        local: tuple[str, int] | None = None,
        options: Options = (),
        socket: Socket | None = None,
        may_fail: bool = False,
    ) -> None:
        self.process, self._may_fail = process, may_fail
        self.socket = socket or made(process, address, local=local, options=options)
        self._error: Call | None = None
        if how != "blocking":
            self.socket("blocking", 0, may_fail=may_fail)
        self.first = self._last = self.socket.connect(address, port, may_fail=True)
        if how == "nonblocking":
            self.finish()

    def finish(self) -> Attempt:
        """Wait until the outcome is known, and fetch the error."""
        ready = self.socket("poll", POLLOUT, -1, may_fail=self._may_fail)
        self.fetch()
        self._last = ready
        return self

    def fetch(self) -> Attempt:
        """Fetch the error as it is now."""
        self._last = self._error = self.socket("get", SOL_SOCKET, SO_ERROR, 4, may_fail=self._may_fail)
        return self

    @property
    def _in_progress(self) -> bool:
        return self._error is not None and self.first.errno in ("none", "EINPROGRESS")

    @property
    def errno(self) -> str:
        """What came of it: the errno's name."""
        if self._error is None or not self._in_progress:
            return self.first.errno
        return errno.errorcode[self._error.ret] if self._error.ret else "none"

    @property
    def took_us(self) -> float:
        """From before connect() to after the call that told the outcome."""
        return (self._last if self._in_progress else self.first).end_us - self.first.begin_us


def made(process: Process, address: str, *, local: tuple[str, int] | None = None, options: Options = ()) -> Socket:
    """A socket for this address."""
    found = process.socket("6" if ":" in address else "4")
    for option in options:
        found.option(*option)
    if local:
        found.bind(*local)
    return found


def silence(script: Script) -> None:
    """From now on nobody answers at the addresses of SILENT."""
    for network in ("198.51.100.0/24", "2001:db8:51::/64"):
        script.server.blackhole(network)


def rule(host: Host, hook: str, port: int, verdict: str) -> None:
    """From now on the host's firewall decides so about packets to this port."""
    host.exec("nft", "add table inet filter")
    host.exec("nft", f"add chain inet filter {hook} {{ type filter hook {hook} priority 0 ; }}")
    host.exec("nft", f"add rule inet filter {hook} tcp dport {port} {verdict}")


def listening(script: Script, *ports: int, fastopen: int = 0) -> Process:
    """A server for both families, which accepts nobody."""
    server = script.server.process("server")
    for port in ports or (PORT,):
        listener = server.listener(port, "::", dual=True)
        if fastopen:
            listener.option(IPPROTO_TCP, TCP_FASTOPEN, fastopen)
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
    return seen.machine.hook("attempt", "connected") == "connected__fexit"


def rows(seen: Seen, script: Script, *wanted: Row, host: Host | None = None) -> list[Row]:
    """All rows of the scenario, which are these: one of `wanted` each, in this order and with these values.

    They are the client's, and the other host has none; or those of `host`, whatever the other one has. Two values are
    no columns. `saw` is the attempt, or its one call, as the program saw it: the row has its errno, and a latency that
    is no longer than that took. `by` is the process, where it is not that of the attempt.
    """
    found = seen.rows(CONNECT, host or script.client)
    assert len(found) == len(wanted), found
    assert host or not seen.rows(CONNECT, script.server)
    for row, values in zip(found, wanted, strict=True):
        columns = dict(values)
        saw: Attempt | Call | None = columns.pop("saw", None)
        process: Process = columns.pop("by", None) or saw.process  # type: ignore[union-attr]
        assert (row["pid"], row["comm"], row["uid"]) == (process.pid, process.comm, 0), row
        if saw is not None:
            assert row["errno"] == saw.errno, row
            assert row["latency_us"] is None or row["latency_us"] <= saw.took_us + 1, row
        assert {name: row[name] for name in columns} == columns, row
    return found
