from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Scenario, describe, parameter


@dataclass
class BacklogCut(Scenario):
    """A server asks for a long queue, gets a short one, and a burst nearly fills it.

    listen() cuts its backlog to net.core.somaxconn, without an error. Clients connect at once. The server needs a while
    for each. All are served, but a few more clients would have been refused: --clients 20 shows that.
    """

    title = "somaxconn cuts a backlog, and a burst nearly fills the queue"
    counters = ("TcpPassiveOpens", "TcpExtListenOverflows")

    clients: int = parameter(9, "how many clients connect at once")
    backlog: int = parameter(64, "argument of the server's listen()")
    somaxconn: int = parameter(8, "sysctl somaxconn")
    pause_ms: int = parameter(300, "how long the server needs for a connection")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.server, "somaxconn", self.somaxconn)
        self.listen(lab, self.backlog, closes="unread", pause=self.pause_ms / 1000)

    def act(self, lab: Lab) -> None:
        self.connect(self.clients)
        self.queued(lab, min(self.clients, self.somaxconn) - 1)
        self.step("server", f"{self.waiting(lab)} wait for accept()")
        self.step("client", f"{self.clients} connects: {describe(self.connected(self.clients))}")

    def calm(self, lab: Lab) -> bool:
        return self.waiting(lab) == 0
