from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenarios.accept_overflow import AcceptOverflow


@dataclass
class ServerDies(AcceptOverflow):
    """The server dies with unread data, and its clients are reset although they had closed in order.

    As in accept-overflow, clients fill the accept queue, send ten bytes and close. Then the server's process
    is killed. Its connections in CLOSE_WAIT have unread data, so the kernel moves them to CLOSE and sends a
    reset (RST, ACK): the data will never reach an application.
    """

    title = "the server dies with unread data: a close becomes a reset"
    counters = ("TcpEstabResets", "TcpOutRsts", "TcpExtListenOverflows")

    def act(self, lab: Lab) -> None:
        super().act(lab)
        self.die(lab)

    def die(self, lab: Lab) -> None:
        """The second half of the fault. When this returns the server's process and its sockets are gone."""
        queued = min(self.clients, self.backlog + 1)
        until(lambda: self._closed(lab) >= queued, f"{queued} closed connections in the accept queue")
        self._look_at_listener(lab)
        self.server.kill()
        self.step("server", f"lab-server is killed, with {queued} connections that nobody accepted")

    def _closed(self, lab: Lab) -> int:
        return sum(found.state == "CLOSE_WAIT" for found in lab.server.sockets())

    def calm(self, lab: Lab) -> bool:
        return lab.server.sockets() == [] and lab.client.sockets() == []
