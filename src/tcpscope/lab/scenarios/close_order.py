from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import FAMILIES, Scenario, describe, parameter


@dataclass
class CloseOrder(Scenario):
    """A normal close: the end that closes first gets TIME_WAIT.

    The end that closes first goes from ESTABLISHED through FIN_WAIT1 and FIN_WAIT2. The other end goes
    through CLOSE_WAIT and LAST_ACK. FIN_WAIT2 lasts until the other end closes too. If the application has
    closed the socket, the kernel replaces it by a timewait socket meanwhile, and a tool that watches sockets
    sees it go to CLOSE. The timewait socket then stays in TIME_WAIT for a minute. After shutdown() the application
    still has the socket, so that its FIN_WAIT2 is seen.
    """

    title = "who closes first, and where TIME_WAIT stays"
    counters = ("TcpActiveOpens", "TcpPassiveOpens", "TcpOutRsts")

    clients: int = parameter(1, "how many connections, one after the other")
    closes: str = parameter("client", "who closes first", ("client", "server"))
    how: str = parameter("close", "what the end that is first calls: close(), or shutdown()", ("close", "shutdown"))
    pause_ms: int = parameter(100, "how long the other side waits before it closes, too")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    @property
    def _first(self) -> str:
        return "first" if self.how == "close" else "half"

    def prepare(self, lab: Lab) -> None:
        self.listen(
            lab,
            backlog=16,
            family=self.family,
            closes="second" if self.closes == "client" else self._first,
            pause=self.pause_ms / 1000,
        )

    def act(self, lab: Lab) -> None:
        for _ in range(self.clients):
            self.connect(1)
            clients = self.connected(1)
            self.step("client", f"connect: {describe(clients)}")
            self.finish(1, closes=self._first if self.closes == "client" else "second", pause=self.pause_ms / 1000)
            self.server.hear("accepted")
            self.server.hear("closed")
            self.step(self.closes, "closed first" if self.how == "close" else "shut down first")
            self.step("server" if self.closes == "client" else "client", f"closed {self.pause_ms} ms later")

    def calm(self, lab: Lab) -> bool:
        return all(found.state in ("LISTEN", "TIME_WAIT") for host in lab.hosts for found in host.sockets())
