"""Peers that are a known time away: they answer each segment when their delay is over.

The kernel of the host knows nothing of them. Their packets come to it, and it drops them (`Host.blackhole`). A thread
of the lab sees them before (AF_PACKET), and answers from a raw socket. So a path has a known round trip on every
kernel, also without netem. The kernel says when a packet came (SO_TIMESTAMPNS): what the thread itself needs is part
of the delay.
"""

from __future__ import annotations

import heapq
import itertools
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping

from tcpscope.lab.hosts import DEVICE, Host
from tcpscope.lab.packets import ACK, FIN, RST, SYN, Segment, read_segment, segment

_ETH_P_ALL = 3
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("=qq")
_START = 1_000_000  # the first sequence number of a peer
_PACKET = 1 << 16


class Far:
    """Such peers, from `start()` until `stop()`.

    delays   the address of each -> seconds until it answers
    answers  the address of each -> the seconds that each of its answers took, from the packet until it was sent
    """

    def __init__(self, host: Host, delays: Mapping[str, float]) -> None:
        self.delays = delays
        self.answers: dict[str, list[float]] = {address: [] for address in delays}
        self._family = socket.AF_INET6 if any(":" in address for address in delays) else socket.AF_INET
        self._host = host
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin to answer. The lab's end closes the sockets, and so ends it, too."""
        self._raw = self._host.socket(self._family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._seen = self._host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        self._seen.bind((DEVICE, _ETH_P_ALL))
        self._seen.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer nothing any more. Then `answers` does not change."""
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        due: list[tuple[float, int, float, Segment]] = []
        order = itertools.count()
        while not self._stop.is_set() and self._seen.fileno() >= 0:
            wait = min(0.05, max(0.0, due[0][0] - time.time())) if due else 0.05
            if select.select([self._seen], [], [], wait)[0]:
                came, got = self._take()
                if got and got.target in self.delays and _asks(got):
                    heapq.heappush(due, (came + self.delays[got.target], next(order), came, got))
            while due and due[0][0] <= time.time():
                _, _, came, got = heapq.heappop(due)
                self._raw.sendto(_answer(got), (got.source, 0))
                self.answers[got.target].append(time.time() - came)

    def _take(self) -> tuple[float, Segment | None]:
        data, ancillary, _, address = self._seen.recvmsg(_PACKET, socket.CMSG_SPACE(_TIMESPEC.size))
        if address[2] == socket.PACKET_OUTGOING or not data:
            return 0.0, None
        seconds, ns = _TIMESPEC.unpack(ancillary[0][2])
        return seconds + ns / 1e9, read_segment(data)


def _asks(got: Segment) -> bool:
    """Whether it is to be answered: a bare ACK is not."""
    return not got.flags & RST and bool(got.size or got.flags & (SYN | FIN))


def _answer(got: Segment) -> bytes:
    """A SYN gets SYN and ACK, a FIN gets FIN and ACK, data an ACK."""
    flags = ACK | (got.flags & (SYN | FIN))
    taken = got.sequence + got.size + bool(got.flags & SYN) + bool(got.flags & FIN)
    own = _START if got.flags & SYN else _START + 1
    return segment(got.target, got.dport, got.source, got.sport, flags, own, taken)
