from __future__ import annotations

import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from tcpscope.errors import UnsupportedError
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import DEADLINE, Program
from tcpscope.lab.scenario import FAMILIES, PORT, Scenario, parameter
from tcpscope.output import endpoint

BACKLOG = 128  # as in peers/healthy.py

CASES = {
    "web-server": "eight clients, ten requests on each connection",
    "short-connections": "eight clients, one request on each connection, which the server closes",
    "bulk": "one connection sends as fast as it can",
    "lossy-path": "one connection sends 10 MB a second; the server's firewall drops one segment in a thousand",
    "idle": "fifty connections that are used once and kept",
    "half-closed": "twenty clients send a request and a FIN, and the server goes on sending",
    "health-check": "a connect each second to a port at which nobody listens",
    "port-scan": "a thousand ports, one connect each",
    "time-wait": "eight clients, one request on each connection, which the client closes: it gets TIME_WAIT",
    "restart": "two instances behind a balancer, restarted one after the other",
}
LOSS = (
    "table inet healthy_%d { chain in {"
    " type filter hook input priority 0; tcp dport %d numgen inc mod 1000 999 counter drop; }; }"
)


@dataclass
class Healthy(Scenario):
    """Nothing is wrong, and no tool should say so.

    What looks like a fault to a tool that takes a single number for one: refused connects, resets, TIME_WAIT,
    CLOSE_WAIT, retransmissions, a link that is fully used. `--case` chooses what is played. The default plays a web
    server with much to do.
    """

    title = "a network without a fault: ten kinds of traffic at which diagnose stays silent"
    counters: ClassVar[tuple[str, ...]] = (
        "TcpActiveOpens",
        "TcpPassiveOpens",
        "TcpAttemptFails",
        "TcpRetransSegs",
        "TcpOutRsts",
        "TcpExtTW",
    )

    case: str = parameter("web-server", "what is played", tuple(CASES))
    seconds: float = parameter(12.0, "for how long")
    port: int = parameter(PORT, "port of the server")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def prepare(self, lab: Lab) -> None:
        kind = socket.AF_INET if self.family == "4" else socket.AF_INET6
        target = socket.AF_INET6 if self.family == "6" else socket.AF_INET
        address = "::" if self.family == "mapped" else lab.server.address(kind)
        traffic = {"case": self.case, "port": self.port, "seconds": self.seconds}
        if self.case == "lossy-path":
            self._lose(lab)
        self.server = Program(lab.server, "healthy", end="server", family=kind, address=address, **traffic)
        self.listens(lab, address, BACKLOG)
        self.client = Program(
            lab.client, "healthy", end="client", family=target, address=lab.server.address(target), **traffic
        )
        self.client.hear("ready")
        self.step("server", f"listens on {endpoint(address, self.port)} (lab-server, pid {self._listener.pid})")

    def _lose(self, lab: Lab) -> None:
        """One segment in a thousand, and where the kernel has netem a round trip of 20 ms."""
        lab.client.one_segment_at_a_time()
        for host in lab.hosts:
            with suppress(UnsupportedError):
                host.netem(delay_ms=10)
        try:
            lab.server.run(subprocess.run, ["nft", LOSS % (self.port, self.port)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            hint = "it needs nft, and a kernel with numgen"
            raise UnsupportedError("the lab cannot lose one packet in a thousand here", hint) from error

    def act(self, lab: Lab) -> None:
        self.step("client", CASES[self.case])
        self.begin()
        self.played()
        self.step("client", ", ".join(f"{what}: {number}" for what, number in self.done.items()))

    def begin(self) -> None:
        """Let both ends begin; also again, when they have played."""
        for program in (self.server, self.client):
            program.tell(do="begin")

    def played(self) -> None:
        """Wait until the client has played. Then `done` says what it has done since its start."""
        self.done: dict[str, int] = self.client.hear("played", self.seconds + DEADLINE)

    def calm(self, lab: Lab) -> bool:
        return all(
            found.state in ("LISTEN", "TIME_WAIT")
            for host in lab.hosts
            for found in host.sockets()
            if self.port in (found.lport, found.rport)
        )
