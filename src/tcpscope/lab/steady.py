"""What scenarios of one connection between two programs have in common: one end does the same all the time."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tcpscope.lab.hosts import Host, Lab
from tcpscope.lab.programs import Program, until
from tcpscope.lab.scenario import FAMILIES, PORT, Listener, Scenario, parameter
from tcpscope.output import endpoint

BACKLOG = 5


@dataclass
class Steady(Scenario):
    """Base of such a scenario."""

    seconds: float = parameter(8.5, "how long the fault lasts")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def start(
        self,
        lab: Lab,
        server: str,
        client: str,
        *,
        nodelay: bool = False,
        buffers: Mapping[str, dict[str, int]] = MappingProxyType({}),
    ) -> None:
        """A server and a client, and what each does; `buffers` are those of "server" and "client" (peers/steady.py)."""
        listens = socket.AF_INET if self.family == "4" else socket.AF_INET6
        kind = socket.AF_INET6 if self.family == "6" else socket.AF_INET
        address = "::" if self.family == "mapped" else lab.server.address(kind)
        self.server = self._program(lab.server, listens, address, server, buffers.get("server"), listens=True)
        found = self.server.hear("listening")
        self.client = self._program(
            lab.client, kind, lab.server.address(kind), client, buffers.get("client"), nodelay=nodelay
        )
        self._listener = Listener(
            address, PORT, lab.server.inode, found["pid"], "lab-server", BACKLOG, found["inode"], 0, 0, 0
        )
        self._look_at_listener(lab)
        self.step("server", f"lab-server (pid {self.server.pid}) on {endpoint(address, PORT)}: {server}")

    def _program(
        self,
        host: Host,
        family: int,
        address: str,
        does: str,
        buffer: dict[str, int] | None,
        listens: bool = False,
        nodelay: bool = False,
    ) -> Program:
        return Program(
            host,
            "steady",
            comm=f"lab-{host.role}",
            family=family,
            address=address,
            port=PORT,
            does=does,
            buffer=buffer or {},
            listens=listens,
            nodelay=nodelay,
        )

    def go(self, what: str) -> None:
        """Let the client connect and begin."""
        self.client.tell()
        self.server.hear("accepted")
        self.step("client", f"lab-client (pid {self.client.pid}) connects, {what}")

    def last(self) -> None:
        """Let the fault last."""
        end = time.monotonic() + self.seconds
        until(lambda: time.monotonic() > end, "the time to pass")

    def calm(self, lab: Lab) -> bool:
        return True  # it goes on until the lab ends
