"""What stands in the table of connections."""

from __future__ import annotations

from tcpscope.lab.hosts import Host
from tcpscope.schema import Field, Layout
from tcpscope.session import Session


def left(session: Session, host: Host) -> int:
    """How many entries of this host there are."""
    address = Layout("sk", 8, (Field("sk", 0, 8, "Q", "int", "", "", None, None),))
    connection = session.spec.layout("connection").select(["netns"])
    entries = session.loaded.entries("connections", address, connection)
    return sum(row.netns == host.inode for _, row in entries)
