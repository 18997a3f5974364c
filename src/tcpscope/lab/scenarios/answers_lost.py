from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import FAMILIES, Scenario, parameter


@dataclass
class AnswersLost(Scenario):
    """A client's SYNs arrive, and the server's answers are lost.

    This happens if the way back is another one, or if a firewall there has not seen the SYN. Here the server sends to a
    link address that nobody has. It repeats its SYN-ACK after 1 s and 3 s, and the client its SYN.
    """

    title = "SYNs arrive, but the answers to them are lost"
    counters = ("TcpRetransSegs", "TcpPassiveOpens", "TcpExtListenOverflows")

    clients: int = parameter(8, "how many clients connect at once")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def prepare(self, lab: Lab) -> None:
        self.listen(lab, 64, self.family, closes="second")

    def act(self, lab: Lab) -> None:
        lab.server.lose()
        self.step("server", "what it sends goes to a link address that nobody has")
        self.connect(self.clients)
        until(lambda: self._repeated(lab) >= 3 * self.clients, "SYN-ACKs sent again after 3 s")
        self.step("client", f"{self.clients} connects, none answered")

    def _repeated(self, lab: Lab) -> int:
        return sum(found.retransmits for found in lab.server.sockets() if found.state == "SYN_RECV")

    def calm(self, lab: Lab) -> bool:
        return True  # they go on for minutes
