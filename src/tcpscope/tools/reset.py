"""Which connections are reset, by whom, and why?

One row per RST that this host sends or receives: the owner of the socket, both ends, the state of the connection before
the RST and, if this host sent it, the cause. --stack adds the kernel stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from tcpscope.errors import UsageError
from tcpscope.kernel.symbols import Symbols
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.run import Run, Streaming
from tcpscope.schema import Clock
from tcpscope.session import closed_on_error
from tcpscope.summary import Summary
from tcpscope.tool import Stream


class Reset(Stream):
    for_more: ClassVar = {"CAP_SYSLOG": "names of functions in --stack; without it, addresses"}

    def columns(self, request: Request) -> tuple[Column, ...]:
        if request.options["stack"] and request.options["count"]:
            raise UsageError("--stack", "--count prints groups, which have no stack")
        return super().columns(request)

    def open(self, request: Request) -> Run:
        if not request.options["stack"]:
            return super().open(request)
        names = [column.name for column in request.choose(self.columns(request), (*self.shown, "stack"))]
        return self.events(request, names, Clock(request.time))

    def events(self, request: Request, names: Sequence[str], clock: Clock) -> Run:
        frame = _symbols().name if request.options["stack"] else hex
        with closed_on_error(self.session(request)) as session:
            assert session.layout is not None
            decoder = session.layout.select(names).decoder(clock, frame=frame)
            run = Streaming(session, decoder, rate=request.rate or 0)
            if request.options["stack"] and not len(_symbols()):
                run.notes.append("--stack shows addresses: the names need CAP_SYSLOG")
            return run


@cache
def _symbols() -> Symbols:
    """Read once and early: the tool drops CAP_SYSLOG before it decodes rows."""
    return Symbols()


def _constants(request: Request) -> dict[str, Any]:
    return {"send_stacks": bool(request.options["stack"])}


tool = Reset(
    "resets",
    (
        "time",
        "pid",
        "comm",
        "laddr",
        "lport",
        "raddr",
        "rport",
        "direction",
        "state",
        "cause",
        "reason",
    ),
    important=("direction", "cause", "raddr", "laddr", "time", "comm", "state", "pid", "reason"),
    options=(Option(("--stack",), "Print the kernel stack of each RST."),),
    constants=_constants,
    examples={
        "reset -L 443": "RSTs of the connections of one port",
        "reset --count -i 10": "by direction and cause, every ten seconds",
    },
    summaries=(
        Summary(
            "count",
            "Count the RSTs of each group in the kernel, do not print them.",
            ("direction", "cause"),
        ),
    ),
)
