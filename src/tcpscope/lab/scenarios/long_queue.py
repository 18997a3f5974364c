from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab, held
from tcpscope.lab.scenario import parameter
from tcpscope.lab.streams import Streams, change


@dataclass
class LongQueue(Streams):
    """Packets wait long in a queue on the way, behind those of a bulk transfer.

    The ACKs of the server arrive 0.4 s late each time, though the path itself takes a fraction of a millisecond. One
    connection sends much, the others little, and all have the same slow round trips. The client's RTO is raised, so
    that nothing is sent again.
    """

    title = "round trips take long: a queue on the way"
    counters = ("TcpRetransSegs",)

    connections: int = parameter(4, "how many connections the client opens")
    seconds: float = parameter(6.0, "how long the fault lasts")
    delay: float = parameter(0.4, "seconds for which the ACKs wait")

    def prepare(self, lab: Lab) -> None:
        self.start(lab)
        lab.client.sysctl("tcp_early_retrans", 0)
        address = lab.server.address(self._kind)
        prefix = f"{address}/{128 if ':' in address else 32}"
        change(lab.client, "ip", "route", "replace", prefix, "dev", "veth0", "rto_min", "60s")

    def act(self, lab: Lab) -> None:
        self.step("server", f"its ACKs wait {self.delay:g} s on the way")
        for _ in range(max(1, round(self.seconds / self.delay))):
            with held(lab.server):
                self.send(50_000, 0, 1)
                self.send(100, 1)
                self.last(self.delay)
            self.last(0.02)
        self.step("client", "has sent much on one connection, and little on the others")
