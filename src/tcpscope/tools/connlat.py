"""Which connections take long to establish?

One row per connect attempt, when its outcome is known, with the time from connect() to that outcome: the arrival of the
SYN-ACK, a refusal, or a timeout. With --min the kernel sends only slow attempts. An attempt that began before the tool
has no latency, so --min leaves it out. With --histogram: how the latency is distributed, for each outcome.
"""

from typing import Any

from tcpscope.quantities import microseconds
from tcpscope.request import Option, Request
from tcpscope.summary import Summary
from tcpscope.tool import Stream


def _constants(request: Request) -> dict[str, Any]:
    least = request.options.get("min")
    return {"attempt_min_us": 0 if least is None else microseconds("--min", least)}


tool = Stream(
    "attempt",
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "latency_us", "syn_retrans", "outcome"),
    important=("latency_us", "raddr", "outcome", "comm", "time", "pid", "syn_retrans", "laddr"),
    alarming={"outcome": lambda outcome: outcome not in (None, "ESTABLISHED")},
    aliases=("tcpconnlat",),
    examples={
        "connlat --min 10ms": "attempts that took at least 10 ms",
        "connlat --histogram --by raddr -d 60": "the distribution for each remote address in a minute",
    },
    options=(
        Option(("--min",), "Print only attempts that took at least this long, such as 10ms.", str, metavar="TIME"),
    ),
    summaries=(
        Summary(
            "histogram",
            "Print the distribution of each group's latency, not rows.",
            ("outcome",),
            "latency_us",
        ),
    ),
    constants=_constants,
)
