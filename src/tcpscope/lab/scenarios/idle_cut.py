from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter
from tcpscope.lab.streams import Streams, change

FORGOTTEN = (
    "table inet lab_idle {{ chain in {{ type filter hook prerouting priority -300; tcp sport {{ {} }} drop; }}; }}"
)


@dataclass
class IdleCut(Streams):
    """A firewall on the way forgets connections that are idle, and drops their packets.

    A client keeps three connections of its pool idle. After some seconds a firewall before the server forgets them.
    From then on it drops what comes over them, without a RST. The client finds out when it uses them again, and waits.
    New connections work.

    Real firewalls forget after 60 s at the least. So `diagnose` says "cut while idle" from there on (--idle 65), and
    after less that others have an answer.
    """

    title = "connections are cut while they are idle; new ones work"

    idle: float = parameter(5.0, "seconds for which the connections are idle")

    def prepare(self, lab: Lab) -> None:
        self.start(lab)

    def act(self, lab: Lab) -> None:
        self.last(self.idle)
        ports = self.open(0)
        change(lab.server, "nft", FORGOTTEN.format(", ".join(map(str, ports))))
        self.step(
            "server", f"after {self.idle:g} s its firewall has forgotten the connections, and drops their packets"
        )
        self.send(1000)
        self.step("client", "sends 1000 bytes on each connection")
        rounds = max(1, round(self.seconds))
        for _ in range(rounds):
            self.last(1)
            self.open(1)
        self.step("client", f"{rounds} new connections work meanwhile, one a second")
        self.last(2)
