"""How long does received data wait until the application reads it?

One row for each piece of data that a process takes from the receive queue: the time since the first byte of the piece
arrived, how much was taken, how much is left, and the thread that took it. A read that takes several packets may have
several rows. With --min the kernel sends only long waits. Data that an older connection had received before the tool
began has no wait, so --min leaves it out. With --histogram: how the waits of each process are distributed.
"""

from typing import Any

from tcpscope.quantities import microseconds
from tcpscope.request import Option, Request
from tcpscope.summary import Summary
from tcpscope.tool import Stream


def _constants(request: Request) -> dict[str, Any]:
    least = request.options.get("min")
    return {"wait_min_us": 0 if least is None else microseconds("--min", least)}


tool = Stream(
    "wait",
    ("time", "pid", "comm", "thread", "laddr", "lport", "raddr", "rport", "wait_us", "taken_bytes", "left_bytes"),
    important=("wait_us", "raddr", "comm", "taken_bytes", "left_bytes", "time", "pid", "thread", "laddr"),
    aliases=("tcppktlat",),
    examples={
        "pktlat --min 10ms": "data that waited at least 10 ms",
        "pktlat --histogram --by comm,lport -i 10": "the distribution for each program and port, every ten seconds",
    },
    options=(Option(("--min",), "Print only data that waited at least this long, such as 10ms.", str, metavar="TIME"),),
    summaries=(
        Summary(
            "histogram",
            "Print the distribution of each group's waits, not rows.",
            ("pid", "comm"),
            "wait_us",
        ),
    ),
    constants=_constants,
)
