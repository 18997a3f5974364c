from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.closing import Closing
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import parameter


@dataclass
class CloseWaitLeak(Closing):
    """The server forgets its connections: they stay in CLOSE_WAIT, and more and more pile up.

    Clients connect, send a request and close. The server reads it, and never calls close(). Its kernel keeps each
    connection in CLOSE_WAIT, which has no time limit, and the process keeps a file descriptor for it, until it has none
    left.
    """

    title = "the server never closes what its clients have closed: CLOSE_WAIT piles up"
    counters: ClassVar[tuple[str, ...]] = ("TcpPassiveOpens",)

    early: int = parameter(12, "how many connections are left open before the tool watches")
    more: int = parameter(24, "how many follow")
    seconds: float = parameter(12.0, "in which time")

    def prepare(self, lab: Lab) -> None:
        self.serve(lab, "forget")
        self.request(self.early, closes="first")
        until(lambda: self.left_open(lab) >= self.early, "CLOSE_WAIT")
        self.step("client", f"{self.early} requests, and closed")

    def act(self, lab: Lab) -> None:
        for _ in self.rounds(self.more, self.seconds):
            self.request(1, closes="first")
        self.step("client", f"{self.more} more in {self.seconds:g} s")

    def left_open(self, lab: Lab) -> int:
        return sum(found.state == "CLOSE_WAIT" for found in lab.server.sockets())

    def calm(self, lab: Lab) -> bool:
        return self.left_open(lab) == self.early + self.more
