"""What the scenarios have in common in which connections end in a wrong way, or not at all."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import Program
from tcpscope.lab.scenario import PORT, Listener, Scenario
from tcpscope.output import endpoint

BACKLOG = 128
DOES = {
    "never": "accepts, and neither reads nor closes",
    "forget": "reads the request, and never closes",
    "unread": "answers and closes, without reading the request",
    "reset": "reads the request, and closes with a RST",
    "now": "accepts, and closes at once",
}


class Closing(Scenario):
    def serve(self, lab: Lab, does: str) -> None:
        """Start the server of peers/closing.py and a client."""
        address = lab.server.ipv4
        where = {"family": int(socket.AF_INET), "address": address, "port": PORT}
        self.server = Program(lab.server, "closing", backlog=BACKLOG, does=does, **where)
        self.client = Program(lab.client, "client", **where)
        found = self.server.hear("listening")
        self._listener = Listener(
            address=address,
            port=PORT,
            netns=lab.server.inode,
            pid=found["pid"],
            comm="lab-server",
            backlog=BACKLOG,
            inode=found["inode"],
            cookie=0,
            recv_q=0,
            send_q=0,
        )
        self._look_at_listener(lab)
        self.client.hear("ready")
        self.step("server", f"{endpoint(address, PORT)}: lab-server (pid {found['pid']}) {DOES[does]}")

    def request(self, number: int, closes: str = "second") -> None:
        """So many connections at once: each sends ten bytes and, if it closes `second`, waits for the end."""
        self.connect(number)
        self.connected(number)
        self.finish(number, send=10, closes=closes)

    def rounds(self, number: int, seconds: float) -> Iterator[int]:
        """So many rounds, spread over a time: a fault that lasts."""
        began = time.monotonic()
        for n in range(number):
            yield n
            time.sleep(max(0.0, began + seconds * (n + 1) / number - time.monotonic()))
