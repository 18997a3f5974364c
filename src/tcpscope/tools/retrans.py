"""What is retransmitted, for whom, and why?

One row per retransmission of data, a FIN, a SYN or a SYN-ACK: the owner, both ends, what made the kernel retransmit,
how many segments, and what the sender knew at that moment. A row SPURIOUS follows when the kernel finds out that
retransmissions were not needed.
"""

from tcpscope.request import Request, names_in
from tcpscope.summary import Summary
from tcpscope.tool import Stream


class Retrans(Stream):
    def skip(self, request: Request) -> tuple[str, ...]:
        """Groups that do not tell kinds apart count what was sent again. A row SPURIOUS is no retransmission."""
        by = request.options.get("by")
        return ("undone",) if by is not None and "kind" not in names_in(by) else ()


tool = Retrans(
    "retrans",
    (
        "time",
        "pid",
        "comm",
        "laddr",
        "lport",
        "raddr",
        "rport",
        "state",
        "kind",
        "ca_state",
        "segs",
        "data_bytes",
        "errno",
        "cwnd",
        "in_flight",
        "srtt_us",
        "rto_us",
    ),
    important=("kind", "raddr", "state", "time", "comm", "pid", "laddr", "segs", "errno", "data_bytes", "rto_us"),
    aliases=("tcpretrans",),
    examples={
        "retrans --raddr 10.0.0.0/8": "retransmissions to a network",
        "retrans --count -i 10": "by remote end and kind, every ten seconds",
        "retrans --count --by pid,comm": "by process",
    },
    summaries=(
        Summary(
            "count",
            "Count the retransmissions of each group in the kernel, do not print them.",
            ("raddr", "rport", "kind", "errno"),
            sum="segs",
        ),
    ),
)
