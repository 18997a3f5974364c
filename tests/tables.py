"""What stands in the table of connections."""

from __future__ import annotations

from tcpscope.kernel.loaded import tcp_sockets
from tcpscope.lab.hosts import Host
from tcpscope.schema import Field, Layout
from tcpscope.session import Session


def left(session: Session, host: Host) -> int:
    """How many entries of this host there are."""
    address = Layout("sk", 8, (Field("sk", 0, 8, "Q", "int", "", "", None, None),))
    connection = session.spec.layout("connection").select(["netns"])
    places = 70_000 + 2 * tcp_sockets()  # sockets of the whole machine are in it
    entries = session.loaded.entries("connections", address, connection, places)
    return sum(row.netns == host.inode for _, _, row in entries)
