"""Which way do packets take through the stack, and where do they wait?

One row for each hop of each packet of the chosen connections: the hop, the time since the hop before, the device, its
transmit queue, the processor. Packets that this host sends go from WRITE (a process writes their first byte) over
TRANSMIT (TCP gives them to IP), IP_OUT, QUEUE, the queue discipline (ENQUEUE, DEQUEUE) and the driver (START_XMIT,
XMIT) to ACKED. Those that it receives go from GRO, where the driver gives them to the stack and one may be MERGED into
another, over RECEIVE, IP_IN, DELIVER, TCP_IN, perhaps BACKLOG, and TCP to READ, when the application takes their bytes.
NETFILTER names its hook, and DROPPED the chain of nf_tables that discards the packet. Where the kernel lets no
functions be hooked, there are QUEUE and what follows on the way out, and GRO, RECEIVE, TCP and READ on the way in.

With --functions further functions of the kernel are hops. With --min the kernel sends only hops that took long. With
--summary: how the delays of each hop are distributed.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

from tcpscope import functions
from tcpscope.functions import Function
from tcpscope.kernel.features import Kernel
from tcpscope.kernel.spec import Spec
from tcpscope.quantities import microseconds
from tcpscope.request import Option, Request
from tcpscope.summary import Summary
from tcpscope.tool import Stream

_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_PLACES = ("", *_HOOKS, "INGRESS", "EGRESS", *(f"BRIDGE_{hook}" for hook in _HOOKS))
_FIRST_FUNCTION = 32
"""Values of `where`: in trace_functions.bpf.h."""


class Trace(Stream):
    """The events of the probe `trace`."""

    for_more: ClassVar[Mapping[str, str]] = {
        "CAP_SYS_ADMIN": "the chain that discards a packet, where nf_tables is a module"
    }

    def __init__(self) -> None:
        super().__init__(
            "trace",
            (
                "time",
                "packet",
                "direction",
                "before",
                "hop",
                "where",
                "chain",
                "since_us",
                "device",
                "queue",
                "cpu",
                "pid",
                "comm",
                "laddr",
                "lport",
                "raddr",
                "rport",
                "flags",
                "seq",
                "data_bytes",
                "reason",
            ),
            important=(
                "since_us",
                "before",
                "hop",
                "where",
                "packet",
                "device",
                "seq",
                "data_bytes",
                "chain",
                "time",
                "raddr",
                "flags",
                "comm",
            ),
            examples={
                "trace --port 443": "all hops of the packets of one port",
                "trace --port 443 --min 5ms": "where they waited for at least 5 ms",
                "trace --port 443 --functions 'tcp_v4_*'": "with functions of the kernel as further hops",
                "trace --port 443 --summary -i 10": "the delay at each hop of each connection, every ten seconds",
            },
            options=(
                Option(("--min",), "Print only hops after at least this delay, such as 5ms.", str, metavar="TIME"),
                Option(
                    ("--functions",),
                    "Further hops: functions that take a packet, by name or pattern, comma-separated, at most "
                    f"{functions.MOST}.",
                    str,
                    names=True,
                    metavar="NAMES",
                ),
            ),
            summaries=(
                Summary(
                    "summary",
                    "Print the distribution of the delay at each hop, not rows.",
                    ("direction", "laddr", "lport", "raddr", "rport", "before", "hop", "where", "device"),
                    "since_us",
                    of_one=("laddr", "lport", "raddr", "rport"),
                ),
            ),
            alarming={"largest": bool},
            constants=_constants,
        )

    def aimed(self, request: Request) -> Spec:
        aims = {f"function{number}": function for number, function in enumerate(_functions(request))}
        names = {program: function.name for program, function in aims.items()}
        return self.spec.aimed(names, {program for program, function in aims.items() if function.named})

    def frame(self, request: Request) -> Callable[[int], str]:
        further = [function.name for function in _functions(request)]
        return lambda place: further[place - _FIRST_FUNCTION] if place >= _FIRST_FUNCTION else _PLACES[place]


def _constants(request: Request) -> dict[str, Any]:
    least = request.options.get("min")
    return {
        "since_min_us": 0 if least is None else microseconds("--min", least),
        "function_argument": [function.argument for function in _functions(request)],
    }


def _functions(request: Request) -> tuple[Function, ...]:
    text = request.options.get("functions")
    return () if text is None else _chosen(text)


@cache
def _chosen(text: str) -> tuple[Function, ...]:
    return functions.chosen(text, Kernel())


tool = Trace()
