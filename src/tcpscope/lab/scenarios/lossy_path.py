from __future__ import annotations

from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import parameter
from tcpscope.lab.streams import Streams, change

LOSS = (
    "table inet lab_loss {{ chain in {{ type filter hook prerouting priority -300;"
    " tcp dport 8080 numgen inc mod {} 1 drop; }}; }}"
)


@dataclass
class LossyPath(Streams):
    """Some of a client's segments are lost on the way to the server.

    The client sends 100 KB on each connection, again and again. The kernel sees from SACK what is missing, and sends it
    again. What is lost at the end of a message waits for a loss probe or a timeout.
    """

    title = "segments are lost on the way"

    one_in: int = parameter(30, "one segment in so many is lost")

    def prepare(self, lab: Lab) -> None:
        lab.client.one_segment_at_a_time()
        self.start(lab)
        change(lab.server, "nft", LOSS.format(self.one_in))

    def act(self, lab: Lab) -> None:
        self.step("server", f"one segment in {self.one_in} is lost before it is seen")
        rounds = 10
        for _ in range(rounds):
            self.send(100_000)
            self.last(self.seconds / rounds)
        self.step("client", f"has sent {rounds} times 100 KB on each connection")
