from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter
from tcpscope.lab.steady import Steady


@dataclass
class WindowLimited(Steady):
    """A fixed buffer limits a transfer over a long path.

    A client sends all the time, over a path with a delay (the kernel needs netem for it). One of the two has set the
    size of its buffer: the server SO_RCVBUF, or the client SO_SNDBUF. At most one buffer of data is on its way, so
    the rate is the size of the buffer divided by the round-trip time.
    """

    title = "a buffer of fixed size limits a transfer over a long path"
    counters = ("TcpInSegs", "TcpRetransSegs")

    buffer: str = parameter(
        "receive", "which buffer is set: the server's, or the client's", ("receive", "send", "none")
    )
    size: int = parameter(32768, "argument of setsockopt(); the kernel doubles it")
    rtt_ms: float = parameter(40.0, "delay of the path, to and fro")

    def prepare(self, lab: Lab) -> None:
        for host in lab.hosts:
            host.netem(delay_ms=self.rtt_ms / 2)
        self.step("client", f"the path takes {self.rtt_ms:g} ms to and fro")
        ends = {"receive": "server", "send": "client"}
        buffers = {ends[self.buffer]: {self.buffer: self.size}} if self.buffer in ends else {}
        self.start(lab, server="read", client="send", buffers=buffers)

    def act(self, lab: Lab) -> None:
        set_to = "" if self.buffer == "none" else f"; the {self.buffer} buffer is set to {self.size}"
        self.go(f"and sends all the time{set_to}")
        self.last()
