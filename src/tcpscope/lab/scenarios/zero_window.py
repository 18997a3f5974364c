from __future__ import annotations

import signal
from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import parameter
from tcpscope.lab.steady import Steady


@dataclass
class ZeroWindow(Steady):
    """A server is stopped in the middle of an upload, and its client hangs in send().

    The client sends all the time. The server's process gets SIGSTOP, as from a debugger or a shell's Ctrl-Z. Its
    kernel goes on to acknowledge data until the receive buffer is full, and then offers a window of zero. The
    client's kernel probes the window, and each probe is answered, so nothing times out.
    """

    title = "a stopped server does not read, and the window stays closed"
    counters = ("TcpExtTCPToZeroWindowAdv", "TcpExtTCPFromZeroWindowAdv", "TcpRetransSegs", "TcpExtTCPTimeouts")

    stop: int = parameter(1, "1: stop the server; 0: it reads all the time, and nothing is wrong", (0, 1))

    def prepare(self, lab: Lab) -> None:
        self.start(lab, server="read", client="send")

    def act(self, lab: Lab) -> None:
        self.go("and sends all the time")
        if self.stop:
            self.server.process.send_signal(signal.SIGSTOP)
            until(lambda: self.is_full(lab), "the receive buffer to be full")
            self.step(
                "server", f"lab-server is stopped (SIGSTOP), its receive buffer is full: {self.unread(lab)} bytes"
            )
        self.last()

    def unread(self, lab: Lab) -> int:
        """What the server has not read."""
        return sum(found.recv_q for found in lab.server.sockets() if found.state == "ESTABLISHED")

    def is_full(self, lab: Lab) -> bool:
        waiting = sum(found.send_q for found in lab.client.sockets() if found.state == "ESTABLISHED")
        return waiting > 0 and lab.server.counters()["TcpExtTCPToZeroWindowAdv"] > 0
