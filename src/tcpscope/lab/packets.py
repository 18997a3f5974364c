"""Builds SYNs with any source address, for raw sockets, so with an IP header."""

from __future__ import annotations

import ipaddress
import socket
import struct

SYN = 0x02
MSS_OPTION = struct.pack("!BBH", 2, 4, 1460)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn(source: str, sport: int, target: str, dport: int, sequence: int) -> bytes:
    """An IPv4 or IPv6 packet with a TCP SYN."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
    size = 20 + len(MSS_OPTION)

    def tcp(check: int) -> bytes:
        offset = size // 4 << 4
        return struct.pack("!HHIIBBHHH", sport, dport, sequence, 0, offset, SYN, 65535, check, 0) + MSS_OPTION

    pseudo = addresses + struct.pack("!II", size, socket.IPPROTO_TCP)
    segment = tcp(checksum(pseudo + tcp(0)))
    if len(addresses) == 32:
        return struct.pack("!IHBB", 6 << 28, size, socket.IPPROTO_TCP, 64) + addresses + segment
    # length, identification and checksum of an IPv4 header are filled in by the kernel
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, socket.IPPROTO_TCP, 0) + addresses + segment


def raw_socket(family: int) -> socket.socket:
    """A socket that sends such packets. Needs CAP_NET_RAW. IPPROTO_RAW means that a packet has its IP header."""
    return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
