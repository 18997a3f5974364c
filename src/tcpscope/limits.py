"""What keeps a sender from sending more: the kernel's chronograph (tcp_chrono_start(), net/ipv4/tcp_output.c).

While a connection has data that is not acknowledged, the kernel measures for how long the receive window of the remote
end was full, for how long the send buffer was, and the rest. In the rest the congestion window may have been full
(is_cwnd_limited), or the application had nothing more to send (app_limited). Both are flags, not times: what they say
when they are read stands for the whole rest. If both are off, it is not known (pacing, a queue of this host).
"""

from __future__ import annotations

import time
from typing import Any

from tcpscope.output import Column

LIMITS = (
    Column(
        "limit",
        "text",
        width=11,
        nullable=True,
        doc="what kept the sender from sending more for the longest time: application (it had nothing to send), rwnd "
        "(the remote end's receive window), sndbuf (the send buffer), cwnd (the congestion window)",
    ),
    *(
        Column(f"{name}_pct", "float", width=6, title=f"{name.upper()}%", nullable=True, doc=f"share of time: {what}")
        for name, what in (
            ("app", "the application had nothing to send"),
            ("rwnd", "the remote end's receive window was full"),
            ("sndbuf", "the send buffer was full"),
            ("cwnd", "data was under way, and the congestion window was full"),
        )
    ),
)  # fmt: skip
UNKNOWN = dict.fromkeys(column.name for column in LIMITS)
_NAMES = {"app_pct": "application", "rwnd_pct": "rwnd", "sndbuf_pct": "sndbuf", "cwnd_pct": "cwnd"}
_CLOCK_MONOTONIC_COARSE = 6  # it ticks with the jiffies, in which the kernel measures
LEAST_US = 10e6 * time.clock_getres(_CLOCK_MONOTONIC_COARSE)


class Chronograph:
    """Adds up what the events of a connection say of its sender."""

    def __init__(self) -> None:
        self._busy_us = self._rwnd_us = self._sndbuf_us = 0
        self._cwnd_limited = self._app_limited = False

    def add(self, raw: Any) -> None:
        self._busy_us += raw.busy_us
        self._rwnd_us += raw.rwnd_us
        self._sndbuf_us += raw.sndbuf_us
        self._cwnd_limited, self._app_limited = bool(raw.cwnd_limited), bool(raw.app_limited)

    def shares(self, existed_us: int) -> dict[str, Any]:
        """The columns `LIMITS` of a connection that existed for so long in the interval; null if that was too short."""
        if existed_us < LEAST_US:
            return UNKNOWN
        measured = self._busy_us + self._rwnd_us + self._sndbuf_us
        whole = max(existed_us, measured)
        idle = whole - measured
        cwnd = self._busy_us if self._cwnd_limited else 0
        app = idle + (self._busy_us if self._app_limited and not self._cwnd_limited else 0)
        times = {"app_pct": app, "rwnd_pct": self._rwnd_us, "sndbuf_pct": self._sndbuf_us, "cwnd_pct": cwnd}
        longest = max(times, key=lambda name: times[name])
        unknown = whole - sum(times.values())
        limit = _NAMES[longest] if times[longest] > unknown else None
        return {"limit": limit, **{name: round(100 * us / whole, 1) for name, us in times.items()}}
