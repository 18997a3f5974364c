"""Who accepts connections, how long did they wait in the accept queue, and how full was it?

One row per connection that accept() has returned: who accepted it, both ends, the time between the end of the handshake
and accept(), and how many more are waiting in the queue of that listener. With --count the connections by process: how
they are shared among workers.
"""

from tcpscope.summary import Summary
from tcpscope.tool import Stream

tool = Stream(
    "accepted",
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "wait_us", "accept_queue", "accept_limit"),
    aliases=("tcpaccept",),
    summaries=(Summary("count", "Count the connections of each group, do not print them.", ("pid", "comm")),),
)
