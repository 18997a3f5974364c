from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.hosts import Lab, held
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import FAMILIES, Scenario, describe, parameter

CLOSING = {"SYN_SENT", "FIN_WAIT1", "CLOSING", "LAST_ACK"}


@dataclass
class AcceptOverflow(Scenario):
    """The accept queue overflows at the last step of the handshake, and no client notices.

    A server listens with a short queue and never accepts. Ten clients connect, send ten bytes and close.
    All ten connects succeed, because a client is connected as soon as the SYN-ACK arrives. But a queue with
    limit five holds only six connections. For the other four, the server's kernel drops the final ACK and
    each later packet, and counts an overflow each time. It keeps their requests and retransmits the
    SYN-ACK. At last it gives up and answers with a reset.

    The order of packets decides whether a handshake is refused at its SYN or at its final ACK. Here the last
    SYN-ACKs are held back until all SYNs have arrived, as a network with some delay would do.
    """

    title = "the accept queue overflows, while every client believes that it is connected"
    counters: ClassVar[tuple[str, ...]] = (
        "TcpExtListenOverflows",
        "TcpExtListenDrops",
        "TcpOutRsts",
        "TcpExtTCPSynRetrans",
        "TcpRetransSegs",
    )

    clients: int = parameter(10, "how many clients connect")
    backlog: int = parameter(5, "argument of the server's listen()")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)
    abort_on_overflow: int = parameter(0, "1: refuse with a reset (sysctl tcp_abort_on_overflow)", (0, 1))
    synack_retries: int = parameter(1, "how often the server repeats a SYN-ACK (sysctl tcp_synack_retries)")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.server, "tcp_abort_on_overflow", self.abort_on_overflow)
        self.sysctl(lab.server, "tcp_synack_retries", self.synack_retries)
        self.listen(lab, self.backlog, self.family)

    def act(self, lab: Lab) -> None:
        # The accept queue is filled up to its limit, where it takes one more. Then as many SYNs at once as
        # the SYN queue takes, whose limit is the backlog, too. What is left over finds the accept queue
        # full.
        late = min(self.clients, self.backlog)
        early = min(self.clients - late, self.backlog)
        left_over = self.clients - late - early
        self.connect(early)
        clients = self.connected(early)
        self.queued(lab, early)
        with held(lab.server):
            self.connect(late)
            until(lambda: self.requests(lab) >= late, f"{late} SYNs")
            self.step("server", f"{late} SYN-ACKs were held back until {late} SYNs had come")
        clients += self.connected(late)
        if left_over:
            self.queued(lab, min(early + late, self._listener.send_q + 1))
            self.sysctl(lab.client, "tcp_syn_retries", 1)  # these fail, and soon
            self.connect(left_over)
            clients += self.connected(left_over)
        self.step("client", f"{len(clients)} connects: {describe(clients)}")
        alive = sum(client.errno == 0 for client in clients)
        self.finish(alive)
        self.step("client", f"{alive} times 10 bytes sent and closed")

    def requests(self, lab: Lab) -> int:
        return sum(found.state == "SYN_RECV" for found in lab.server.sockets())

    def calm(self, lab: Lab) -> bool:
        return self.requests(lab) == 0 and not any(found.state in CLOSING for found in lab.client.sockets())
