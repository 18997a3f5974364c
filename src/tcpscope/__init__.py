"""tcpscope: what the Linux kernel does to TCP connections, and why.

    import tcpscope

    with tcpscope.open("connect", rport=443) as events:
        for e in events:
            print(e.time, e.comm, e.raddr, e.outcome, e.latency_us)

Rows are structs. Their attributes are the columns of the tool (see tcpscope.rows). None means "not known".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tcpscope.errors import (
    BtfError,
    LossError,
    MalformedError,
    NotPermittedError,
    ResourceError,
    TcpscopeError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from tcpscope.rows import open
else:

    def open(tool, /, **asked):
        """Start a tool. Returns its rows, as a context manager, an iterator and an asynchronous iterator.

        tool        name of a tool, such as "connect", also of one from another package; diagnose, features, lab, run
                    and new are no tools. Or the Path of a BPF program, which `tcpscope run` takes
        duration    seconds after which the iteration ends; None: never
        interval    seconds between two results, for tools that group rows, and between two snapshots
        max_events  events: the iteration ends after so many; groups and snapshots: only the first of each time
        time        "iso" (datetime in UTC), "elapsed" (seconds since the start) or "none"
        columns     only these columns, as text with commas or as a sequence of names; None: all
        buffer      size of the ring buffer between kernel and tool in bytes, a power of two
        rate        at most so many rows in a second; further ones are counted; None: no limit

        The filters are keywords too: pid, comm, uid, cgroup, netns, ipv4, ipv6, lport, rport, port, laddr, raddr. Ports
        and addresses may be a list: rport=[80, 443], raddr=ip_network("10.0.0.0/8"). The tool's own options have the
        names of the command line.

        Raises UsageError, UnsupportedError or NotPermittedError. The process keeps its privileges.
        """
        from tcpscope.events import Events

        return Events(tool, asked)


__all__ = [
    "BtfError",
    "LossError",
    "MalformedError",
    "NotPermittedError",
    "ResourceError",
    "TcpscopeError",
    "UnsupportedError",
    "UsageError",
    "open",
]
