"""Packets made by hand: their checksums against known values, and against a kernel in the SYN flood's
tests."""

import ipaddress
import socket
import struct

import pytest

from tcpscope.lab.packets import SYN, checksum, syn


def test_checksum_of_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF
    assert checksum(b"\xff") == ~0xFF00 & 0xFFFF  # an odd length is padded with zero
    data = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")  # an IPv4 header with its checksum
    assert checksum(data) == 0


@pytest.mark.parametrize(
    ("source", "target", "header"),
    [("198.51.100.7", "192.0.2.2", 20), ("2001:db8:51::7", "2001:db8::2", 40)],
)
def test_syn(source: str, target: str, header: int) -> None:
    packet = syn(source, 1234, target, 80, 0xFFFFFFFF)
    segment = packet[header:]
    sport, dport, sequence, ack, offset, flags = struct.unpack_from("!HHIIBB", segment)
    assert (sport, dport, sequence, ack, flags) == (1234, 80, 0xFFFFFFFF, 0, SYN)
    assert offset >> 4 == len(segment) // 4
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
    assert packet[header - len(addresses) : header] == addresses
    pseudo = addresses + struct.pack("!II", len(segment), socket.IPPROTO_TCP)
    assert checksum(pseudo + segment) == 0
