from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.closing import Closing
from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter


@dataclass
class ClosedUnread(Closing):
    """The server closes connections before it has read the request.

    Each client connects and sends a request. The server answers and closes, and has not read the request: a server
    that refuses a large upload does this. The kernel then sends a RST in place of a FIN. The client may lose an answer
    that has reached it already.
    """

    title = "the server answers and closes before it has read the request: the close becomes a reset"
    counters: ClassVar[tuple[str, ...]] = ("TcpExtTCPAbortOnClose", "TcpOutRsts", "TcpEstabResets")

    clients: int = parameter(12, "how many connections")
    seconds: float = parameter(4.0, "in which time")

    def prepare(self, lab: Lab) -> None:
        self.serve(lab, "unread")

    def act(self, lab: Lab) -> None:
        for _ in self.rounds(self.clients, self.seconds):
            self.request(1)
        self.step("client", f"{self.clients} requests")

    def calm(self, lab: Lab) -> bool:
        return not any(found.state == "ESTABLISHED" for host in lab.hosts for found in host.sockets())
