"""What a tool is, and what every tool shares: filters, output, the run.

A tool is one module in `tools/` with a variable `tool`. Its name is the module's name, its help the module's
docstring. Most tools are a `Stream`: a projection of one event struct of one probe.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, BinaryIO, ClassVar

from tcpscope import tools
from tcpscope.errors import UsageError, did_you_mean
from tcpscope.filters import Filter
from tcpscope.kernel import filtering
from tcpscope.kernel.loaded import PRIVILEGES
from tcpscope.kernel.spec import Spec
from tcpscope.output import Column, Sink, open_sink
from tcpscope.schema import Clock, Decoder, Layout, Row
from tcpscope.session import RING_BYTES, Session, Stats, announce_ready, drop_privileges
from tcpscope.stop import Stop
from tcpscope.summary import Summary


@dataclass(frozen=True)
class Option:
    """A tool's own option. `type` is a Python type or a tuple of allowed values; a bool is a flag."""

    flags: tuple[str, ...]
    help: str
    type: Any = bool
    default: Any = None

    @property
    def name(self) -> str:
        return max(self.flags, key=len).lstrip("-").replace("-", "_")


@dataclass
class Request:
    """What the user asked for: the same for every tool, and the tool's own options in `options`."""

    filter: Filter = field(default_factory=Filter)
    output: str = "table"
    columns: tuple[str, ...] | None = None
    header: bool = True
    time: str = "iso"
    duration: float | None = None
    max_events: int | None = None
    interval: float | None = None
    stats: bool = False
    strict: bool = False
    explain: bool = False
    buffer: int | None = None
    debug: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    stream: BinaryIO = field(default_factory=lambda: sys.stdout.buffer)

    @property
    def interactive(self) -> bool:
        """Is there a terminal to refresh?"""
        return self.output == "table" and self.stream.isatty()

    def select(self, layout: Layout, default: Sequence[str]) -> Layout:
        """The columns to show: those asked for, or all in machine formats, or the tool's default."""
        if self.columns is not None:
            return layout.select(self.columns)
        return layout.select(default) if self.output == "table" else layout

    def choose(self, columns: Sequence[Column], default: Sequence[str] = ()) -> tuple[Column, ...]:
        """The same for rows that are made here and not by the kernel."""
        known = {column.name: column for column in columns}
        names = self.columns or (default if self.output == "table" and default else tuple(known))
        for name in names:
            if name not in known:
                raise UsageError(f"unknown column '{name}'",
                                 did_you_mean(name, known) or f"there are {', '.join(known)}")  # fmt: skip
        return tuple(known[name] for name in names)

    def sink(self, columns: Iterable[Column]) -> Sink:
        return open_sink(self.output, columns, self.stream, self.header)

    def ready(self, stop: Stop, *sessions: Session, keep: Sequence[str] = ()) -> bool:
        """Everything is attached: give up privileges, say so, and let the duration begin.

        False when only an explanation was asked for.
        """
        if self.explain:
            self.stream.write("\n".join([*explain(self.filter, sessions), ""]).encode())
            return False
        drop_privileges(sessions, keep)
        announce_ready()
        stop.begin()
        return True

    def finish(self, stats: Stats, sink: Sink | None = None, more: str = "--buffer") -> None:
        """The account at the end: on stderr, and in the output under --stats where the format has a place.

        `more` is the option of which more helps against loss.
        """
        if self.stats and sink is not None:
            sink.record("stats", {name: getattr(stats, name) for name in stats.__dataclass_fields__})
        self.stream.flush()
        print(f"tcpscope: {stats.line()}", file=sys.stderr)
        if self.strict:
            stats.check(f"a larger {more} or a narrower filter helps")

    def refuse_peers(self, why: str) -> None:
        """UsageError if the filter asks for a remote end where there is none."""
        for option, value in self.filter.describe():
            if option in ("--rport", "--raddr"):
                raise UsageError(f"{option} {value}", why)


def explain(filter: Filter, sessions: Sequence[Session]) -> Iterator[str]:
    """How this run is done on this kernel: hooks in use, what better ways were refused and why, who filters."""
    for session in sessions:
        yield f"probe {session.spec.name}"
        for hook in session.loaded.hooks.values():
            yield f"  {hook.name:<14} {hook.program.section if hook.program else 'not attached'}"
            for name, why in hook.refused.items():
                yield f"  {'':<14} not {session.spec.section(name)}: {why}"
                if name in session.loaded.verifier:
                    yield from (f"  {'':<16} {line}" for line in session.loaded.verifier[name].split(" | "))
            if hook.program is None and hook.without:
                yield f"  {'':<14} not known on this kernel: {hook.without}"
        here = dict(session.residual.describe())
        for option, value in filter.describe():
            yield f"  filter {option} {value}: decided in {'user space' if option in here else 'the kernel'}"


class Tool:
    """Base of all tools. `run` does the work for a Request and returns when it is over."""

    name = ""
    summary = ""
    help = ""
    aliases: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    intervals = False  # prints every --interval
    timed = True  # its rows have a --time
    event = ""  # the event struct that comes through the --buffer
    capabilities: tuple[str, ...] = PRIVILEGES
    for_more: ClassVar[Mapping[str, str]] = {}  # a capability that it can do without -> what it is for

    def run(self, request: Request) -> None:
        raise NotImplementedError


class Stream(Tool):
    """A tool that prints one row per event.

    probe, event  the object and its event struct
    columns       shown in a table; the machine formats have all
    summaries     what its rows can be put together to
    constants     read-only globals of the object, from the request
    """

    def __init__(
        self,
        probe: str,
        event: str,
        columns: Sequence[str],
        *,
        aliases: tuple[str, ...] = (),
        options: tuple[Option, ...] = (),
        summaries: tuple[Summary, ...] = (),
        constants: Callable[[Request], dict[str, Any]] = lambda request: {},
    ) -> None:
        self.probes = (probe,)
        self.event = event
        self.columns = tuple(columns)
        self.aliases = aliases
        self.event_options = options
        self.summaries = summaries
        self.intervals = self.intervals or bool(summaries)
        self.options = (
            *options,
            *(Option((f"--{summary.option}",), f"{summary.help} By default by {','.join(summary.by)}.")
              for summary in summaries),
            *((Option(("--by",), "The columns that it is done by, with commas.", str),) if summaries else ()),
        )  # fmt: skip
        self.constants = constants

    def layout(self, request: Request) -> Layout:
        """The event struct as its object describes it: needs no kernel."""
        return Spec.of(self.probes[0]).layout(self.event)

    def skip(self, request: Request) -> tuple[str, ...]:
        """Hooks that this run can do without."""
        return ()

    def ring_bytes(self, request: Request) -> int:
        """The size of the ring buffer unless --buffer gives another."""
        return RING_BYTES

    def begin(self, session: Session, request: Request) -> None:
        """Called when everything is attached, before anybody is told that the tool is ready."""

    def check(self, request: Request) -> None:
        """UsageError for what can be known to be wrong before anything is loaded."""
        if not self.asked(request):
            request.select(self.layout(request), self.columns)

    def asked(self, request: Request) -> Summary | None:
        """The summary that is asked for in place of rows."""
        asked = [summary for summary in self.summaries if request.options.get(summary.option)]
        if len(asked) > 1:
            raise UsageError(" and ".join(f"--{summary.option}" for summary in asked), "one of them at a time")
        if not asked and self.summaries:
            goes_with = " or ".join(f"--{summary.option}" for summary in self.summaries)
            for option, value in (("--by", request.options.get("by")), ("--interval", request.interval)):
                if value is not None:
                    text = f"{value:g}" if isinstance(value, float) else value
                    raise UsageError(f"{option} {text}", f"goes with {goes_with}")
        return asked[0] if asked else None

    def open(self, request: Request) -> Session:
        """The probe, attached as this tool needs it."""
        self.check(request)
        session = Session(
            self.probes[0], self.event, request.filter, constants=self.constants(request), skip=self.skip(request),
            ring_bytes=request.buffer or self.ring_bytes(request), debug=request.debug,
        )  # fmt: skip
        try:
            self.begin(session, request)
        except BaseException:
            session.close()
            raise
        return session

    def rows(
        self, session: Session, stop: Stop, request: Request, decoder: Decoder | None = None
    ) -> Iterator[list[Row]]:
        """Decoded batches; an empty one when nothing is new. Counts what it gives as shown.

        With a `decoder` its rows, and all of them: --max-events is then the business of who puts them together.
        """
        decode = (decoder or self.decoder(session, request)).rows
        keep = residual_filter(session)
        left = None if decoder else request.max_events
        for batch in session.follow(stop):
            rows = decode(batch)
            wanted = keep(batch, rows) if keep else rows
            if left is not None and len(wanted) >= left:
                wanted = wanted[:left]
                if not stop.stopped:
                    stop.stop()
            if left is not None:
                left -= len(wanted)
            session.stats.shown += len(wanted)
            session.stats.filtered += len(rows) - len(wanted)
            yield wanted

    def decoder(self, session: Session, request: Request) -> Decoder:
        assert session.layout is not None
        return request.select(session.layout, self.columns).decoder(Clock(request.time))

    def run(self, request: Request) -> None:
        if summary := self.asked(request):
            summary.run(self, request)
            return
        with Stop(request.duration) as stop, self.open(request) as session:
            decoder = self.decoder(session, request)
            sink = request.sink(map(Column.of, decoder.fields))
            if not request.ready(stop, session):
                return
            sink.rows([])  # the titles, so that a waiting reader sees that all is well
            for rows in self.rows(session, stop, request):
                sink.rows(rows)
                request.stream.flush()
            request.finish(session.account(), sink)


def residual_filter(session: Session) -> Callable[[memoryview, list[Any]], list[Any]] | None:
    """What the kernel could not decide: a function that keeps the matching rows of a batch."""
    if session.residual.is_empty:
        return None
    assert session.layout is not None
    raw = session.layout.select(("family", "laddr", "raddr", "lport", "rport")).decoder(raw=True)
    wanted = session.residual
    return lambda batch, rows: [
        row for row, r in zip(rows, raw.rows(batch), strict=True) if filtering.matches(wanted, r)
    ]


def names() -> list[str]:
    """All tools: the modules of `tools/`."""
    return sorted(module.name for module in pkgutil.iter_modules(tools.__path__))


@cache
def find(name: str) -> Tool:
    """The tool called `name`, or by a bcc name of it; UsageError if there is none."""
    known = names()
    if name in known:
        return _import(name)
    if name.startswith("tcp"):
        for candidate in map(_import, known):
            if name in candidate.aliases:
                return candidate
    raise UsageError(f"no tool '{name}'", did_you_mean(name, known) or f"there are {', '.join(known)}")


def _import(name: str) -> Tool:
    module = importlib.import_module(f"tcpscope.tools.{name}")
    tool: Tool = module.tool
    tool.name = name
    tool.help = (module.__doc__ or "").strip()
    tool.summary = tool.help.partition("\n")[0]
    return tool
