"""The filter as the kernel's programs have it (bpf/filter.bpf.h): `struct filter`, the port sets and filter_lists."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from tcpscope.filters import Filter, Network, PortRange, network_bytes
from tcpscope.kernel import pidns

LISTS = "filter_lists"
_OPTIONS = ("pid", "uid", "comm", "cgroup", "netns", "laddr", "raddr")  # enum filter_option
_SEVERAL = 2  # SEVERAL_VALUES
_OPTION_BITS = 32  # of a key: option and family
_NO_NETWORK = {"address": [0, 0], "mask": [0, 0], "family": 0}


def asks_owner(filter: Filter) -> bool:
    """Whether the filter needs to know the owner of a socket."""
    return bool(filter.pid or filter.uid or filter.comm or filter.cgroup)


def constants(filter: Filter) -> dict[str, Any]:
    """Values of the read-only globals that express `filter`. Options with several values are in `keys`."""
    return {
        "filter": {
            "pid": _only(filter.pid, 0),
            "uid": _only(filter.uid, 0),
            "netns": _only(filter.netns, 0),
            "pid_namespace": pidns.inner() if filter.pid else 0,
            "family": filter.family or 0,
            "cgroup": _only(filter.cgroup, 0),
            "comm": _only(filter.comm, "").encode(),
            "has_lport": bool(filter.lport),
            "has_rport": bool(filter.rport),
            "has_port": bool(filter.port),
            **{f"{name}_count": min(len(getattr(filter, name)), _SEVERAL) for name in _OPTIONS},
            **{name: _network(_only(getattr(filter, name), None)) for name in ("laddr", "raddr")},
        },
        "filter_lport": _port_set(filter.lport),
        "filter_rport": _port_set(filter.rport),
        "filter_port": _port_set(filter.port),
    }


def keys(filter: Filter) -> list[bytes]:
    """The keys of filter_lists: `struct filter_key` of each value of an option that has several."""
    return [
        struct.pack("=IHH16s", _OPTION_BITS + bits, number, family, value)
        for number, name in enumerate(_OPTIONS)
        if len(getattr(filter, name)) >= _SEVERAL
        for bits, family, value in map(_key, getattr(filter, name))
    ]


def _key(value: int | str | Network) -> tuple[int, int, bytes]:
    """How many bits of a value count, its IP version, and its 16 bytes."""
    if isinstance(value, int):
        return 128, 0, value.to_bytes(16, "little")
    if isinstance(value, str):
        return 128, 0, value.encode().ljust(16, b"\0")
    address, _ = network_bytes(value)
    return 128 - value.max_prefixlen + value.prefixlen, value.version, address


def _only(values: Sequence[Any], otherwise: Any) -> Any:
    return values[0] if len(values) == 1 else otherwise


def _network(network: Network | None) -> dict[str, Any]:
    if network is None:
        return _NO_NETWORK
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
