"""How large the machine is: its sockets, processors and memory."""

from __future__ import annotations

import re
from pathlib import Path

_CPUS_AT_MOST = 4096


def tcp_sockets(sockstat: Path = Path("/proc/net/sockstat")) -> int:
    """TCP sockets of the machine, in all network namespaces (tcp_sockets_allocated, net/ipv4/tcp.c); 0 if not known."""
    try:
        lines = sockstat.read_text().splitlines()
    except OSError:
        return 0
    words = next((line.split() for line in lines if line.startswith("TCP:")), [])
    return int(words[words.index("alloc") + 1]) if "alloc" in words else 0


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that can be allocated without swapping (MemAvailable, proc_meminfo(5)); None if it is not known."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def possible_cpus(mask: Path = Path("/sys/devices/system/cpu/possible")) -> int:
    """How many processors this kernel may ever have.

    0 if their numbers do not start at 0 or have gaps, or if they are more than 4,096: the verifier refuses a loop over
    8,190 of them.
    """
    first, _, last = mask.read_text().strip().partition("-")
    count = int(last or first) + 1 if first == "0" and (last or "0").isdecimal() else 0
    return count if count <= _CPUS_AT_MOST else 0


def online_cpus(mask: Path = Path("/sys/devices/system/cpu/online")) -> str:
    """The processors that run now, as the kernel writes them: 0-3,5."""
    return mask.read_text().strip()


def sockets_at_most(now: int, allocates: bool) -> int:
    """The size of a table with an entry for each socket, if the machine has `now` sockets.

    allocates  whether programs may allocate entries. Then a free place costs 16 bytes (struct bucket,
               kernel/bpf/hashtab.c), and there are four per socket, at most two million. Otherwise it costs as much as
               an entry, some 300 bytes of locked memory, and there are two per socket, at most half a million.
    """
    least, factor, most = (1 << 17, 4, 1 << 21) if allocates else (1 << 16, 2, 1 << 19)
    return min(max(now * factor, least), most)
