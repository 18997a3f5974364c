"""Which way do packets take through the stack, and where do they wait?

One row for each hop of each packet of the chosen connections: the hop, the time since the hop before, the device, its
transmit queue, the processor. Packets that this host sends go from QUEUE (TCP gives them to the device) over the queue
discipline (ENQUEUE, DEQUEUE) and the driver (START_XMIT, XMIT) to ACKED. Those that it receives go from RECEIVE over
TCP to READ, when the application takes their bytes.

With --min the kernel sends only hops that took long. With --summary: how the delays of each hop are distributed.
"""

from typing import Any

from tcpscope.quantities import microseconds
from tcpscope.request import Option, Request
from tcpscope.summary import Summary
from tcpscope.tool import Stream


def _constants(request: Request) -> dict[str, Any]:
    least = request.options.get("min")
    return {"since_min_us": 0 if least is None else microseconds("--min", least)}


tool = Stream(
    "trace",
    (
        "time",
        "packet",
        "direction",
        "before",
        "hop",
        "since_us",
        "device",
        "queue",
        "cpu",
        "pid",
        "comm",
        "laddr",
        "lport",
        "raddr",
        "rport",
        "flags",
        "seq",
        "data_bytes",
        "reason",
    ),
    important=("since_us", "before", "hop", "packet", "device", "seq", "data_bytes", "time", "raddr", "flags", "comm"),
    examples={
        "trace --port 443": "all hops of the packets of one port",
        "trace --port 443 --min 5ms": "where they waited for at least 5 ms",
        "trace --port 443 --summary -i 10": "the delay at each hop of each connection, every ten seconds",
    },
    options=(Option(("--min",), "Print only hops after at least this delay, such as 5ms.", str, metavar="TIME"),),
    summaries=(
        Summary(
            "summary",
            "Print the distribution of the delay at each hop, not rows.",
            ("direction", "laddr", "lport", "raddr", "rport", "before", "hop", "device"),
            "since_us",
            of_one=("laddr", "lport", "raddr", "rport"),
        ),
    ),
    alarming={"largest": bool},
    constants=_constants,
)
