"""Who opens connections, to whom, and with what outcome?

One row per connect attempt, when its outcome is known: established, refused by a RST or rejected by an ICMP message,
timed out, unreachable, reset, killed, given up by the application, or failed. The row has the owner, both ends, the
errno, the latency, and how often the SYN was retransmitted. Attempts that fail before a SYN is sent (no route, no free
port) are shown too.
"""

from tcpscope.request import Option
from tcpscope.summary import Summary
from tcpscope.tool import Stream

tool = Stream(
    "attempt",
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "outcome", "errno", "latency_us", "syn_retrans"),
    important=("outcome", "raddr", "comm", "latency_us", "time", "pid", "syn_retrans", "laddr", "errno"),
    alarming={"outcome": lambda outcome: outcome not in (None, "ESTABLISHED")},
    aliases=("tcpconnect",),
    examples={
        "connect --failed": "who cannot connect, to whom, and why",
        "connect --count --by comm,outcome -i 10": "attempts by process name and outcome, every ten seconds",
    },
    options=(Option(("--failed",), "Print only attempts that did not succeed."),),
    summaries=(Summary("count", "Count the attempts of each group, do not print them.", ("raddr", "rport")),),
    constants=lambda request: {"attempt_failed_only": bool(request.options.get("failed"))},
)
