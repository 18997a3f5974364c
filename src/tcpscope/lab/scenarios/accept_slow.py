from __future__ import annotations

import time
from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Scenario, parameter

TICK_SECONDS = 0.2


@dataclass
class AcceptSlow(Scenario):
    """Connections come twice as fast as the server accepts them.

    The server needs a while for each connection before it accepts the next one. Its accept queue fills, and stays
    full. A larger backlog would only let connections wait longer.
    """

    title = "a server accepts too slowly for its clients"
    counters = ("TcpPassiveOpens", "TcpExtListenOverflows", "TcpExtListenDrops")

    clients_per_s: int = parameter(20, "how many clients connect in a second")
    accepts_per_s: int = parameter(10, "how many connections the server accepts in a second")
    seconds: float = parameter(6.0, "how long clients come")
    backlog: int = parameter(4, "argument of the server's listen()")

    def prepare(self, lab: Lab) -> None:
        self.listen(lab, self.backlog, closes="unread", pause=1 / self.accepts_per_s)

    def act(self, lab: Lab) -> None:
        began, started = time.monotonic(), 0
        while (passed := time.monotonic() - began) < self.seconds:
            due = round(passed * self.clients_per_s)
            self.connect(due - started)
            started = due
            time.sleep(TICK_SECONDS)
        self.step("client", f"{started} connects in {self.seconds:g} s, {self.waiting(lab)} wait for accept()")

    def calm(self, lab: Lab) -> bool:
        return True  # those that were refused come again until the lab ends
