"""How long was each connection in each state, and what followed?

One row per transition of a socket's TCP state, with the owner of the socket (not the process that was on the CPU) and
the time spent in the old state. Connections older than the tool are shown too; their first row has no time. After CLOSE
the row says what the kernel keeps: a timewait socket in TIME_WAIT or FIN_WAIT2, or nothing.
"""

from tcpscope.tool import Stream

tool = Stream(
    "transition",
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "old_state", "new_state", "in_state_us", "followed_by"),
    important=("new_state", "raddr", "old_state", "in_state_us", "time", "pid", "comm", "laddr", "followed_by"),
    aliases=("tcpstates",),
    examples={
        "states --comm nginx": "transitions of the connections of nginx",
        "states -R 443 --wide": "to port 443, with all columns",
    },
)
