from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import Scenario, describe, parameter

FIRST_PORT = 40_000
CLOSING = {"FIN_WAIT1", "FIN_WAIT2", "CLOSING", "LAST_ACK"}


@dataclass
class NoLocalPorts(Scenario):
    """A client has used up its local ports for connections to one server, and connect() fails with EADDRNOTAVAIL.

    open: it keeps all its connections.
    time-wait: it closes each one, and the ports wait in TIME_WAIT for 60 s.

    The range ip_local_port_range has twenty ports here, with the kernel's default it has 28,232.
    """

    title = "a client has no local port left for connections to a server"
    counters: ClassVar[tuple[str, ...]] = ("TcpExtTW",)

    ports: int = parameter(20, "size of the range ip_local_port_range")
    more: int = parameter(5, "how many connects find no port")
    cause: str = parameter("open", "what has the ports", ("open", "time-wait"))

    def prepare(self, lab: Lab) -> None:
        lab.client.sysctl("ip_local_port_range", f"{FIRST_PORT} {FIRST_PORT + self.ports - 1}")
        self.step("client", f"ip_local_port_range = {FIRST_PORT} {FIRST_PORT + self.ports - 1}")
        self.listen(lab, self.ports, closes="second")

    def act(self, lab: Lab) -> None:
        self.connect(self.ports)
        self.step("client", f"{self.ports} connects: {describe(self.connected(self.ports))}")
        if self.cause == "time-wait":
            self.finish(self.ports)
            until(lambda: self.states(lab).get("TIME_WAIT", 0) == self.ports, f"{self.ports} sockets in TIME_WAIT")
            self.step("client", f"{self.ports} times 10 bytes sent and closed")
        self.connect(self.more)
        self.step("client", f"{self.more} more connects: {describe(self.connected(self.more))}")

    def states(self, lab: Lab) -> dict[str, int]:
        found = [socket.state for socket in lab.client.sockets()]
        return {state: found.count(state) for state in set(found)}

    def calm(self, lab: Lab) -> bool:
        return not self.states(lab).keys() & CLOSING
