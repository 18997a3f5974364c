"""Who accepts connections, how long did they wait in the accept queue, and how full was it?

One row per connection that accept() returns: the process, both ends, the time between the end of the handshake and
accept(), and how many connections still wait in the listener's accept queue. With --count: how many connections each
process accepted.
"""

from tcpscope.summary import Summary
from tcpscope.tool import Stream

tool = Stream(
    "accepted",
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "wait_us", "accept_queue", "accept_limit"),
    important=("wait_us", "laddr", "raddr", "comm", "time", "accept_queue", "accept_limit", "pid"),
    aliases=("tcpaccept",),
    examples={
        "accept -L 443": "accepted connections of one port, and how long they waited",
        "accept --count -i 10": "how many each process accepts, every ten seconds",
    },
    summaries=(Summary("count", "Count the connections of each group, do not print them.", ("pid", "comm")),),
)
