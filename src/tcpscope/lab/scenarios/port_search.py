from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import ClassVar

from tcpscope.errors import UsageError
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import Program
from tcpscope.lab.scenario import FAMILIES, PORT, Scenario, parameter

FIRST_PORT = 32_768  # as in the kernel's default range, which has 28,232 ports
MOST = 32_768
PARTS = 10


@dataclass(frozen=True)
class Part:
    """A tenth of the range: connections opened by its end, calls that found no port, and how long connect() took."""

    opened: int
    refused: int
    median: float
    longest: float
    cpu: float


@dataclass
class PortSearch(Scenario):
    """A client opens connections to one server until it has no local port left, and connect() takes longer and longer.

    connect() tries every second port of the range first (those of one parity), from a random one on. Up to half of
    the range it finds one soon. Then it tries all of these in vain, each time, before it looks at the others: from
    here on it takes system time. With the last port gone it fails (EADDRNOTAVAIL), after it has tried all of them.

    The client has ten processes, each with a tenth of the connections.
    """

    title = "connect() looks longer and longer for a local port, and at last finds none"
    counters: ClassVar[tuple[str, ...]] = ("TcpActiveOpens",)

    ports: int = parameter(8_000, "size of the range ip_local_port_range; the kernel's default has 28232")
    more: int = parameter(5, "how many connects find no port")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not PARTS <= self.ports <= MOST:
            raise UsageError(f"{self.name()}: ports cannot be {self.ports}", f"give {PARTS} to {MOST}")
        if not self.more:
            raise UsageError(f"{self.name()}: more cannot be 0", "at least one connect is to fail")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.server, "somaxconn", MOST)
        lab.client.sysctl("ip_local_port_range", f"{FIRST_PORT} {FIRST_PORT + self.ports - 1}")
        self.step("client", f"ip_local_port_range = {FIRST_PORT} {FIRST_PORT + self.ports - 1}")
        self.listen(lab, MOST, self.family, with_client=False)
        kind = socket.AF_INET6 if self.family == "6" else socket.AF_INET
        where = {"family": int(kind), "address": lab.server.address(kind), "port": PORT}
        self.clients = [
            Program(lab.client, "many", most=self.ports // PARTS + self.more, **where) for _ in range(PARTS)
        ]
        for client in self.clients:
            client.hear("ready")
        self.parts: list[Part] = []

    def act(self, lab: Lab) -> None:
        for part in range(PARTS):
            number = self.ports * (part + 1) // PARTS - self.ports * part // PARTS
            self._open(self.clients[part], number, f"up to {100 * (part + 1) // PARTS} % of the ports")
        self._open(self.clients[-1], self.more, f"{self.more} more")

    def _open(self, client: Program, number: int, what: str) -> None:
        client.tell(do="connect", number=number)
        part = Part(**client.hear("connected"))
        self.parts.append(part)
        took = f"connect() takes {part.median * 1e6:.0f} us, {part.longest * 1e6:.0f} at most"
        refused = f"; {part.refused} find no port" if part.refused else ""
        self.step("client", f"{what}: {took}{refused}")

    def calm(self, lab: Lab) -> bool:
        return True  # the client keeps its connections
