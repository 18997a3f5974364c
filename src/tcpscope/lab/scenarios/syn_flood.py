from __future__ import annotations

import socket
from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.packets import raw_socket, syn
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import FAMILIES, PORT, Scenario, parameter

# Documentation addresses (RFC 5737, RFC 3849). They are routed to the client, which drops what comes for them.
NOBODY = {socket.AF_INET: "198.51.100.0/24", socket.AF_INET6: "2001:db8:51::/64"}


@dataclass
class SynFlood(Scenario):
    """The SYN queue overflows: SYNs from addresses that never answer the SYN-ACK.

    Each SYN becomes a request that waits for its final ACK. Since Linux 4.4 the limit of the SYN queue is the
    listener's backlog; like the accept queue it holds one more. tcp_syncookies decides what the kernel does when
    the queue is full. 0: it drops the SYN. 1: it answers with a SYN cookie, which needs no memory. 2: it answers
    every SYN with a SYN cookie. Without cookies the kernel reserves the last quarter of tcp_max_syn_backlog for
    peers that it knows, so it may drop SYNs before the queue is full.
    """

    title = "the SYN queue overflows with handshakes that are never completed"
    counters = (
        "TcpExtTCPReqQFullDrop",
        "TcpExtTCPReqQFullDoCookies",
        "TcpExtListenDrops",
        "TcpExtListenOverflows",
    )

    syns: int = parameter(64, "how many SYNs are sent")
    backlog: int = parameter(5, "argument of the server's listen()")
    syncookies: int = parameter(1, "sysctl tcp_syncookies", (0, 1, 2))
    max_syn_backlog: int = parameter(256, "sysctl tcp_max_syn_backlog")
    repeats: int = parameter(0, "wait until each SYN-ACK was sent again so often")
    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.server, "tcp_syncookies", self.syncookies)
        self.sysctl(lab.server, "tcp_max_syn_backlog", self.max_syn_backlog)
        self.listen(lab, self.backlog, self.family, with_client=False)
        self._kind = socket.AF_INET6 if self.family == "6" else socket.AF_INET
        lab.client.blackhole(NOBODY[self._kind])

    def act(self, lab: Lab) -> None:
        target, network = lab.server.address(self._kind), NOBODY[self._kind].rpartition("/")[0]
        before = lab.server.counters()["TcpInSegs"]
        with lab.client.run(raw_socket, self._kind) as raw:
            for number in range(self.syns):
                host, port = 1 + number % 250, 10_000 + number // 250
                source = f"{network}{host:x}" if ":" in network else f"{network[:-1]}{host}"
                raw.sendto(syn(source, port, target, PORT, 1_000_000 + number), (target, 0))
        until(lambda: lab.server.counters()["TcpInSegs"] >= before + self.syns, "the SYNs to arrive")
        lab.flush()  # a SYN is counted before it is handled
        self.step("client", f"{self.syns} SYNs from {NOBODY[self._kind]}, which never answers")
        if self.repeats:
            kept = sum(found.state == "SYN_RECV" for found in lab.server.sockets())
            until(lambda: lab.server.counters()["TcpRetransSegs"] >= kept * self.repeats, "SYN-ACKs sent again")

    def calm(self, lab: Lab) -> bool:
        return True  # what became of a SYN is decided while it is received
