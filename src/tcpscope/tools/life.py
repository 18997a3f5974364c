"""What did each connection do from birth to death, who closed it and how?

One row per connection that has ended: owner, role, both ends, bytes, segments, retransmissions, round-trip times, how
long the handshake and the connection lasted, who closed first, and how it ended. Connections older than the tool are
shown with what the kernel still knows. With --live the open connections are printed first.
"""

from tcpscope.request import Option, Request
from tcpscope.session import RING_BYTES, Session
from tcpscope.summary import Summary
from tcpscope.tool import Stream


class Life(Stream):
    """The open connections are events too: a visit to all entries of the table makes them."""

    def skip(self, request: Request) -> tuple[str, ...]:
        return () if request.options.get("live") else ("live",)

    def ring_bytes(self, request: Request) -> int:
        return self.ring_for_all_sockets() if request.options.get("live") else RING_BYTES

    def floods(self, request: Request) -> bool:
        return super().floods(request) and not request.options.get("live")

    def begin(self, session: Session, request: Request) -> None:
        if request.options.get("live"):
            session.loaded.run("live")


tool = Life(
    "life",
    (
        "time",
        "pid",
        "comm",
        "laddr",
        "lport",
        "raddr",
        "rport",
        "tx_bytes",
        "rx_bytes",
        "retrans",
        "srtt_us",
        "duration_us",
        "closed_by",
        "end",
    ),
    important=(
        "raddr",
        "end",
        "duration_us",
        "tx_bytes",
        "rx_bytes",
        "comm",
        "time",
        "pid",
        "laddr",
        "retrans",
        "srtt_us",
        "closed_by",
    ),
    alarming={"end": lambda end: end not in (None, "OPEN", "FIN", "FIN_WAIT2")},
    aliases=("tcplife",),
    examples={
        "life -L 443 --live": "connections of a server: the open ones, then each that ends",
        "life --count -d 60": "how connections end, in a minute",
    },
    options=(
        Option(
            ("--live",), "Print first the connections that are open now (by default --buffer has room for all of them)."
        ),
    ),
    summaries=(Summary("count", "Count the connections of each group, do not print them.", ("end", "closed_by")),),
)
