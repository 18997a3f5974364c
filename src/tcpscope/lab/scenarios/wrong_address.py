from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import PORT, Scenario, describe, parameter


@dataclass
class WrongAddress(Scenario):
    """A server listens at 127.0.0.1 only, and clients of another host connect to the server's own address.

    The kernel answers each SYN with a RST, as if nothing listened at that port.
    """

    title = "a server listens at 127.0.0.1 only, and clients come to another address"
    counters: ClassVar[tuple[str, ...]] = ("TcpOutRsts",)

    clients: int = parameter(12, "how many clients connect")

    def prepare(self, lab: Lab) -> None:
        self.listen(lab, 16, closes="second", address="127.0.0.1")

    def act(self, lab: Lab) -> None:
        self.connect(self.clients)
        clients = self.connected(self.clients)
        self.step("client", f"{len(clients)} connects to {lab.server.ipv4}:{PORT}: {describe(clients)}")

    def calm(self, lab: Lab) -> bool:
        return True
