from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tcpscope.lab.capture import Capture
from tcpscope.lab.hosts import Lab
from tcpscope.lab.packets import ACK, SYN
from tcpscope.lab.scenario import FAMILIES, Scenario, describe, parameter


@dataclass
class AcceptOverflowSerial(Scenario):
    """The accept queue overflows at the first step of the handshake, and the client's connect() times out.

    A server listens with a backlog of five and never accepts. Clients connect one after the other, and six
    succeed. When the seventh sends its SYN, the queue is full. The server's kernel drops the SYN without an
    answer, and counts an overflow. The client retransmits the SYN, the kernel drops it again, and at last
    connect() fails. A packet capture on the server shows these SYNs arriving: they are dropped later.

    `captured`: of each connect, the SYNs that the capture saw come in, and the SYN-ACKs that it saw go out.
    """

    title = "the accept queue is full before the SYN arrives, and connect() times out"
    counters = ("TcpExtListenOverflows", "TcpExtListenDrops", "TcpExtTCPSynRetrans", "TcpAttemptFails")

    clients: int = parameter(7, "how many clients connect, one after the other")
    backlog: int = parameter(5, "argument of the server's listen()")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)
    syn_retries: int = parameter(1, "how often the client repeats a SYN (sysctl tcp_syn_retries)")

    def prepare(self, lab: Lab) -> None:
        self.listen(lab, self.backlog, self.family)
        self._capture = Capture(lab.server)
        self.captured: list[tuple[int, int]] = []

    def act(self, lab: Lab) -> None:
        alive, full = 0, self._listener.send_q + 1
        impatient = False
        for number in range(1, self.clients + 1):
            self.queued(lab, min(alive, full))
            if alive >= full and not impatient:  # only those that fail
                self.sysctl(lab.client, "tcp_syn_retries", self.syn_retries)
                impatient = True
            self.connect(1)
            (client,) = self.connected(1)
            alive += client.errno == 0
            seconds = "" if client.errno == 0 else f" after {client.connect_seconds:.1f} s"
            flags = Counter(segment.flags & (SYN | ACK) for _, segment in self._capture.read())
            self.captured.append((flags[SYN], flags[SYN | ACK]))
            capture = f"capture on the server: {flags[SYN]} SYN in, {flags[SYN | ACK]} SYN-ACK out"
            self.step("client", f"connect number {number}: {describe([client])}{seconds}; {capture}")
            if client.errno == 0:
                self.finish(1)

    def calm(self, lab: Lab) -> bool:
        return not {"SYN_SENT", "FIN_WAIT1"} & {found.state for found in lab.client.sockets()}
