"""The filter in the form of the kernel's programs: `struct filter` and the port sets of bpf/filter.bpf.h."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tcpscope.errors import UsageError
from tcpscope.filters import Filter, Network, PortRange, network_bytes

NETWORKS = 8  # FILTER_NETWORKS


def split(filter: Filter) -> tuple[Filter, Filter]:
    """What the kernel decides, and what user space decides: lists of more than eight networks."""
    in_kernel, here = filter, Filter()
    if len(filter.laddr) > NETWORKS:
        in_kernel, here = replace(in_kernel, laddr=()), replace(here, laddr=filter.laddr)
    if len(filter.raddr) > NETWORKS:
        in_kernel, here = replace(in_kernel, raddr=()), replace(here, raddr=filter.raddr)
    return in_kernel, here


def matches(residual: Filter, record: Any) -> bool:
    """Whether a raw record matches what `split` left for user space. As in the kernel, an end with port 0 is not known:
    its zeros are no address."""
    return residual.matches({"laddr": record.laddr, "raddr": record.raddr if record.rport else None})


def kernel_only(filter: Filter, tool: str) -> Filter:
    """`filter`, for a tool that counts in the kernel. UsageError if the kernel cannot decide all of it."""
    _, here = split(filter)
    for option, value in here.describe():
        raise UsageError(f"{option} {value}", f"'{tool}' counts in the kernel, which takes at most {NETWORKS} networks")
    return filter


def asks_owner(filter: Filter) -> bool:
    """Whether the filter needs to know the owner of a socket."""
    return any(value is not None for value in (filter.pid, filter.uid, filter.comm, filter.cgroup))


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


def _network(network: Network) -> dict[str, Any]:
    address, mask = network_bytes(network)
    return {"address": _words(address), "mask": _words(mask), "family": network.version}


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in (0, 8)]


def _port_set(ranges: tuple[PortRange, ...]) -> bytes:
    """One bit per port. Bit n of the little-endian words is bit n of the bytes."""
    bits = 0
    for ports in ranges:
        bits |= ((1 << (ports.last - ports.first + 1)) - 1) << ports.first
    return bits.to_bytes(8192, "little")
