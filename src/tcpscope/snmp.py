"""The kernel's SNMP counters, as /proc/net/snmp, netstat and snmp6 have them."""

from __future__ import annotations

from contextlib import suppress


def counters_in(text: str) -> dict[str, int]:
    """Counters with the names of nstat: TcpRetransSegs, TcpExtListenOverflows, Ip6InReceives.

    A line of names is followed by one of values, both behind the same word; in snmp6 each line has one of both. What
    is neither is left out.
    """
    found: dict[str, int] = {}
    lines = [line.split() for line in text.splitlines()]
    if ":" in text:
        pairs = [
            (names[0].rstrip(":") + name, value)
            for names, values in zip(lines[::2], lines[1::2], strict=False)
            for name, value in zip(names[1:], values[1:], strict=False)
        ]
    else:
        pairs = [(line[0], line[1]) for line in lines if len(line) == 2]
    for name, value in pairs:
        with suppress(ValueError):
            found[name] = int(value)
    return found
