"""`tcpscope lab`: make a known fault between two network namespaces, to try the tools on."""

from __future__ import annotations

import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import Field
from typing import Any

import click

from tcpscope.cli import Once, type_of
from tcpscope.errors import TcpscopeError
from tcpscope.lab import namespaces
from tcpscope.lab.beside import Tool, arguments
from tcpscope.lab.hosts import Host, Lab
from tcpscope.lab.scenario import Outcome, Scenario, load, names
from tcpscope.output.screen import width_of


class Scenarios(click.Group):
    """One command per scenario, with the scenario's parameters as options."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return names()

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        return command_of(load(name))


@click.group()
def lab() -> None:
    """Make a known fault between two network namespaces, to try the tools on.

    \b
    tcpscope lab list
    tcpscope lab run accept-overflow
    tcpscope lab run accept-overflow --backlog 2 -- queue -o json

    The lab changes nothing outside of the two namespaces, and removes them at the end.
    """


@lab.command("list")
def show() -> None:
    """List the scenarios."""
    known = names()
    width = max(map(len, known))
    for name in known:
        click.echo(f"{name:{width}}  {load(name).title}")


@lab.command()
def clean() -> None:
    """Remove the namespaces of labs that were killed. The next lab that starts does this too."""
    removed = namespaces.sweep()
    for name in removed:
        click.echo(f"removed {name}")
    if not removed:
        click.echo("nothing to remove")


@lab.group(cls=Scenarios, subcommand_metavar="SCENARIO [OPTIONS] [-- TOOL [TOOL OPTIONS]]")
def run() -> None:
    """Make a fault, and show what a tool says about it.

    Write the tool and its options behind `--`. The tool watches the server's network namespace, unless its options
    have another --netns. In its options {client} and {server} stand for the two hosts' namespaces.
    """


def command_of(scenario: type[Scenario]) -> click.Command:
    """The command of a scenario: its parameters, and the options of all scenarios."""

    def callback(tool: tuple[str, ...], freeze: bool, keep: bool, **values: Any) -> None:
        play(scenario(**values), tool, freeze, keep)

    return Once(
        scenario.name(),
        help=inspect.cleandoc(scenario.__doc__ or scenario.title),
        short_help=scenario.title,
        callback=callback,
        context_settings={"allow_interspersed_args": False},
        params=[
            *(option_of(field) for field in scenario.parameters()),
            click.Option(
                ["--freeze"],
                is_flag=True,
                help="Take the link down after the fault. Without it the lab waits until nothing is retransmitted.",
            ),
            click.Option(["--keep"], is_flag=True, help="Keep the two hosts until Ctrl-C, to look around."),
            click.Argument(["tool"], nargs=-1, type=click.UNPROCESSED, metavar="[-- TOOL [TOOL OPTIONS]]"),
        ],
    )


def option_of(field: Field[Any]) -> click.Option:
    choices: tuple[Any, ...] = field.metadata["choices"]
    return click.Option(
        [f"--{field.name.replace('_', '-')}", field.name],
        type=type_of(choices or type(field.default)),
        default=field.default,
        show_default=True,
        help=field.metadata["help"],
    )


def play(scenario: Scenario, tool: tuple[str, ...], freeze: bool, keep: bool) -> None:
    """Make the hosts, run the scenario and the tool, and remove the hosts."""
    printer = Printer(tool[0] if tool else "")
    click.echo(f"{scenario.name()}: {scenario.title}")
    try:
        with Interrupts() as interrupts, Lab() as lab, interrupts.allowed(), contextlib.ExitStack() as stack:
            for host in lab.hosts:
                printer(host.role, f"{host.ipv4}, {host.ipv6}, network namespace {host.netns} ({host.inode})")
            scenario.on_step = lambda step: printer(step.host, step.text)
            scenario.setup(lab)
            watching = None
            if tool:
                watching = Tool(arguments(tool, lab), printer, printer.room)
                stack.callback(watching.kill)
                watching.wait_until_ready()
            scenario.fault(lab)
            outcome = scenario.settle(lab, freeze)
            for host, lines in report(scenario, outcome, lab):
                for line in lines:
                    printer(host.role, line)
            if keep:
                with contextlib.suppress(KeyboardInterrupt):
                    printer("", f"look around: ip netns exec {lab.server.netns} ss -tan; Ctrl-C ends the lab")
                    threading.Event().wait()
            if watching:
                watching.end()
    except KeyboardInterrupt:
        raise TcpscopeError("interrupted; the lab was removed") from None


def report(scenario: Scenario, outcome: Outcome, lab: Lab) -> Iterator[tuple[Host, list[str]]]:
    """Sockets and counters of both hosts after the run, as lines."""
    queue = f"accept queue of the listener: {outcome.listener.recv_q}, limit {outcome.listener.send_q}"
    for host, states, counters in (
        (lab.client, outcome.client_states, outcome.client_counters),
        (lab.server, outcome.server_states, outcome.counters),
    ):
        sockets = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        lines = [f"sockets: {sockets or 'none'}"]
        if host is lab.server and states["LISTEN"]:
            lines.append(queue)
        shown = [name for name in scenario.counters if name in counters or host is lab.server]
        lines += [f"{name} {counters[name]:+d}" if counters[name] else f"{name} 0" for name in shown]
        yield host, lines


class Printer:
    """Prints lines with their origin in front, from any thread."""

    def __init__(self, tool: str) -> None:
        self._width = max(len("client"), len(tool))
        self._lock = threading.Lock()

    @property
    def room(self) -> int | None:
        """Columns for a line on this terminal; None if it is none."""
        width = width_of(sys.stdout.buffer)
        return width and max(1, width - self._width - len(" | "))

    def __call__(self, who: str, line: str) -> None:
        with self._lock:
            click.echo(f"{who:{self._width}} | {line}")


class Interrupts:
    """Signals that end a lab, caught from `with Interrupts()` on.

    In a block `allowed()` the first one raises KeyboardInterrupt. What makes and removes a lab is outside of such a
    block, so no signal leaves it half done.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

    def __init__(self) -> None:
        self._came = self._may_raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, *_: object) -> None:
        self._came = True
        if self._may_raise:
            self._may_raise = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Raises KeyboardInterrupt at once if a signal came before."""
        self._may_raise = True
        try:
            if self._came:
                raise KeyboardInterrupt
            yield
        finally:
            self._may_raise = False
