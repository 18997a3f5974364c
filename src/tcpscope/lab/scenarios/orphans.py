from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.closing import Closing
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import parameter


@dataclass
class Orphans(Closing):
    """The server has closed its connections, and the clients never do: orphans pile up in FIN_WAIT2.

    No process has these connections any more. With tcp_fin_timeout up to 60 s the kernel replaces each by a small
    timewait socket. With more it keeps the whole socket, for the time above 60 s.
    """

    title = "clients never close: the server's closed connections stay in FIN_WAIT2"
    counters: ClassVar[tuple[str, ...]] = ("TcpPassiveOpens",)

    clients: int = parameter(20, "how many connections")
    fin_timeout: int = parameter(300, "sysctl tcp_fin_timeout of the server")
    seconds: float = parameter(7.0, "how long it lasts")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.server, "tcp_fin_timeout", self.fin_timeout)
        self.serve(lab, "now")

    def act(self, lab: Lab) -> None:
        began = time.monotonic()
        self.connect(self.clients)
        self.connected(self.clients)
        until(lambda: self.orphans(lab) >= self.clients, "FIN_WAIT2")
        self.step("server", f"closed {self.clients} connections")
        time.sleep(max(0.0, began + self.seconds - time.monotonic()))

    def orphans(self, lab: Lab) -> int:
        return sum(found.state == "FIN_WAIT2" for found in lab.server.sockets())

    def calm(self, lab: Lab) -> bool:
        return True
