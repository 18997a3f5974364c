from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Scenario, describe, parameter
from tcpscope.lab.streams import change


@dataclass
class RpFilter(Scenario):
    """Clients come by one device, the server would answer them by another, and rp_filter is 1.

    So its kernel drops their SYNs before TCP sees them. Two uplinks, a VPN or policy routing make such ways.
    """

    title = "rp_filter drops the SYNs of clients, since the way back is another one"
    counters: ClassVar[tuple[str, ...]] = ("TcpExtIPReversePathFilter", "TcpPassiveOpens")

    clients: int = parameter(5, "how many clients connect")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.client, "tcp_syn_retries", 1)
        self.listen(lab, 16, closes="second")
        change(lab.server, "ip", "link", "add", "veth1", "type", "veth", "peer", "veth1", "netns", lab.client.netns)
        for host in lab.hosts:
            change(host, "ip", "link", "set", "veth1", "up")
        for device in ("all", "veth1"):
            lab.client.sysctl(f"ipv4/conf/{device}/rp_filter", 0)
        change(lab.server, "ip", "route", "replace", "192.0.2.0/24", "dev", "veth1", "src", lab.server.ipv4)
        self.step("server", "clients come by veth0, and the route to 192.0.2.0/24 is by veth1")
        self.sysctl(lab.server, "ipv4/conf/veth0/rp_filter", 1)

    def act(self, lab: Lab) -> None:
        self.connect(self.clients)
        clients = self.connected(self.clients)
        self.step("client", f"{len(clients)} connects: {describe(clients)}")

    def calm(self, lab: Lab) -> bool:
        return not any(found.state == "SYN_SENT" for found in lab.client.sockets())
