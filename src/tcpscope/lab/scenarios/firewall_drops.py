from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import PORT, Scenario, describe, parameter


@dataclass
class FirewallDrops(Scenario):
    """A firewall drops all SYNs for a server that listens, at the server (input) or at the client (output).

    The clients' kernel sends each SYN again and again, and gives up after a few seconds (tcp_syn_retries is 1). It
    does not know that a rule of its own host has dropped them.
    """

    title = "a firewall drops the SYNs for a server that listens"
    counters: ClassVar[tuple[str, ...]] = ("TcpAttemptFails", "TcpExtTCPSynRetrans")

    hook: str = parameter("input", "at the server, or at the client", ("input", "output"))
    clients: int = parameter(5, "how many clients connect")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.client, "tcp_syn_retries", 1)
        self.listen(lab, 16, closes="second")
        host = lab.server if self.hook == "input" else lab.client
        host.drop(self.hook, PORT)
        self.step(host.role, f"the firewall drops packets for port {PORT} (hook {self.hook})")

    def act(self, lab: Lab) -> None:
        self.connect(self.clients)
        clients = self.connected(self.clients)
        self.step("client", f"{len(clients)} connects: {describe(clients)}")

    def calm(self, lab: Lab) -> bool:
        return not any(found.state == "SYN_SENT" for found in lab.client.sockets())
