"""Two hosts and a connection between them, as the recorded tests of several tools make it."""

from __future__ import annotations

from socket import IPPROTO_TCP, TCP_NODELAY
from typing import NamedTuple

from tests.record import Call, Script, Socket
from tests.record.script import Process


class Pair(NamedTuple):
    """Both ends of a connection, of a process each. `local` is the client's port."""

    client: Process
    server: Process
    near: Socket
    far: Socket
    local: Call

    @property
    def ends(self) -> tuple[Socket, Socket, Call]:
        return self.near, self.far, self.local


def pair(script: Script, port: int, family: str = "4", *, rport: int | None = None) -> Pair:
    """A new connection to `port` of the server, whose client sends at once. `rport`: the client's port.

    Of the family "mapped" only the client's socket is: the server listens on IPv4.
    """
    client, server = script.client.process("client"), script.server.process("server")
    listener = server.listener(port, script.server.address("4" if family == "mapped" else family))
    near = client.socket(family)
    if rport is not None:
        near.bind(script.client.address(family), rport)
    near.connect(script.server.address(family), port)
    near.option(IPPROTO_TCP, TCP_NODELAY, 1)
    return Pair(client, server, near, listener.accept(), near.name())


def exchange(near: Socket, far: Socket, there: int = 100, back: int = 0) -> None:
    """One end sends, and the other one answers. All that the first has sent is acknowledged."""
    near.send_all(there)
    far.read(there)
    if back:
        far.send_all(back)
        near.read(back)
    near.until_acknowledged()


def without_timers(script: Script) -> None:
    """For a minute the client has neither a tail loss probe nor an RTO."""
    script.client.sysctl("tcp_early_retrans", 0)
    script.client.exec("ip", "route", "replace", f"{script.server.ipv4}/32", "dev", "veth0", "rto_min", "60s")
