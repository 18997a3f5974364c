"""Which connections are reset, by whom, and why?

One row per RST that this host sends or receives: the owner of the socket, both ends, the state of the connection before
the RST and, if this host sent it, the cause. --stack adds the kernel stack.
"""

from tcpscope.request import Option
from tcpscope.summary import Summary
from tcpscope.tool import Stacked

tool = Stacked(
    "resets",
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "direction", "state", "cause", "reason"),
    important=("direction", "cause", "raddr", "time", "comm", "laddr", "state", "pid", "reason"),
    options=(
        Option(("--stack",), "Print the kernel stack of each RST."),
        Option(("--timeouts",), "Show connections too that end without a RST, because nobody has answered."),
    ),
    constants=lambda request: {
        "send_stacks": bool(request.options["stack"]),
        "send_timeouts": bool(request.options["timeouts"]),
    },
    examples={
        "reset -L 443": "RSTs of the connections of one port",
        "reset --count -i 10": "by direction and cause, every ten seconds",
    },
    summaries=(
        Summary("count", "Count the RSTs of each group in the kernel, do not print them.", ("direction", "cause")),
    ),
)
