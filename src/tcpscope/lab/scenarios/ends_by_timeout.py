from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from tcpscope.lab.closing import Closing
from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import Program
from tcpscope.lab.scenario import PORT, parameter

_PROBES = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)


@dataclass
class EndsByTimeout(Closing):
    """The server vanishes: keepalive ends the client's idle connections, and a timeout those that send.

    Some clients have keepalive probes, once a second. The others have TCP_USER_TIMEOUT, and send. Then what they send
    is lost. No answer comes, and the kernel ends all of them: each application gets ETIMEDOUT. Let the tool watch
    the client: `diagnose --netns {client}`.
    """

    title = "the server vanishes, and the kernel ends connections that get no answer"
    counters: ClassVar[tuple[str, ...]] = ("TcpExtTCPAbortOnTimeout", "TcpExtTCPKeepAlive", "TcpOutRsts")

    idle: int = parameter(3, "how many connections have keepalive")
    sending: int = parameter(3, "how many send, with TCP_USER_TIMEOUT")
    timeout_ms: int = parameter(1500, "TCP_USER_TIMEOUT")

    def prepare(self, lab: Lab) -> None:
        self.serve(lab, "never")
        where = {"family": int(socket.AF_INET), "address": lab.server.ipv4, "port": PORT}
        kept = [[socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1], *([socket.IPPROTO_TCP, name, 1] for name in _PROBES)]
        patient = [[socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self.timeout_ms]]
        self.ends: list[tuple[Program, int]] = []
        for number, options, send in ((self.idle, kept, 0), (self.sending, patient, 10)):
            program = Program(lab.client, "closing", **where)
            program.hear("ready")
            program.tell(do="connect", number=number, options=options, send=send)
            for _ in range(number):
                program.hear("connected")
            self.ends.append((program, number))
        self.step("client", f"{self.idle} idle connections with keepalive, {self.sending} with TCP_USER_TIMEOUT")

    def act(self, lab: Lab) -> None:
        lab.client.lose()
        self.step("client", "the path is gone")
        for program, _ in self.ends:
            program.tell(do="go")
        errors: Counter[Any] = Counter(
            program.hear("ended")["errno"] for program, number in self.ends for _ in range(number)
        )
        self.step("client", f"ended with ETIMEDOUT: {errors[110]}")

    def calm(self, lab: Lab) -> bool:
        return lab.client.sockets() == []
