"""Reads the TCP sockets of a namespace from the kernel's sock_diag, as `ss -tan` does.

The structs are those of `include/uapi/linux/inet_diag.h`. (pyroute2's DiagSocket cuts the socket cookie to 32 bits.)
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP = 1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3

STATES = {
    1: "ESTABLISHED",
    2: "SYN_SENT",
    3: "SYN_RECV",
    4: "FIN_WAIT1",
    5: "FIN_WAIT2",
    6: "TIME_WAIT",
    7: "CLOSE",
    8: "CLOSE_WAIT",
    9: "LAST_ACK",
    10: "LISTEN",
    11: "CLOSING",
    12: "SYN_RECV",  # NEW_SYN_RECV: a request, not yet a socket
}

HEADER = struct.Struct("=IHHII")  # nlmsghdr
REQUEST = struct.Struct("=BBBBI48x")  # inet_diag_req_v2, the socket id left empty
MESSAGE = struct.Struct("=BBBB2s2s16s16sIIIIIIII")  # inet_diag_msg; ports in network order


@dataclass(frozen=True)
class Socket:
    """One TCP socket. Of a listener, `recv_q` and `send_q` are the accept queue's length and limit."""

    family: int
    state: str
    laddr: str
    lport: int
    raddr: str
    rport: int
    recv_q: int
    send_q: int
    cookie: int
    inode: int
    retransmits: int


def tcp_sockets() -> list[Socket]:
    """All TCP sockets of the calling thread's namespace, both families, requests and TIME_WAIT included."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        found: list[Socket] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            body = REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
            size = HEADER.size + len(body)
            netlink.send(HEADER.pack(size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body)
            found += (_decode(message) for message in _replies(netlink))
        return found


def _replies(netlink: socket.socket) -> Iterator[bytes]:
    while True:
        data = netlink.recv(1 << 18)
        offset = 0
        while offset < len(data):
            size, kind, _, _, _ = HEADER.unpack_from(data, offset)
            body = data[offset + HEADER.size : offset + size]
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, os.strerror(number))
            yield body
            offset += (size + 3) & ~3


def _decode(body: bytes) -> Socket:
    family, state, _timer, retransmits, lport, rport, laddr, raddr, *numbers = MESSAGE.unpack_from(body)
    _device, cookie_low, cookie_high, _expires, recv_q, send_q, _uid, inode = numbers
    width = 4 if family == socket.AF_INET else 16
    return Socket(
        family=family,
        state=STATES.get(state, str(state)),
        laddr=socket.inet_ntop(family, laddr[:width]),
        lport=int.from_bytes(lport, "big"),
        raddr=socket.inet_ntop(family, raddr[:width]),
        rport=int.from_bytes(rport, "big"),
        recv_q=recv_q,
        send_q=send_q,
        cookie=cookie_high << 32 | cookie_low,
        inode=inode,
        retransmits=retransmits,
    )
