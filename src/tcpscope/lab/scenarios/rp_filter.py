from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Scenario, describe, parameter
from tcpscope.lab.streams import change


@dataclass
class RpFilter(Scenario):
    """The server has no way back to its clients by the device from which they come, and rp_filter is 1.

    So its kernel drops their SYNs before TCP sees them. With two uplinks, a VPN or policy routing the way back may be
    another one, as well as missing.
    """

    title = "rp_filter drops the SYNs of clients, since the way back is another one"
    counters: ClassVar[tuple[str, ...]] = ("TcpExtIPReversePathFilter", "TcpPassiveOpens")

    clients: int = parameter(5, "how many clients connect")

    def prepare(self, lab: Lab) -> None:
        self.sysctl(lab.client, "tcp_syn_retries", 1)
        self.listen(lab, 16, closes="second")
        self.sysctl(lab.server, "ipv4/conf/veth0/rp_filter", 1)
        change(lab.server, "ip", "route", "del", "192.0.2.0/24", "dev", "veth0")
        self.step("server", "the route back to the clients is gone")

    def act(self, lab: Lab) -> None:
        self.connect(self.clients)
        clients = self.connected(self.clients)
        self.step("client", f"{len(clients)} connects: {describe(clients)}")

    def calm(self, lab: Lab) -> bool:
        return not any(found.state == "SYN_SENT" for found in lab.client.sockets())
