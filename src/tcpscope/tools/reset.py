"""Which connections are reset, by whom, and why?

One row per RST that this host sends or receives: the owner of the socket, both ends, the state of the connection before
the RST and, if this host sent it, the cause. --stack adds the kernel stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

from tcpscope.errors import UsageError
from tcpscope.kernel.symbols import Symbols
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.run import Run
from tcpscope.summary import Summary
from tcpscope.tool import Stream


class Reset(Stream):
    for_more: ClassVar = {"CAP_SYSLOG": "names of functions in --stack; without it, addresses"}

    def __init__(self) -> None:
        super().__init__(
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
            constants=lambda request: {"send_stacks": bool(request.options["stack"])},
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

    def columns(self, request: Request) -> tuple[Column, ...]:
        if request.options["stack"] and request.options["count"]:
            raise UsageError("--stack and --count", "groups have no stack")
        return super().columns(request)

    def chosen(self, request: Request) -> Sequence[str]:
        return (*self.shown, "stack") if request.options["stack"] else self.shown

    def frame(self, request: Request) -> Callable[[int], str]:
        return _symbols().name if request.options["stack"] else hex

    def open(self, request: Request) -> Run:
        run = super().open(request)
        if request.options["stack"] and not len(_symbols()):
            run.notes.append("--stack shows addresses: the names need CAP_SYSLOG")
        return run


@cache
def _symbols() -> Symbols:
    """Read once and early: the tool drops CAP_SYSLOG before it decodes rows."""
    return Symbols()


tool = Reset()
