"""Connect, accept and close in one stream.

One row when an active open succeeds, when accept() returns a connection, and when a connection ends, with owner and
network namespace. Attempts that fail are the business of `connect`; what a connection did in between, of `life`.
"""

from tcpscope.tool import Stream

tool = Stream(
    "step",
    ("time", "step", "pid", "comm", "netns", "laddr", "lport", "raddr", "rport"),
    aliases=("tcptracer",),
)
