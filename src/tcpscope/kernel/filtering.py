"""The filter as the kernel's programs want it: `struct filter` and the port sets of bpf/filter.bpf.h."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tcpscope.filters import Filter, PortRange, address_bytes

NETWORKS = 8  # FILTER_NETWORKS


def split(filter: Filter) -> tuple[Filter, Filter]:
    """What the kernel decides, and what is left for user space: lists of more networks than the kernel holds."""
    in_kernel, here = filter, Filter()
    for name in ("laddr", "raddr"):
        networks = getattr(filter, name)
        if len(networks) > NETWORKS:
            in_kernel = replace(in_kernel, **{name: ()})
            here = replace(here, **{name: networks})
    return in_kernel, here


def constants(filter: Filter) -> dict[str, Any]:
    """Values of the read-only globals that express `filter`."""
    return {
        "filter": {
            "pid": filter.pid or 0,
            "uid": filter.uid or 0,
            "netns": filter.netns or 0,
            "family": filter.family or 0,
            "cgroup": filter.cgroup or 0,
            "comm": (filter.comm or "").encode(),
            "has_pid": filter.pid is not None,
            "has_uid": filter.uid is not None,
            "has_comm": filter.comm is not None,
            "has_lport": bool(filter.lport),
            "has_rport": bool(filter.rport),
            "has_port": bool(filter.port),
            "laddr_count": len(filter.laddr),
            "raddr_count": len(filter.raddr),
            "laddr": [_network(network) for network in filter.laddr],
            "raddr": [_network(network) for network in filter.raddr],
        },
        "filter_lport": _port_set(filter.lport),
        "filter_rport": _port_set(filter.rport),
        "filter_port": _port_set(filter.port),
    }


def _network(network: Any) -> dict[str, Any]:
    mask = network.netmask.packed.rjust(16, b"\xff")
    return {
        "address": [int.from_bytes(address_bytes(network.network_address)[i : i + 8], "little") for i in (0, 8)],
        "mask": [int.from_bytes(mask[i : i + 8], "little") for i in (0, 8)],
        "family": network.version,
    }


def _port_set(ranges: tuple[PortRange, ...]) -> bytes:
    """A bit per port; bit n of the little-endian words is bit n of the bytes."""
    bits = 0
    for ports in ranges:
        bits |= ((1 << (ports.last - ports.first + 1)) - 1) << ports.first
    return bits.to_bytes(8192, "little")
