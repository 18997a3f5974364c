from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter
from tcpscope.lab.streams import Streams, change

HOLE = "table inet lab_hole {{ chain in {{ type filter hook prerouting priority -300; meta length > {} drop; }}; }}"


@dataclass
class MtuHole(Streams):
    """Large packets are lost on the way, and no ICMP message says so.

    A link before the server takes only packets of 1300 bytes, and what it drops nobody reports. Handshakes and small
    requests pass. A client that sends a full segment waits for ever: its kernel repeats the same large packet.
    """

    title = "full segments do not arrive, small ones do (path MTU black hole)"

    largest: int = parameter(1300, "bytes of the largest packet that passes")

    def prepare(self, lab: Lab) -> None:
        lab.client.one_segment_at_a_time()
        self.start(lab)

    def act(self, lab: Lab) -> None:
        change(lab.server, "nft", HOLE.format(self.largest))
        self.step("server", f"drops packets of more than {self.largest} bytes before they are seen")
        self.send(3000)
        self.step("client", "sends 3000 bytes on each connection")
        for _ in range(4):
            self.last(self.seconds / 4)
            self.open(1)
        self.step("client", "four new connections send 100 bytes each, which arrive")
        self.last(2)
