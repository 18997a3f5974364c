from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab, held
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import parameter
from tcpscope.lab.streams import Streams


@dataclass
class LateAcks(Streams):
    """Everything arrives, but its ACKs are late, and so the client sends it again.

    What the server sends is held back for most of a second, as by a virtual machine that is paused or a radio link. The
    client's timeouts run out meanwhile. Then the ACKs say that everything had arrived.
    """

    title = "ACKs are late: segments are sent again that had arrived"
    counters = ("TcpRetransSegs", "TcpExtTCPTimeouts", "TcpExtTCPLossUndo", "TcpExtTCPDSACKRecv")

    connections: int = parameter(10, "how many connections the client opens")
    seconds: float = parameter(3.0, "how long it goes on afterwards")

    def prepare(self, lab: Lab) -> None:
        self.start(lab)

    def act(self, lab: Lab) -> None:
        before = lab.client.counters()["TcpRetransSegs"]
        with held(lab.server):
            self.send(3000)
            until(lambda: lab.client.counters()["TcpRetransSegs"] >= before + 3 * self.connections, "retransmissions")
        self.step("server", "its ACKs were held back until each connection had sent something again three times")
        self.send(10)
        self.last()
