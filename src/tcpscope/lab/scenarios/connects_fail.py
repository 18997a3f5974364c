from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import Program
from tcpscope.lab.scenario import PORT, Scenario, describe, parameter

CLOSED, NOBODY = PORT + 1, "198.51.100.7"


@dataclass
class ConnectsFail(Scenario):
    """All connects to a service fail, in one of three ways.

    refused: nothing listens at the port, and the server's kernel answers each SYN with a RST.
    filtered: the server's firewall drops all SYNs for the port, while another port of the server answers.
    dead: the SYNs go to an address that never answers.

    Without an answer the client's kernel sends the SYN again, first after one second. Here it gives up after a
    few seconds (tcp_syn_retries is 1), with the kernel's default after a minute or two.
    """

    title = "no client can connect to a service: refused, filtered, or a dead host"
    counters: ClassVar[tuple[str, ...]] = ("TcpAttemptFails", "TcpExtTCPSynRetrans", "TcpOutRsts")

    answer: str = parameter("refused", "what becomes of the SYNs", ("refused", "filtered", "dead"))
    clients: int = parameter(8, "how many clients connect")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.client, "tcp_syn_retries", 1)
        self.listen(lab, 16, closes="second")
        if self.answer == "filtered":
            lab.server.drop("input", CLOSED)
            self.step("server", f"the firewall drops what comes for port {CLOSED}")
        elif self.answer == "dead":
            lab.server.blackhole("198.51.100.0/24")
            self.step("server", f"nobody answers at {NOBODY}")

    def act(self, lab: Lab) -> None:
        there = {"address": NOBODY if self.answer == "dead" else lab.server.ipv4, "port": CLOSED}
        works, self.client = self.client, Program(lab.client, "client", family=2, **there)
        self.client.hear("ready")
        self.connect(self.clients)
        if self.answer == "filtered":
            works.tell(do="connect", number=1)
            works.hear("connected")
            self.step("client", f"connected to port {PORT}")
        clients = self.connected(self.clients)
        self.step("client", f"{len(clients)} connects: {describe(clients)}")

    def calm(self, lab: Lab) -> bool:
        return not any(found.state == "SYN_SENT" for found in lab.client.sockets())
