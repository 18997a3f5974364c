"""The command line. Each module of `tools/` is a command; diagnose, features and lab are listed here."""

from __future__ import annotations

import copy
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from tcpscope import tool as toolbox
from tcpscope.errors import TcpscopeError, UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.kernel.resources import help_for
from tcpscope.output import printable
from tcpscope.output.screen import width_of
from tcpscope.quantities import seconds, whole
from tcpscope.request import Request
from tcpscope.show import show
from tcpscope.writing import Output, complaint, take_over

_OTHERS = {
    "diagnose": ("tcpscope.diagnose.cli", "Watch this machine's connections, then say what is wrong and what helps."),
    "features": ("tcpscope.features_cli", "Show what each tool can do on this kernel, and what is missing."),
    "lab": ("tcpscope.lab.cli", "Make a known fault between two network namespaces, to try the tools on."),
    "new": ("tcpscope.own.cli", "Write a small BPF program to begin with."),
    "run": ("tcpscope.own.cli", "Show the events of a BPF program of your own."),
}


_ARGV = "tcpscope.argv"  # where a context has the command behind --
_HIGHEST = 2**31 - 1
_RATE_ON_TERMINAL = 100  # rows in a second: more are no use to who watches them


class _ReaderGoneError(Exception):
    """The reader of our output has closed it."""


@contextmanager
def _click_lets_pass() -> Iterator[None]:
    """click would end with status 1 if our reader has gone."""
    try:
        yield
    except BrokenPipeError:
        raise _ReaderGoneError from None


class Commands(click.Group):
    """The top command. It imports a command's module only when that command is called, to start fast."""

    def invoke(self, ctx: click.Context) -> Any:
        with _click_lets_pass():
            return super().invoke(ctx)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _click_lets_pass():  # --help is printed here
            return super().make_context(*args, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*toolbox.names(), *_OTHERS})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "help":
            return _HELP
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
        rows = [(name, _summary(name)) for name in toolbox.names() if name not in _OTHERS]
        with formatter.section("Tools"):
            formatter.write_dl(rows)
        with formatter.section("Commands"):
            others = [(name, text) for name, (_, text) in _OTHERS.items()]
            formatter.write_dl(sorted([*others, ("help", "Show the help of a command, such as `tcpscope help life`.")]))


def _summary(name: str) -> str:
    """The summary of a tool. One of another package may be broken, which must not hide the others."""
    try:
        return toolbox.find(name).summary
    except TcpscopeError as error:
        return f"({error})"


def _show_help(words: Sequence[str], man: Path | None) -> None:
    context = click.get_current_context().find_root()
    if man:
        from tcpscope import manual

        click.echo("\n".join(map(str, manual.write(context, man))))
        return
    command: click.Command = context.command
    for word in words:
        if not isinstance(command, click.Group):
            raise UsageError(f"help for '{word}'", f"'{command.name}' has no commands of its own")
        name, found, _ = command.resolve_command(context, [word])
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=name)
    click.echo(command.get_help(context))


def _names_that_begin(context: click.Context, _: click.Parameter, begin: str) -> list[str]:
    root = context.find_root()
    assert isinstance(root.command, click.Group)
    return [name for name in root.command.list_commands(root) if name.startswith(begin)]


_HELP = click.Command(
    "help",
    params=[
        click.Argument(["words"], nargs=-1, metavar="[COMMAND]...", shell_complete=_names_that_begin),
        click.Option(
            ["--man"],
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIRECTORY",
            help="Write the manual pages of all commands into this directory.",
        ),
    ],
    callback=_show_help,
    help="Show the help of a command.",
)


class WholeNumber(click.types.IntParamType):
    """A number from `lowest` on, in ASCII digits."""

    def __init__(self, lowest: int = 0) -> None:
        self.lowest = lowest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = value if isinstance(value, int) else whole(value, _HIGHEST)
        if number is None or number < self.lowest:
            self.fail(f"{value!r} is not a number from {self.lowest} to {_HIGHEST}", param, ctx)
        return number


def _seconds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    found = None if value is None else seconds(value)
    if value is not None and (found is None or not 0 < found < 1e9):
        raise UsageError(f"--{parameter.name} {value}", "give a time above 0, such as 30, 200ms, 5m or 1h")
    return found


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """4096, 64K or 4M in bytes. The kernel takes a power of two, at least a page."""
    if value is None:
        return None
    digits, factor = value, 1
    if value[-1:].upper() in ("K", "M"):
        digits, factor = value[:-1], 1 << (10 if value[-1].upper() == "K" else 20)
    size = int(digits) * factor if digits.isascii() and digits.isdigit() and len(digits) <= 10 else 0
    if size < 4096 or size & (size - 1) or size > 1 << 30:
        raise UsageError(f"--buffer {value}", "give a power of two from 4K to 1024M")
    return size


def _filter(*flags: str, **attributes: Any) -> click.Option:
    return click.Option(flags, multiple=True, callback=lambda *given: given[-1] or None, **attributes)


def _joined(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> str | None:
    """The values of an option that may be repeated, as one."""
    return ",".join(given) if given else None


FILTERS = (
    _filter("-p", "--pid", metavar="PIDS", help="Owned by these processes."),
    _filter("--comm", metavar="NAMES", help="Owned by a process with one of these names."),
    _filter("-u", "--uid", metavar="UIDS|NAMES", help="Owned by a process of these users."),
    _filter("--cgroup", metavar="PATHS|IDS", help="Owned by a process in these cgroups (v2) or below them."),
    _filter("--netns", metavar="INODES|NAMES|pid:N", help="In these network namespaces."),
    click.Option(["-4", "ipv4"], is_flag=True, help="IPv4 only, with IPv4 on IPv6 sockets."),
    click.Option(["-6", "ipv6"], is_flag=True, help="IPv6 only."),
    _filter("-L", "--lport", metavar="PORTS", help="Local ports, such as 80,https,8000-8100."),
    _filter("-R", "--rport", metavar="PORTS", help="Remote ports."),
    _filter("--port", metavar="PORTS", help="Ports at either end."),
    _filter(
        "--laddr", metavar="NETWORKS", help="Local addresses, networks or hosts, such as 10.0.0.0/8,::1,db.example."
    ),
    _filter("--raddr", metavar="NETWORKS", help="Remote addresses, networks or hosts."),
)
DURATION = click.Option(
    ["-d", "--duration"],
    callback=_seconds,
    metavar="TIME",
    help="Stop after this time: seconds, or 200ms, 5m, 1h.  [default: at Ctrl-C]",
)
FORMAT = click.Option(
    ["-o", "--output"],
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="Output format.",
)
COMMON = (
    FORMAT,
    DURATION,
    click.Option(["--stats"], is_flag=True, help="Append the account of events as a last JSON record (-o json)."),
    click.Option(["--strict"], is_flag=True, help="Exit with status 5 if an event was lost."),
    click.Option(
        ["-v", "--verbose"], is_flag=True, help="Print the account of events at the end also if nothing was lost."
    ),
    click.Option(["--debug"], is_flag=True, help="Print libbpf's messages on stderr."),
)
TIME = click.Option(
    ["--time"],
    type=click.Choice(["iso", "local", "elapsed", "none"]),
    help="Time stamps: UTC (iso), time of day (local), seconds since the start (elapsed), or none.  "
    "[default: local in a table on a terminal, else iso]",
)
BUFFER = click.Option(
    ["--buffer"],
    callback=_bytes,
    metavar="SIZE",
    help=toolbox.Tool.buffer,
)
RATE = click.Option(
    ["--rate"],
    type=WholeNumber(0),
    metavar="N",
    help="Print at most N rows in a second, and count the others; 0: no limit.  "
    f"[default: {_RATE_ON_TERMINAL} on a terminal]",
)
OUTPUT = (
    *COMMON,
    click.Option(
        ["--columns"],
        metavar="NAMES",
        help="Print these columns, comma-separated.  [default: the most useful in a table, all in JSON and CSV]",
    ),
    click.Option(
        ["-w", "--wide"],
        is_flag=True,
        help="On a terminal: print the columns that do not fit too. In a pipe a table always has them.",
    ),
    click.Option(["--no-header", "header"], is_flag=True, flag_value=False, default=True, help="Print no titles."),
    TIME,
    click.Option(
        ["-n", "--max-events"],
        type=WholeNumber(1),
        metavar="N",
        help="Stop after N rows. Of snapshots and groups: print only the first N each time.  [default: no limit]",
    ),
    click.Option(["--explain"], is_flag=True, help="Show which kernel hooks would be used here, then exit."),
    BUFFER,
    RATE,
)
LIVE = click.Option(
    ["-o", "--output"],
    type=click.Choice(["table", "json", "csv", "screen"]),
    default="table",
    show_default=True,
    help="Output format; screen: a live table to sort, filter, pause, and look back with.",
)
INTERVAL = click.Option(
    ["-i", "--interval"], callback=_seconds, metavar="TIME", help="Print results this often: seconds, or 200ms, 5m."
)
FILTERS_TITLE = "Filters (all must match; several values: 80,443, or repeat the option)"
OUTPUT_TITLE = "Output"
_FILTER_NAMES = tuple(option.name for option in FILTERS)


class Once(click.Command):
    """A command that refuses a second value of an option that has one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            single = isinstance(option, click.Option) and not (option.multiple or option.is_flag)
            if single and given.count(option) > 1:
                raise UsageError(f"{option.opts[-1]} is given {given.count(option)} times", "give it once")
        return super().parse_args(ctx, args)


class Command(Once):
    """A command whose help has its options in groups.

    hints     an option that it does not have -> what to say to somebody who gives it; for flags of bcc's tools: bcc.py
    examples  command lines, without `tcpscope` -> what they do
    watches   it takes a command to watch, behind --
    argument  its positional argument, such as FILE
    """

    def __init__(
        self,
        name: str,
        groups: Mapping[str, Sequence[click.Option]],
        hints: Mapping[str, str] | None = None,
        examples: Mapping[str, str] | None = None,
        watches: bool = False,
        argument: click.Argument | None = None,
        **attributes: Any,
    ) -> None:
        arguments: list[click.Parameter] = [argument] if argument else []
        options = [option for group in groups.values() for option in group]
        super().__init__(name, params=[*arguments, *options], **attributes)
        self.takes_argument = argument is not None
        self.groups, self.hints, self.examples, self.watches = groups, hints or {}, examples or {}, watches

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), *(["[-- COMMAND]"] if self.watches else [])]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        if not self.watches and args[at + 1 :]:
            raise UsageError(f"'{self.name}' watches no command", "leave out what stands behind --")
        if self.watches and at < len(args):
            args, ctx.meta[_ARGV] = args[:at], args[at + 1 :]
            if not ctx.meta[_ARGV]:
                raise UsageError("-- without a command", "give the command to watch behind it")
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if isinstance(error, click.NoSuchOption):
                what, hint = f"has no option '{error.option_name}'", self._hint(error.option_name)
            elif error.message.startswith("Got unexpected extra argument") and not self.takes_argument:
                what, hint = "takes no argument", self._hint("ARGUMENT")
            else:
                raise
            if not hint:
                raise
            raise UsageError(f"'{self.name}' {what}", hint) from None

    def _hint(self, flag: str) -> str:
        from tcpscope import bcc  # only after a mistake

        return self.hints.get(flag) or bcc.hint(self.name or "", flag)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        help_option = self.get_help_option(ctx)
        groups = dict(self.groups)
        last = list(groups)[-1]
        if self.examples:
            with formatter.section("Examples"):
                formatter.write_dl([(f"tcpscope {line}", text) for line, text in self.examples.items()], col_max=4)
        for title, group in groups.items():
            options = [*group, help_option] if title == last and help_option else group
            rows = [row for option in options if (row := option.get_help_record(ctx))]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def command_of(
    tool: toolbox.Tool,
    argument: click.Argument | None = None,
    made: Callable[[dict[str, Any]], toolbox.Tool] | None = None,
) -> click.Command:
    """The click command of a tool: its own options, and those common options that it has a use for.

    With an `argument`, `made` takes its value from the values, and gives the tool to show.
    """
    own = [
        click.Option(
            list(option.flags),
            is_flag=option.type is bool,
            type=type_of(option.type),
            default=None if option.repeats else option.unset,
            multiple=option.repeats,
            callback=_joined if option.repeats else None,
            show_default=option.default is not None,
            metavar=option.metavar,
            help=_with(tool.only_with.get(option.name), option.help),
        )
        for option in tool.options
    ]

    def callback(**values: Any) -> int:
        argv = click.get_current_context().meta.get(_ARGV, ())
        shown = made(values) if made else tool
        request = request_of(shown, values)
        if argv and request.filter.cgroup:
            raise UsageError("--cgroup and a command", "the command has a cgroup of its own")
        if argv and request.output == "screen":
            raise UsageError("-o screen and a command", "both write to the terminal")
        return show(shown, request, sys.stdout.buffer, argv)

    useless = {
        option
        for option, used in (
            (INTERVAL, tool.intervals),
            (BUFFER, tool.event),
            (RATE, tool.rated),
        )
        if not used
    }
    only_with = {**({"duration": "--interval"} if tool.once else {}), **tool.only_with}
    interval = changed(INTERVAL, help=f"{INTERVAL.help}  [default: {tool.intervals}]")

    def used(options: Sequence[click.Option]) -> list[click.Option]:
        return [
            changed(
                option,
                help=_with(only_with.get(option.name or ""), tool.buffer if option is BUFFER else option.help or ""),
            )
            for option in options
            if option not in useless
        ]

    output = [LIVE if option is FORMAT and tool.intervals else option for option in OUTPUT]
    groups = {
        "Options": [*own, *(used([interval]) if tool.intervals else ())],
        FILTERS_TITLE: used(FILTERS),
        OUTPUT_TITLE: used(output),
    }
    return Command(
        tool.name,
        groups,
        examples=tool.examples,
        callback=callback,
        help=f"\b\n{tool.help}",
        short_help=tool.summary,
        watches=not tool.once,
        argument=argument,
    )


def type_of(type_: Any) -> Any:
    """The click type of an option of a tool or a scenario."""
    if isinstance(type_, tuple):
        return click.Choice(type_)
    return {bool: None, int: WholeNumber()}.get(type_, type_)


def changed(option: click.Option, **attributes: Any) -> click.Option:
    """A copy of an option with other attributes."""
    copied = copy.copy(option)
    for name, value in attributes.items():
        setattr(copied, name, value)
    return copied


def _with(other: str | None, help: str) -> str:
    """The help of an option that needs another one."""
    return f"With {other}: {help[0].lower()}{help[1:]}" if other else help


def filter_of(values: dict[str, Any]) -> Filter:
    """The filter. Its options are removed from `values`."""
    given = {name: values.pop(name, None) for name in _FILTER_NAMES}
    return Filter.from_options(
        **given, told=lambda line: print(f"tcpscope: {printable(line)}", file=sys.stderr, flush=True)
    )


def request_of(tool: toolbox.Tool, values: dict[str, Any]) -> Request:
    """The request that the options of a command make. Raises UsageError."""
    filter = filter_of(values)
    own = {option.name: values.pop(option.name) for option in tool.options}
    if values["time"] is None:
        on_terminal = values["output"] == "screen" or (values["output"] == "table" and width_of(sys.stdout.buffer))
        values["time"] = "local" if on_terminal else "iso"
    request = Request(filter=filter, options=own, **values)
    on_terminal = request.output == "table" and width_of(sys.stdout.buffer)
    if request.rate is None and on_terminal and tool.floods(request):
        request.rate = _RATE_ON_TERMINAL
    return request


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tcpscope", message="%(prog)s %(version)s")
def tcpscope() -> None:
    """What the Linux kernel does to TCP connections, and why."""


def main() -> NoReturn:
    """Run the command line and exit. A known error prints one line, never a traceback."""
    _open_standard_streams()
    warnings.showwarning = _warn
    if sys.stdout is None:
        sys.exit(_fail("standard output is closed", 1))
    take_over()
    status = _guarded(lambda: tcpscope.main(prog_name="tcpscope", standalone_mode=False))
    Output.over = True
    if text := complaint(sys.stdout.buffer):
        _fail(text, status)
    sys.exit(status)


def _open_standard_streams() -> None:
    """Open /dev/null for each standard stream that our caller has closed. Else the next file gets its number."""
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
        return _fail(str(error), error.exit_status, error.details)
    except (BrokenPipeError, _ReaderGoneError):
        # The reader has closed the pipe, which is no error. Python must not flush stdout again at exit.
        _give_up(sys.stdout)
        return 0
    except (KeyboardInterrupt, click.Abort):
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            _give_up(sys.stdout)
        if os.environ.get("TCPSCOPE_TRACEBACK"):
            raise
        text = str(error.strerror or error) + (f": {error.filename}" if error.filename else "")
        return _fail("; ".join(filter(None, (text, help_for(error.errno)))), 1)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A doubt about what was asked for (filters.py): one line, too."""
    print(f"tcpscope: {printable(str(message))}", file=sys.stderr)


_DETAIL = 6
"""The indent of a second line of a detail, on a terminal."""


def _fail(message: str, status: int, details: Sequence[str] = ()) -> int:
    from tcpscope.output.screen import filled  # most runs have no error

    try:
        print(filled(f"tcpscope: {printable(message)}", sys.stderr), file=sys.stderr)
        for line in details:
            print(filled(f"  {printable(line.expandtabs(4))}", sys.stderr, _DETAIL), file=sys.stderr)
    except OSError:
        _give_up(sys.stderr)
    return status


def _give_up(stream: TextIO) -> None:
    """Send the rest of its buffer to /dev/null: it cannot be written, and Python tries again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
