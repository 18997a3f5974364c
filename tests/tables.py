"""What stands in the tables of the probe `connections`."""

from __future__ import annotations

from tcpscope.kernel.loaded import tcp_sockets
from tcpscope.kernel.spec import Spec
from tcpscope.lab.hosts import Host
from tcpscope.schema import Field, Layout
from tcpscope.session import Session

CONNECTIONS = Spec.of("connections")


def left(session: Session, host: Host) -> list[str]:
    """The tables that have entries of this host, once for each."""
    address = Layout("sk", 8, (Field("sk", 0, 8, "Q", "int", "", "", None, None),))
    connection = CONNECTIONS.layout("connection").select(["netns"])
    address_of_listener = CONNECTIONS.layout("listen_key", internal=True).select(["netns"])
    listener = CONNECTIONS.layout("listening", internal=True).select(["sockets"])
    entries = session.loaded.entries
    places = 70_000 + 2 * tcp_sockets()  # in the table of connections are those of the whole machine
    return [
        *(
            "connections"
            for _, _, row in entries("connections", address, connection, places)
            if row.netns == host.inode
        ),
        *(
            "listening"
            for _, row, _ in entries("listening", address_of_listener, listener, 10_000)
            if row.netns == host.inode
        ),
    ]
