from __future__ import annotations

import socket
from dataclasses import dataclass

from tcpscope.lab.hosts import Lab
from tcpscope.lab.packets import raw_socket, syn
from tcpscope.lab.programs import until
from tcpscope.lab.scenario import FAMILIES, PORT, Scenario, parameter


@dataclass
class BadChecksums(Scenario):
    """Segments arrive damaged, and the kernel discards them.

    A host sends SYNs whose checksum is wrong, as a broken network card or cable makes them. The receiving kernel
    discards each of them, counts it in TcpInCsumErrors, and answers nothing.
    """

    title = "segments with a wrong checksum are discarded"
    counters = ("TcpInCsumErrors", "TcpInErrs", "TcpOutRsts")

    segments: int = parameter(40, "how many are sent")

    family: str = parameter("4", "IPv4, IPv6, or IPv4 to a listener on ::", FAMILIES)

    def prepare(self, lab: Lab) -> None:
        self.listen(lab, 5, self.family, closes="first", with_client=False)

    def act(self, lab: Lab) -> None:
        before = lab.server.counters()["TcpInCsumErrors"]
        kind, check = (socket.AF_INET6, 40 + 16) if self.family == "6" else (socket.AF_INET, 20 + 16)
        source, target = lab.client.address(kind), lab.server.address(kind)
        with lab.client.run(raw_socket, kind) as raw:
            for number in range(self.segments):
                packet = bytearray(syn(source, 10_000 + number, target, PORT, 1_000_000))
                packet[check] ^= 1  # the first byte of the checksum
                raw.sendto(bytes(packet), (target, 0))
        until(lambda: lab.server.counters()["TcpInCsumErrors"] >= before + self.segments, "the segments to arrive")
        self.step("client", f"{self.segments} SYNs with a wrong checksum")

    def calm(self, lab: Lab) -> bool:
        return True
