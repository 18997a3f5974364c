from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.streams import Streams


@dataclass
class PeerGone(Streams):
    """The server's host is gone, and its client waits.

    A client has three connections to a server and sends on each. Nothing answers any more, in neither direction, as if
    the server had lost its power. No RST and no ICMP message says so. The client's kernel sends again after twice the
    time each time, for about a quarter of an hour.
    """

    title = "a remote host is gone without a word"

    def prepare(self, lab: Lab) -> None:
        self.start(lab)

    def act(self, lab: Lab) -> None:
        for host in lab.hosts:
            host.lose()
        self.step("server", "is gone: no packet arrives in either direction")
        self.send(1000)
        self.step("client", "sends 1000 bytes on each connection")
        self.last()
