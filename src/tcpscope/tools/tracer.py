"""Connect, accept and close in one stream.

One row when a connect succeeds, when accept() returns a connection, and when a connection ends, with the owner and the
network namespace. `connect` shows attempts that fail, and `life` what a connection did.
"""

from tcpscope.tool import Stream

tool = Stream(
    "action",
    ("time", "action", "pid", "comm", "netns", "laddr", "lport", "raddr", "rport"),
    important=("action", "raddr", "laddr", "comm", "time", "pid", "netns"),
    aliases=("tcptracer",),
    examples={
        "tracer --comm nginx": "what the connections of nginx do",
        "tracer -d 10 -o csv": "for ten seconds, as CSV",
    },
)
