from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter
from tcpscope.lab.streams import Streams, change


@dataclass
class FullDeviceQueue(Streams):
    """The queue of the client's own device has no room, and the kernel discards what the client sends.

    The queue (qdisc) before the device is a FIFO with a limit of 0, as if others had filled it. What TCP hands to it
    comes back as NET_XMIT_DROP. So TCP tries again every half second, and the segments never leave the host.
    """

    title = "this host's own device queue is full"
    counters = ("TcpRetransSegs", "TcpExtTCPRetransFail", "TcpExtTCPTimeouts")

    connections: int = parameter(6, "how many connections the client opens")
    seconds: float = parameter(5.0, "how long the fault lasts")

    def prepare(self, lab: Lab) -> None:
        self.start(lab)

    def act(self, lab: Lab) -> None:
        change(lab.client, "tc", "qdisc", "replace", "dev", "veth0", "root", "pfifo", "limit", "0")
        self.step("client", "the queue of its device takes no packet")
        self.send(1000)
        self.step("client", "sends 1000 bytes on each connection")
        self.last()
