"""tcpscope: what the Linux kernel does to TCP connections, and why.

    import tcpscope

    with tcpscope.open("connect", rport=443) as events:
        for e in events:
            print(e.time, e.comm, e.raddr, e.outcome, e.latency_us)

Rows are structs whose attributes are the columns of the tool (tcpscope.rows); None means not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tcpscope.errors import (
    BtfError,
    LossError,
    MalformedError,
    NotPermittedError,
    TcpscopeError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from tcpscope.rows import open
else:

    def open(tool, /, **asked):
        """The rows of a tool, from the moment of the call; a context manager, an iterator, and an asynchronous one.

        tool        its name, such as "connect"
        duration    seconds after which the iteration ends; None: never
        interval    seconds between two rows of one key, for the tools that put together, and between two snapshots
        max_events  the most rows: of events in all, and the iteration ends then; else of each interval, snapshot, total
        time        "iso" (datetime in UTC), "elapsed" (seconds since the start) or "none"
        columns     only these; all by default
        buffer      bytes of the ring buffer between kernel and here, a power of two

        Further keywords are the filters (pid, comm, uid, cgroup, netns, ipv4, ipv6, lport, rport, port, laddr, raddr)
        and the tool's own options, named as on the command line.

        Raises UsageError, UnsupportedError or NotPermittedError. Privileges of the process are left as they are.
        """
        from tcpscope.events import Events

        return Events(tool, asked)


__all__ = [
    "BtfError",
    "LossError",
    "MalformedError",
    "NotPermittedError",
    "TcpscopeError",
    "UnsupportedError",
    "UsageError",
    "open",
]
