"""The command line. Commands are found, not listed: tools by their modules, and diagnose, features, lab here."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

import click

from tcpscope import tool as toolbox
from tcpscope.errors import TcpscopeError, UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.output import printable
from tcpscope.request import Request
from tcpscope.show import show

_OTHERS = {
    "diagnose": ("tcpscope.diagnose.cli", "Watch this machine's connections, then say what is wrong and what helps."),
    "features": ("tcpscope.features_cli", "What each tool can do on this kernel, and what is missing."),
    "lab": ("tcpscope.lab.cli", "Two hosts in network namespaces with a known fault, to try the tools on."),
}


class _ReaderGoneError(Exception):
    """Whoever read our output has closed it."""


class Commands(click.Group):
    """Imports a command's module only when that command is called: the start counts."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGoneError from None  # click would end with status 1

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*toolbox.names(), *_OTHERS])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _OTHERS:
            command: click.Command = getattr(importlib.import_module(_OTHERS[name][0]), name)
            return command
        return command_of(toolbox.find(name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        try:
            return name, self.get_command(ctx, name), args[1:]
        except UsageError:
            commands = self.list_commands(ctx)
            hint = did_you_mean(name, commands) or f"there are {', '.join(commands)}"
            raise UsageError(f"no command '{name}'", hint) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, toolbox.find(name).summary) for name in toolbox.names()]
        with formatter.section("Tools"):
            formatter.write_dl(rows)
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_OTHERS.items())])


def _seconds(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < 1e9:
        raise UsageError(f"--{parameter.name} {value:g}", "a number of seconds above 0")
    return value


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """4096, 64K, 4M: a power of two of at least a page, as the kernel wants it."""
    if value is None:
        return None
    digits, factor = value, 1
    if value[-1:].upper() in ("K", "M"):
        digits, factor = value[:-1], 1 << (10 if value[-1].upper() == "K" else 20)
    size = int(digits) * factor if digits.isascii() and digits.isdigit() and len(digits) <= 10 else 0
    if size < 4096 or size & (size - 1) or size > 1 << 30:
        raise UsageError(f"--buffer {value}", "a power of two from 4K to 1024M")
    return size


FILTERS = (
    click.Option(["-p", "--pid"], metavar="PID", help="Owned by this process."),
    click.Option(["--comm"], metavar="NAME", help="Owned by a process of this name."),
    click.Option(["-u", "--uid"], metavar="UID|NAME", help="Owned by a process of this user."),
    click.Option(["--cgroup"], metavar="PATH|ID", help="Owned by a process in this cgroup (v2) or below."),
    click.Option(["--netns"], metavar="INODE|NAME|pid:N", help="In this network namespace."),
    click.Option(["-4", "ipv4"], is_flag=True, help="IPv4 only (v4-mapped sockets too)."),
    click.Option(["-6", "ipv6"], is_flag=True, help="IPv6 only."),
    click.Option(["-L", "--lport"], metavar="PORTS", help="Local ports: 80,443,8000-8100."),
    click.Option(["-R", "--rport"], metavar="PORTS", help="Remote ports."),
    click.Option(["--port"], metavar="PORTS", help="Ports at either end."),
    click.Option(["--laddr"], metavar="NETWORKS", help="Local addresses: 10.0.0.0/8,::1."),
    click.Option(["--raddr"], metavar="NETWORKS", help="Remote addresses."),
)
COMMON = (
    click.Option(
        ["-o", "--output"],
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help="Format.",
    ),
    click.Option(
        ["-d", "--duration"],
        type=float,
        callback=_seconds,
        metavar="SECONDS",
        help="End so long after the hooks are attached.",
    ),
    click.Option(["--stats"], is_flag=True, help="The account of events in the output too (JSON)."),
    click.Option(["--strict"], is_flag=True, help="Exit with 5 if any event was lost."),
    click.Option(["--debug"], is_flag=True, help="libbpf's own messages on stderr."),
)
TIME = click.Option(
    ["--time"],
    type=click.Choice(["iso", "elapsed", "none"]),
    default="iso",
    show_default=True,
    help="Time stamps: UTC, seconds since the start, or none.",
)
BUFFER = click.Option(
    ["--buffer"], callback=_bytes, metavar="SIZE", help="Ring buffer between kernel and tool.  [default: 4M]"
)
OUTPUT = (
    *COMMON,
    click.Option(["--columns"], metavar="NAMES", help="Columns, in this order."),
    click.Option(["--no-header", "header"], is_flag=True, flag_value=False, default=True, help="No line of titles."),
    TIME,
    click.Option(
        ["-n", "--max-events"],
        type=click.IntRange(1),
        metavar="N",
        help="At most so many rows: of a stream in all, and it ends then; else each time.",
    ),
    click.Option(["--explain"], is_flag=True, help="Say how this would be done on this kernel, and end."),
    BUFFER,
)
INTERVAL = click.Option(
    ["-i", "--interval"], type=float, callback=_seconds, metavar="SECONDS", help="Print every so often."
)
_FILTER_NAMES = tuple(option.name for option in FILTERS)


def command_of(tool: toolbox.Tool) -> click.Command:
    """The click command of a tool: its own options, and those of all tools that it has a use for."""
    own = [
        click.Option(
            list(option.flags),
            is_flag=option.type is bool,
            type=click.Choice(option.type)
            if isinstance(option.type, tuple)
            else (None if option.type is bool else option.type),
            default=option.unset,
            show_default=option.default is not None,
            help=option.help,
        )
        for option in tool.options
    ]

    def callback(**values: Any) -> None:
        show(tool, request_of(tool, values), sys.stdout.buffer)

    useless = {
        option for option, used in ((INTERVAL, tool.intervals), (TIME, tool.timed), (BUFFER, tool.event)) if not used
    }
    shared = [option for option in (INTERVAL, *FILTERS, *OUTPUT) if option not in useless]
    return click.Command(
        tool.name, params=[*own, *shared], callback=callback, help=f"\b\n{tool.help}", short_help=tool.summary
    )


def filter_of(values: dict[str, Any]) -> Filter:
    """Takes the options of the filter out of `values`."""
    return Filter.from_options(**{name: values.pop(name) for name in _FILTER_NAMES})


def request_of(tool: toolbox.Tool, values: dict[str, Any]) -> Request:
    """The checked request behind the options of a command."""
    filter = filter_of(values)
    own = {option.name: values.pop(option.name) for option in tool.options}
    return Request(filter=filter, options=own, **values)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tcpscope", message="%(prog)s %(version)s")
def tcpscope() -> None:
    """What the Linux kernel does to TCP connections, and why."""


def main() -> NoReturn:
    """Run the command line and exit: a known error is one line and its status, never a traceback."""
    _open_standard_streams()
    warnings.showwarning = _warn
    if sys.stdout is None:
        sys.exit(_fail("standard output is closed", 1))
    sys.exit(_guarded(lambda: tcpscope.main(prog_name="tcpscope", standalone_mode=False)))


def _open_standard_streams() -> None:
    """What was closed by who called us: its number would be given to the next file, and be written to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:  # then print() would take stdout
        sys.stderr = os.fdopen(2, "w")


def _guarded(run: Callable[[], Any]) -> int:
    try:
        status = run()
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _fail(" ".join(error.format_message().split()), 2)
    except TcpscopeError as error:
        return _fail(str(error), error.exit_status)
    except (BrokenPipeError, _ReaderGoneError):
        # The reader has gone, which is its right. stdout must not be flushed again at exit.
        _give_up(sys.stdout)
        return 0
    except (KeyboardInterrupt, click.Abort):
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            _give_up(sys.stdout)
        if os.environ.get("TCPSCOPE_TRACEBACK"):
            raise
        return _fail(str(error.strerror or error) + (f": {error.filename}" if error.filename else ""), 1)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A doubt about what was asked for (filters.py): one line, too."""
    print(f"tcpscope: {printable(str(message))}", file=sys.stderr)


def _fail(message: str, status: int) -> int:
    try:
        print(f"tcpscope: {printable(message)}", file=sys.stderr)
    except OSError:
        _give_up(sys.stderr)
    return status


def _give_up(stream: TextIO) -> None:
    """What is left in its buffer cannot be written, and Python tries again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
