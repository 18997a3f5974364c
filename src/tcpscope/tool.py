"""What a tool is: its columns and options, and a way to start it.

A tool is one module in `tools/` with a variable `tool`. The module's name is its name, the module's docstring its help.
Another package brings a tool by an entry point in the group `tcpscope.tools`, whose value is such a module.
Most tools are a `Stream`: they show the rows of one event struct of one probe.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from tcpscope import groups, tools
from tcpscope.errors import TcpscopeError, UsageError, did_you_mean
from tcpscope.kernel.loaded import PRIVILEGES
from tcpscope.kernel.machine import tcp_sockets
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.symbols import kernel_symbols
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.run import Run, Streaming
from tcpscope.schema import Clock, Layout
from tcpscope.session import RING_BYTES, RING_BYTES_AT_MOST, Session, closed_on_error
from tcpscope.summary import Summary

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class Tool(ABC):
    """Base of all tools.

    shown         columns of a table; JSON and CSV have all columns
    important     those that a narrow terminal shows, the most important first; the rest of `shown` follows
    alarming      a column -> whether a value of it is bad news, which a terminal shows in red
    intervals     when it prints without --interval; empty: it has no use for --interval
    once          without --interval it prints one snapshot and ends
    only_with     an option -> another one that it needs
    rated         its rows are events, so a terminal shows --rate of them in a second
    event         its event struct, which comes through the ring buffer (--buffer); empty: none
    buffer        what --buffer is
    examples      command lines, without `tcpscope` -> what they do; the help begins with them
    for_more      an optional capability -> what it is for
    """

    name = ""
    summary = ""
    help = ""
    aliases: tuple[str, ...] = ()
    probes: tuple[str | Path, ...] = ()
    options: tuple[Option, ...] = ()
    shown: tuple[str, ...] = ()
    important: tuple[str, ...] = ()
    alarming: Mapping[str, Callable[[Any], Any]] = {}
    intervals = ""
    once = False
    only_with: Mapping[str, str] = {}
    rated = False
    event = ""
    buffer = "Size of the ring buffer between kernel and tool.  [default: 4M]"
    examples: Mapping[str, str] = {}
    capabilities: tuple[str, ...] = PRIVILEGES
    for_more: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def columns(self, request: Request) -> tuple[Column, ...]:
        """All columns that its rows can have for this request. Needs no kernel. UsageError for wrong options."""

    def floods(self, request: Request) -> bool:
        """Whether a terminal needs --rate for this request: it prints rows as events come."""
        return False

    def check_duration(self, request: Request) -> None:
        """UsageError for a --duration of a tool that prints one snapshot and ends."""
        if self.once and request.duration is not None and request.interval is None:
            raise UsageError(f"--duration {request.duration:g}", "needs --interval: without it there is one snapshot")

    @abstractmethod
    def open(self, request: Request) -> Run:
        """Attach everything and return the run. Raises TcpscopeError if that fails."""


class Stream(Tool):
    """A tool that prints one row per event.

    probe         the object: a name in bpf/, or the path of one that another package brings. Its event struct has the
                  same name unless `event` gives another
    summaries     ways to group its rows
    constants     a function from the request to the object's read-only globals
    """

    rated = True

    def __init__(
        self,
        probe: str | Path,
        shown: Sequence[str],
        *,
        important: tuple[str, ...] = (),
        alarming: Mapping[str, Callable[[Any], Any]] | None = None,
        event: str | None = None,
        aliases: tuple[str, ...] = (),
        options: tuple[Option, ...] = (),
        summaries: tuple[Summary, ...] = (),
        constants: Callable[[Request], dict[str, Any]] = lambda request: {},
        examples: Mapping[str, str] | None = None,
    ) -> None:
        self.probes = (probe,)
        self.event = event or (probe if isinstance(probe, str) else probe.name.partition(".")[0])
        self.shown = tuple(shown)
        self.important = important
        self.alarming = alarming or {}
        self.aliases = aliases
        self.summaries = summaries
        self.options = (*options, *(Option((f"--{summary.option}",), summary.help) for summary in summaries))
        if summaries:
            groups = " or ".join(dict.fromkeys(",".join(summary.by) for summary in summaries))
            text = f"Group by these columns, comma-separated.  [default: {groups}]"
            self.options = (*self.options, Option(("--by",), text, str, names=True, metavar="NAMES"))
            self.intervals = "once, at the end"
            goes_with = " or ".join(f"--{summary.option}" for summary in summaries)
            self.only_with = {"by": goes_with, "interval": goes_with}
        self.constants = constants
        self.examples = examples or {}

    def floods(self, request: Request) -> bool:
        return self._asked(request) is None

    @property
    def spec(self) -> Spec:
        """Its object."""
        return Spec.of(self.probes[0])

    def aimed(self, request: Request) -> Spec:
        """Its object, whose programs hook what this request names."""
        return self.spec

    @property
    def layout(self) -> Layout:
        """The event struct as its object describes it."""
        return self.spec.layout(self.event)

    def skip(self, request: Request) -> tuple[str, ...]:
        """Hooks that this run does not need."""
        return ()

    def ring_bytes(self, request: Request) -> int:
        """The size of the ring buffer without --buffer."""
        return RING_BYTES

    def ring_for_all_sockets(self) -> int:
        """The size of a ring buffer with room for an event of each socket of the machine, and 16,384 more."""
        record = (self.layout.size + 7) // 8 * 8 + 8  # BPF_RINGBUF_HDR_SZ
        return min(1 << ((tcp_sockets() + (1 << 14)) * record).bit_length(), RING_BYTES_AT_MOST)

    def chosen(self, request: Request) -> Sequence[str]:
        """The columns that a table has without --columns."""
        return self.shown

    def frame(self, request: Request) -> Callable[[int], str]:
        """Gives a text for an address of the kernel's code."""
        return hex

    def begin(self, session: Session, request: Request) -> None:
        """Called when everything is attached, before the tool announces that it is ready."""

    def columns(self, request: Request) -> tuple[Column, ...]:
        columns = tuple(map(Column.of, self.layout.fields))
        summary = self._asked(request)
        return summary.columns(columns, request) if summary else columns

    def open(self, request: Request) -> Run:
        available = self.columns(request)
        if summary := self._asked(request):
            if request.rate is not None:
                raise UsageError(f"--rate {request.rate}", f"--{summary.option} prints groups, not rows as they come")
            spec = self.spec
            if groups.distributes(spec) if summary.of else groups.counts(spec):
                if request.buffer:
                    raise UsageError("--buffer", f"--{summary.option} counts in the kernel and needs no buffer")
                session = partial(self.session, request)
                return summary.open_counted(request, available, session, self.event, self.frame(request))
            return summary.open(request, available, lambda names: self.events(request, names, Clock("none")))
        return self.events(
            request, [column.name for column in request.choose(available, self.chosen(request))], Clock(request.time)
        )

    def events(self, request: Request, names: Sequence[str], clock: Clock) -> Run:
        """A run of events whose rows have these columns."""
        with closed_on_error(self.session(request)) as session:
            assert session.layout is not None
            decoder = session.layout.select(names).decoder(clock, frame=self.frame(request))
            return Streaming(session, decoder, rate=request.rate or 0)

    def session(self, request: Request, by: Sequence[str] = (), number: str | None = None) -> Session:
        """The probe, attached as this tool needs it. With `by` it counts by these columns, and sends no events.

        `number` is a column to sum, or whose distribution is made.
        """
        spec = self.aimed(request)
        counts = groups.counts(spec)
        constants, entries, key_bytes = groups.counting(self.layout, by, number) if counts else ({}, {}, {})
        session = Session(
            spec,
            None if by else self.layout,
            request.filter,
            constants=self.constants(request)
            | ({"rate_per_s": request.rate or 0} if "rate_per_s" in spec.variables else {})
            | constants,
            entries=entries,
            key_bytes=key_bytes,
            skip=self.skip(request),
            ring_bytes=request.buffer or self.ring_bytes(request),
            debug=request.debug,
        )
        with closed_on_error(session):
            self.begin(session, request)
        return session

    def _asked(self, request: Request) -> Summary | None:
        """The summary that the request asks for; None: rows."""
        asked = [summary for summary in self.summaries if request.options.get(summary.option)]
        if len(asked) > 1:
            raise UsageError(" and ".join(f"--{summary.option}" for summary in asked), "one of them at a time")
        if not asked and self.summaries:
            for option, value in (("by", request.options.get("by")), ("interval", request.interval)):
                if value is not None:
                    text = f"{value:g}" if isinstance(value, float) else value
                    raise UsageError(f"--{option} {text}", f"needs {self.only_with[option]}")
        return asked[0] if asked else None


class Stacked(Stream):
    """A stream with the option --stack. Its event has a field `stack`, and its object the constant `send_stacks`."""

    for_more: ClassVar[Mapping[str, str]] = {"CAP_SYSLOG": "names of functions in --stack; without it, addresses"}

    def shows_functions(self, request: Request) -> bool:
        """Whether rows of this request have functions of the kernel."""
        return bool(request.options["stack"])

    def columns(self, request: Request) -> tuple[Column, ...]:
        if request.options["stack"] and self._asked(request):
            raise UsageError("--stack and --count", "groups have no stack")
        return super().columns(request)

    def chosen(self, request: Request) -> Sequence[str]:
        return (*self.shown, "stack") if request.options["stack"] else self.shown

    def frame(self, request: Request) -> Callable[[int], str]:
        return kernel_symbols().name if self.shows_functions(request) else hex

    def open(self, request: Request) -> Run:
        run = super().open(request)
        if self.shows_functions(request) and not len(kernel_symbols()):
            run.notes.append("functions are shown as addresses: the names need CAP_SYSLOG")
        return run


GROUP = "tcpscope.tools"


def names() -> list[str]:
    """All tools: the modules of `tools/`, and those that other packages bring."""
    return sorted({*_ours(), *_brought()})


@cache
def find(name: str) -> Tool:
    """The tool with this name, or with this bcc name. UsageError if there is none."""
    ours = _ours()
    if name in ours:
        return _import(name)
    if name.startswith("tcp"):
        for candidate in map(_import, ours):
            if name in candidate.aliases:
                return candidate
    if name in _brought():
        return _load(name, _brought()[name])
    known = names()
    raise UsageError(f"no tool '{name}'", did_you_mean(name, known) or f"there are {', '.join(known)}")


def _ours() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(tools.__path__))


@cache
def _brought() -> dict[str, EntryPoint]:
    """The tools of other packages, by name. None of them can replace one of ours."""
    from importlib.metadata import entry_points  # takes as long as a small tool to start

    ours = _ours()
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in ours}


def _load(name: str, point: EntryPoint) -> Tool:
    """The tool of an entry point. TcpscopeError, which names its package, if it cannot be imported."""
    package = point.dist.name if point.dist else point.value
    try:
        module = point.load()
    except Exception as error:
        raise TcpscopeError(f"the tool '{name}' of the package {package} cannot be imported", repr(error)) from None
    if not isinstance(getattr(module, "tool", None), Tool):
        what = f"the tool '{name}' of the package {package} is none"
        raise TcpscopeError(what, f"the module {point.value} must have a variable `tool`, a tcpscope.tool.Tool")
    return _named(name, module)


def _import(name: str) -> Tool:
    return _named(name, importlib.import_module(f"tcpscope.tools.{name}"))


def _named(name: str, module: ModuleType) -> Tool:
    tool: Tool = module.tool
    tool.name = name
    tool.help = (module.__doc__ or "").strip()
    tool.summary = tool.help.partition("\n")[0]
    return tool
