from __future__ import annotations

import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tcpscope.lab.hosts import Lab
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import Scenario, parameter


@dataclass
class AcceptStalled(Scenario):
    """A server's process accepts nobody: its clients are connected, and get no answer.

    It is stopped (SIGSTOP), or has no file descriptor left, so that accept() fails with EMFILE.

    Clients connect one after the other, send ten bytes and close. The kernel completes their handshakes without the
    server. So all connects succeed, and the connections wait in the accept queue.

    With more than one worker, each has a socket of its own at the same address (SO_REUSEPORT), and the first one
    has the fault. The kernel still gives it its share of the connections.
    """

    title = "a server does not accept: it is stopped, or has no file descriptors left"
    counters = ("TcpPassiveOpens", "TcpExtListenOverflows")

    cause: str = parameter("stopped", "stopped: by SIGSTOP; files: no file descriptors are left", ("stopped", "files"))
    workers: int = parameter(1, "how many processes listen at the address")
    clients: int = parameter(12, "how many clients connect, one after the other")
    seconds: float = parameter(6.0, "in how many seconds they do")
    backlog: int = parameter(16, "argument of the servers' listen()")

    def prepare(self, lab: Lab) -> None:
        self.listen(lab, self.backlog, closes="second", reuse_port=self.workers > 1)
        for _ in range(self.workers - 1):
            self.another_server(lab)

    def act(self, lab: Lab) -> None:
        pid = self.server.pid
        if self.cause == "stopped":
            self.server.process.send_signal(signal.SIGSTOP)
            self.step("server", f"pid {pid} is stopped (SIGSTOP)")
        else:
            used = len(list(Path("/proc", str(pid), "fd").iterdir()))
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, hard))
            self.step("server", f"pid {pid} has {used} open files, and may have no more (RLIMIT_NOFILE)")
        for _ in range(self.clients):
            self.connect(1)
            if not self.connected(1)[0].errno:
                self.finish(1)
            time.sleep(self.seconds / self.clients)
        until(lambda: self.waiting(lab) > 0, "a connection that nobody accepts")
        self.step(
            "client", f"{self.clients} times connected, 10 bytes sent, closed; {self.waiting(lab)} are not accepted"
        )

    def calm(self, lab: Lab) -> bool:
        return True  # they wait as long as the fault lasts
