"""tcpscope: what the Linux kernel does to TCP connections, and why.

    import tcpscope

    with tcpscope.open("connect", rport=443) as events:
        for e in events:
            print(e.time, e.comm, e.raddr, e.outcome, e.latency_us)

Events are typed structs whose attributes are the columns of the tool; None means not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    from tcpscope.events import Events

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


def open(
    tool: str,
    *,
    duration: float | None = None,
    interval: float | None = None,
    max_events: int | None = None,
    time: str = "iso",
    columns: tuple[str, ...] | None = None,
    buffer: int | None = None,
    options: dict[str, Any] | None = None,
    **filters: Any,
) -> Events:
    """The rows of a tool, from the moment of the call; a context manager and an iterator.

    tool        its name, such as "connect"; its own options: {"failed": True} in `options`
    duration    seconds after which the iteration ends; None: never
    interval    seconds between two rows of one key, for the tools that put together, and between two snapshots
    max_events  the most rows: of events in all, and the iteration ends then; else of each interval, snapshot, total
    time        "iso", "elapsed" (seconds since the start) or "none"
    columns     only these; all by default
    buffer      bytes of the ring buffer between kernel and here, a power of two
    filters     as on the command line: pid, comm, uid, cgroup, netns, ipv4, ipv6, lport, rport, port, laddr, raddr

    Raises UsageError, UnsupportedError or NotPermittedError. Privileges of the process are left as they are.
    """
    from tcpscope.events import Events

    return Events(tool, options or {}, filters, duration=duration, interval=interval, max_events=max_events, time=time,
                  columns=columns, buffer=buffer)  # fmt: skip
