from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter
from tcpscope.lab.steady import Steady


@dataclass
class Nagle(Steady):
    """A client writes each request in two small parts, and each request takes 40 ms.

    The first part is sent at once. Nagle's algorithm holds the second back until the first is acknowledged. The
    server cannot answer before it has both, so it has nothing to send its ACK with, and its kernel delays the ACK
    by 40 ms. The path itself takes less than a millisecond.
    """

    title = "small writes wait for delayed ACKs"
    counters = ("TcpExtDelayedACKs", "TcpInSegs", "TcpRetransSegs")

    nodelay: int = parameter(0, "1: the client sets TCP_NODELAY, and nothing is wrong", (0, 1))

    def prepare(self, lab: Lab) -> None:
        self.start(lab, server="answer", client="ask", nodelay=bool(self.nodelay))

    def act(self, lab: Lab) -> None:
        self.go("and sends requests in two writes of 100 bytes each")
        self.last()
