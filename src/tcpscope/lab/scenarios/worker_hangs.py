from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.closing import Closing
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import parameter


@dataclass
class WorkerHangs(Closing):
    """The server accepts, and its workers hang: nobody reads what clients send, until these give up.

    The connections stay in CLOSE_WAIT, as those of a program that forgets to close. But this one does nothing else
    either.
    """

    title = "the server's workers hang: clients send, wait and give up"
    counters: ClassVar[tuple[str, ...]] = ("TcpPassiveOpens",)

    clients: int = parameter(12, "how many clients give up")
    seconds: float = parameter(8.0, "how long it lasts")

    def prepare(self, lab: Lab) -> None:
        self.serve(lab, "never")

    def act(self, lab: Lab) -> None:
        self.request(self.clients, closes="first")
        until(lambda: self.left(lab) >= self.clients, "CLOSE_WAIT")
        self.step("client", f"{self.clients} requests; no answer came, and the clients have closed")
        for _ in self.rounds(1, self.seconds):
            pass

    def left(self, lab: Lab) -> int:
        return sum(found.state == "CLOSE_WAIT" for found in lab.server.sockets())

    def calm(self, lab: Lab) -> bool:
        return self.left(lab) == self.clients
