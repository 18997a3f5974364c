"""What scenarios of several connections from one client to one server have in common: the server reads what it gets."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import dataclass
from typing import ClassVar

from tcpscope.errors import UnsupportedError
from tcpscope.lab.hosts import Host, Lab
from tcpscope.lab.programs import Program, until
from tcpscope.lab.scenario import FAMILIES, PORT, Scenario, parameter
from tcpscope.output import endpoint


@dataclass
class Streams(Scenario):
    """Base of such a scenario."""

    counters: ClassVar[tuple[str, ...]] = (
        "TcpRetransSegs",
        "TcpExtTCPTimeouts",
        "TcpExtTCPLossProbes",
        "TcpExtTCPFastRetrans",
    )

    connections: int = parameter(3, "how many connections the client opens")
    seconds: float = parameter(6.0, "how long the fault lasts")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def start(self, lab: Lab) -> None:
        """A server, and a client with its connections. Over each it has sent 100 bytes."""
        self._kind = socket.AF_INET6 if self.family == "6" else socket.AF_INET
        address = "::" if self.family == "mapped" else lab.server.address(self._kind)
        self.server = self._program(lab.server, address, socket.AF_INET6 if ":" in address else socket.AF_INET, True)
        self.listens(lab, address, 128)
        self.client = self._program(lab.client, lab.server.address(self._kind), self._kind, False)
        self.step("server", f"lab-server (pid {self.server.pid}) on {endpoint(address, PORT)} reads all that comes")
        self.open(self.connections)
        self.step("client", f"lab-client (pid {self.client.pid}) has {self.connections} connections to it")

    def _program(self, host: Host, address: str, family: int, listens: bool) -> Program:
        comm = f"lab-{host.role}"
        return Program(host, "stream", comm=comm, family=family, address=address, port=PORT, listens=listens)

    def open(self, number: int, source: str | None = None) -> list[int]:
        """So many more connections. The local ports of all."""
        self.client.tell(do="connect", number=number, source=source)
        ports: list[int] = self.client.hear("connected")["ports"]
        for _ in range(number):
            self.server.hear("accepted")
        return ports

    def send(self, size: int, first: int = 0, last: int | None = None) -> None:
        """So much on each connection, or on some. It returns before anything has arrived."""
        self.client.tell(do="send", size=size, first=first, last=self.connections if last is None else last)
        self.client.hear("sent")

    def last(self, seconds: float | None = None) -> None:
        """Let the fault last."""
        end = time.monotonic() + (self.seconds if seconds is None else seconds)
        until(lambda: time.monotonic() > end, "the time to pass")

    def calm(self, lab: Lab) -> bool:
        return True  # the fault lasts until the lab ends


def change(host: Host, *argv: str) -> None:
    """Run `ip`, `tc` or `nft` in a host."""
    try:
        done = host.run(subprocess.run, argv, capture_output=True, text=True)
    except FileNotFoundError:
        raise UnsupportedError(f"there is no program '{argv[0]}'") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UnsupportedError(f"'{' '.join(argv)}' failed", said[0] if said else "")
