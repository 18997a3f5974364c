from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.closing import Closing
from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter


@dataclass
class ResetInRequest(Closing):
    """The server resets connections in the middle of a request.

    Each client connects, sends a request and waits for the answer. The server reads the request and closes with
    SO_LINGER of 0: its kernel sends a RST in place of an answer. So does a server that dies, or a load balancer that
    has forgotten the connection. Let the tool watch the client: `diagnose --netns {client}`.
    """

    title = "the server answers a request with a RST"
    counters: ClassVar[tuple[str, ...]] = ("TcpOutRsts", "TcpEstabResets")

    clients: int = parameter(12, "how many connections")
    seconds: float = parameter(4.0, "in which time")

    def prepare(self, lab: Lab) -> None:
        self.serve(lab, "reset")

    def act(self, lab: Lab) -> None:
        for _ in self.rounds(self.clients, self.seconds):
            self.request(1)
        reset = sum(client.finish_errno == errno.ECONNRESET for client in self._clients.values())
        self.step("client", f"{self.clients} requests, {reset} of them ended with ECONNRESET")

    def calm(self, lab: Lab) -> bool:
        return not any(found.state == "ESTABLISHED" for host in lab.hosts for found in host.sockets())
