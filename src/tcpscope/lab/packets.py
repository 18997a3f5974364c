"""Builds and reads TCP segments, for raw sockets, so with an IP header and any source address."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import NamedTuple

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
MSS_OPTION = struct.pack("!BBH", 2, 4, 1460)
SACK_OPTION = bytes([1, 1, 4, 2])  # with which both ends use RACK, which `rtt` reads


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn(source: str, sport: int, target: str, dport: int, sequence: int) -> bytes:
    """An IPv4 or IPv6 packet with a TCP SYN."""
    return segment(source, sport, target, dport, SYN, sequence, 0)


def segment(source: str, sport: int, target: str, dport: int, flags: int, sequence: int, acknowledged: int) -> bytes:
    """An IPv4 or IPv6 packet with a TCP segment without data. A SYN has the option MSS, its answer also SACK."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
    options = {SYN: MSS_OPTION, SYN | ACK: MSS_OPTION + SACK_OPTION}.get(flags, b"")
    size = 20 + len(options)

    def tcp(check: int) -> bytes:
        numbers = sequence & 0xFFFFFFFF, acknowledged & 0xFFFFFFFF
        return struct.pack("!HHIIBBHHH", sport, dport, *numbers, size // 4 << 4, flags, 65535, check, 0) + options

    pseudo = addresses + struct.pack("!II", size, socket.IPPROTO_TCP)
    made = tcp(checksum(pseudo + tcp(0)))
    if len(addresses) == 32:
        return struct.pack("!IHBB", 6 << 28, size, socket.IPPROTO_TCP, 64) + addresses + made
    # length, identification and checksum of an IPv4 header are filled in by the kernel
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, socket.IPPROTO_TCP, 0) + addresses + made


class Segment(NamedTuple):
    """What a TCP segment says. `size` is that of its data."""

    source: str
    sport: int
    target: str
    dport: int
    flags: int
    sequence: int
    size: int


def read_segment(packet: bytes) -> Segment | None:
    """The segment in an IPv4 or IPv6 packet. None if it has none, or extension headers."""
    if packet[0] >> 4 == 4:
        header, protocol, whole = (packet[0] & 15) * 4, packet[9], int.from_bytes(packet[2:4], "big")
        ends = packet[12:16], packet[16:20]
    else:
        header, protocol, whole = 40, packet[6], 40 + int.from_bytes(packet[4:6], "big")
        ends = packet[8:24], packet[24:40]
    if protocol != socket.IPPROTO_TCP or len(packet) < header + 20:
        return None
    sport, dport, sequence, _, offset, flags = struct.unpack_from("!HHIIBB", packet, header)
    source, target = (str(ipaddress.ip_address(end)) for end in ends)
    return Segment(source, sport, target, dport, flags, sequence, whole - header - (offset >> 4) * 4)


def raw_socket(family: int) -> socket.socket:
    """A socket that sends such packets. Needs CAP_NET_RAW. IPPROTO_RAW means that a packet has its IP header."""
    return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
