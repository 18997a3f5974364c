"""What a packet capture on a host's device sees."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from tcpscope.lab.hosts import DEVICE, Host
from tcpscope.lab.packets import Segment, read_segment

_ETH_P_ALL = 0x0003  # include/uapi/linux/if_ether.h
_PACKET = 1 << 16


class Capture:
    """The TCP segments that come in and go out, from now on.

    Its socket (packet(7)) gets a copy of each where a device hands it to the network stack, as tcpdump's does. It has
    room for some hundreds until they are read.
    """

    def __init__(self, host: Host) -> None:
        self._socket = host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        self._socket.bind((DEVICE, _ETH_P_ALL))
        self._socket.setblocking(False)

    def read(self) -> Iterator[tuple[bool, Segment]]:
        """Those since the last call: whether it goes out, and the segment."""
        while True:
            try:
                packet, address = self._socket.recvfrom(_PACKET)
            except BlockingIOError:
                return
            if segment := read_segment(packet):
                yield address[2] == socket.PACKET_OUTGOING, segment
