"""A live screen for all tools whose rows come again and again (-o screen): sort, filter, pause, look back.

It needs the extra `tcpscope[screen]`; only `app` imports textual.
"""

from __future__ import annotations

import sys

from tcpscope.errors import TcpscopeError, UsageError
from tcpscope.request import Request
from tcpscope.run import Run
from tcpscope.stop import Stop
from tcpscope.tool import Tool


def check(tool: Tool, request: Request) -> None:
    """UsageError if there is nothing that a screen can repeat, or no terminal; TcpscopeError without textual."""
    if tool.floods(request):
        help = "prints rows as events come" + ("; groups repeat: --count" if tool.intervals else "")
        raise UsageError("-o screen", help)
    for stream, name in ((sys.__stdin__, "input"), (sys.__stdout__, "output"), (sys.__stderr__, "error")):
        if stream is None or not stream.isatty():
            raise UsageError("-o screen", f"needs a terminal, and standard {name} is not one")
    try:
        import textual  # noqa: F401
    except ImportError:
        raise TcpscopeError("-o screen needs textual", "pip install 'tcpscope[screen]'") from None


def show(tool: Tool, request: Request, run: Run, stop: Stop) -> None:
    """Show the run's batches until the user ends it. Raises what the run raises."""
    from tcpscope.live.app import Screen

    Screen(tool, request, run, stop).show()
