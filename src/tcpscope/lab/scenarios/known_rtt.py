from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import ClassVar

from tcpscope.errors import UsageError
from tcpscope.lab.far import Far
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import Program, until
from tcpscope.lab.scenario import PORT, Scenario, parameter

# Documentation addresses (RFC 5737, RFC 3849). Those of the peers end with their number.
NETWORKS = {"4": "198.51.100.0/24", "6": "2001:db8:51::/64"}
LONGEST_MS = 1000


@dataclass
class KnownRtt(Scenario):
    """A client sends to peers that are a known time away, and the round trip that is measured can be compared.

    The peers are no sockets of a kernel: the lab answers for them. An answer leaves when the delay since the packet is
    over, so the round trip is never shorter. How long each answer really took is printed at the end: a busy machine
    is late. It needs no netem.
    """

    title = "peers that are a known time away"
    counters: ClassVar[tuple[str, ...]] = ("TcpRetransSegs",)

    delays_ms: str = parameter("10,40,160", "milliseconds until each peer answers, with commas")
    requests: int = parameter(10, "how many requests to each")
    family: str = parameter("4", "IPv4 or IPv6", tuple(NETWORKS))

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._delays = [float(text) for text in self.delays_ms.split(",")]
        except ValueError:
            self._delays = []
        if self.requests < 1:
            raise UsageError(f"{self.name()}: requests cannot be 0", "the first one is sent after the handshake")
        if not self._delays or not all(0 < delay <= LONGEST_MS for delay in self._delays):
            what = f"{self.name()}: delays-ms cannot be '{self.delays_ms}'"
            raise UsageError(what, f"give milliseconds up to {LONGEST_MS}, separated by commas: 10,40,160")

    @property
    def delays(self) -> dict[str, float]:
        """The address of each peer -> its delay in ms."""
        network = NETWORKS[self.family].rpartition("/")[0]
        begin = network if self.family == "6" else network.removesuffix("0")
        return {f"{begin}{number}": delay for number, delay in enumerate(self._delays, 1)}

    def prepare(self, lab: Lab) -> None:
        lab.server.blackhole(NETWORKS[self.family])
        self.far = Far(lab.server, {address: delay / 1000 for address, delay in self.delays.items()})
        kind = int(socket.AF_INET6 if self.family == "6" else socket.AF_INET)
        self.clients = {
            address: Program(
                lab.client, "stream", comm="lab-client", family=kind, address=address, port=PORT, listens=False
            )
            for address in self.delays
        }
        for address, delay in self.delays.items():
            self.step("server", f"{address} answers after {delay:g} ms")
        self.far.start()

    def act(self, lab: Lab) -> None:
        for client in self.clients.values():
            client.tell(do="connect", number=1, source=None)  # and the first request
        ports = {address: client.hear("connected")["ports"][0] for address, client in self.clients.items()}
        for _ in range(self.requests - 1):
            until(lambda: self._answered(lab), "all answers")
            for client in self.clients.values():
                client.tell(do="send", size=100, first=0, last=1)
                client.hear("sent")
        until(lambda: self._answered(lab), "all answers")
        for client in self.clients.values():
            client.kill()
        until(lambda: self.calm(lab), "all connections to end")
        self.far.stop()
        self.step("client", f"{self.requests} requests to each, one after the other; all connections are closed")
        for address, took in self.far.answers.items():
            shortest, longest = min(took) * 1000, max(took) * 1000
            after = f"after {shortest:.2f} to {longest:.2f} ms"
            self.step("server", f"{address}: {len(took)} answers to port {ports[address]} {after}")

    @staticmethod
    def _answered(lab: Lab) -> bool:
        return not any(found.send_q for found in lab.client.sockets())

    def calm(self, lab: Lab) -> bool:
        return all(found.state == "TIME_WAIT" for found in lab.client.sockets())
