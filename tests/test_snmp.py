"""The text of the kernel's counters."""

from __future__ import annotations

from tcpscope.snmp import counters_in


def test_names_and_values_in_two_lines() -> None:
    text = "TcpExt: SyncookiesSent ListenDrops\nTcpExt: 3 -1\nIpExt: InOctets\nIpExt: 9\n"
    assert counters_in(text) == {"TcpExtSyncookiesSent": 3, "TcpExtListenDrops": -1, "IpExtInOctets": 9}


def test_a_name_and_a_value_in_each_line() -> None:
    assert counters_in("Ip6InReceives                   \t12\nIp6InDiscards                   \t0\n") == {
        "Ip6InReceives": 12,
        "Ip6InDiscards": 0,
    }


def test_what_is_neither_is_left_out() -> None:
    """A patched kernel, or a file that is cut off."""
    text = "TcpExt: One Two Three\nTcpExt: 1 x\n\n\nTcp: Four\nTcp: 4\nUdp: Five\n"
    assert counters_in(text) == {"TcpExtOne": 1, "TcpFour": 4}
    assert counters_in("") == {}
    assert counters_in("Ip6InReceives\n") == {}
