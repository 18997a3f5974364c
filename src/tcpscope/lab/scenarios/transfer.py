from __future__ import annotations

import socket
from dataclasses import dataclass

from tcpscope.lab.hosts import Host, Lab
from tcpscope.lab.programs import DEADLINE, Program
from tcpscope.lab.scenario import FAMILIES, PORT, Scenario, parameter
from tcpscope.output import endpoint


@dataclass(frozen=True)
class Transferred:
    """What one connection has moved, and what TCP_INFO says of it at either end."""

    port: int
    up: int
    down: int
    seconds: float
    client: dict[str, int]
    server: dict[str, int]


@dataclass
class Transfer(Scenario):
    """Connections move a known number of bytes, in a known time.

    Over the first connection the client sends --up bytes, over the second twice as many, and so on. Then the server
    sends --down bytes, also so many times. Each direction takes --seconds, so the rate is known, too. At the end both
    programs say what the kernel has counted for each connection (TCP_INFO), beside what they sent.
    """

    title = "transfers of known size, in a known time"
    counters = ("TcpRetransSegs",)

    connections: int = parameter(3, "how many connections")
    up: int = parameter(1_000_000, "bytes that the client sends over the first one")
    down: int = parameter(100_000, "bytes that the server sends over the first one")
    seconds: float = parameter(2.0, "how long each direction takes")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def prepare(self, lab: Lab) -> None:
        kind = socket.AF_INET6 if self.family == "6" else socket.AF_INET
        target = lab.server.address(kind)
        address = "::" if self.family == "mapped" else target
        self._plan = [(self.up * n, self.down * n, self.seconds) for n in range(1, self.connections + 1)]
        self.server = self._program(lab.server, socket.AF_INET6 if ":" in address else socket.AF_INET, address, True)
        self.listens(lab, address, self.connections)
        self.client = self._program(lab.client, kind, target, False)
        self.step("server", f"lab-server (pid {self.server.pid}) on {endpoint(address, PORT)} reads, and answers")
        self.transfers: list[Transferred] = []

    def _program(self, host: Host, family: int, address: str, listens: bool) -> Program:
        where = {"family": int(family), "address": address, "port": PORT}
        return Program(host, "transfer", comm=f"lab-{host.role}", listens=listens, plan=self._plan, **where)

    def act(self, lab: Lab) -> None:
        self.client.tell(do="go")
        deadline = 2 * self.seconds + DEADLINE
        ends = [
            {done["number"]: done for done in (program.hear("done", deadline) for _ in self._plan)}
            for program in (self.client, self.server)
        ]
        for number, (up, down, _) in enumerate(self._plan):
            client, server = (end[number] for end in ends)
            self.transfers.append(
                Transferred(client["port"], up, down, client["seconds"], client["info"], server["info"])
            )
            info = client["info"]
            same = (info["sent"] - info["retransmitted"], info["received"]) == (up, down)
            counted = "the same" if same else f"{info['sent']} sent, {info['received']} received"
            what = f"port {client['port']}: {up} bytes sent, {down} received"
            self.step("client", f"{what} in {client['seconds']:.1f} s; TCP_INFO: {counted}")

    def calm(self, lab: Lab) -> bool:
        return all(found.state in ("LISTEN", "TIME_WAIT") for host in lab.hosts for found in host.sockets())
