"""What did each connection do from birth to death, who closed it and how?

One row per connection that has ended: owner, role, both ends, bytes, segments and retransmissions, round-trip times,
the time of the handshake, the duration with and without it, who closed first, and how it ended. Connections older than
the tool are shown with what the kernel still knows. With --live the open ones come first.
"""

from tcpscope.session import Session
from tcpscope.summary import Summary
from tcpscope.tool import Option, Request, Stream


class Life(Stream):
    """The open connections are events too: an iterator over the table makes them."""

    def skip(self, request: Request) -> tuple[str, ...]:
        return () if request.options.get("live") else ("live",)

    def begin(self, session: Session, request: Request) -> None:
        if request.options.get("live"):
            session.loaded.run("live")


tool = Life(
    "connections",
    "life",
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "tx_bytes", "rx_bytes", "retrans", "srtt_us",
     "duration_us", "closed_by", "end"),
    aliases=("tcplife",),
    options=(Option(("--live",), "Begin with the connections that are open now."),),
    summaries=(Summary("count", "Count them.", ("end", "closed_by")),),
)  # fmt: skip
