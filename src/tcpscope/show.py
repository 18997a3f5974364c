"""Shows a run on the command line: rows on standard output, notes and the account on standard error."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

from tcpscope.command import Command
from tcpscope.errors import LossError, ReachedError
from tcpscope.filters import Filter
from tcpscope.kernel.clock import monotonic_ns
from tcpscope.kernel.loaded import Loaded
from tcpscope.output import Sink, open_sink, screen
from tcpscope.request import Request
from tcpscope.run import Batch, Run, whole
from tcpscope.schema import Clock
from tcpscope.session import Session, Stats, announce_ready, drop_privileges, filters
from tcpscope.stop import Stop
from tcpscope.tool import Tool
from tcpscope.writing import Output, lost_by


def show(tool: Tool, request: Request, stream: BinaryIO, argv: Sequence[str] = ()) -> int:
    """Run a tool and show its rows until it ends. Raises LossError under --strict if an event was lost.

    With `argv`, a command: show what concerns it. Returns its exit status, when it has ended; without a command 0.
    """
    if request.output == "screen":
        _show_live(tool, request, stream)
        return 0
    with Stop(request.duration, descriptor(stream)) as stop:
        if argv and not request.explain:
            return _show_command(tool, request, stream, stop, argv)
        _show(tool, request, stream, stop)
    return 0


def _show_command(tool: Tool, request: Request, stream: BinaryIO, stop: Stop, argv: Sequence[str]) -> int:
    with Command(argv) as command:
        request.filter = replace(request.filter, cgroup=(command.cgroup,))
        stop.end_with(command.pid)
        try:
            _show(tool, request, stream, stop, command)
        finally:
            if command.started:
                stop.wait_until_stopped()  # by its end, or a second signal
        if command.ended() and not command.started:
            print("tcpscope: the command has ended before it was started", file=sys.stderr)
        return command.status() if command.ended() else 0


def _show(tool: Tool, request: Request, stream: BinaryIO, stop: Stop, command: Command | None = None) -> None:
    with tool.open(request) as run:
        Output.stop = stop
        if request.explain:
            for line in explain(request.filter, run.sessions, run.buffer_bytes):
                stream.write(f"{screen.filled(line, stream, _INDENT)}\n".encode())
            return
        sink: Sink
        page = None
        if request.output == "table" and screen.width_of(stream):
            sink = table = _table(tool, run, request, stream)
            page = _Page(run, request, table, stream) if _replaces(run, stream) else None
        else:
            sink = open_sink(request.output, run.columns, stream, request.header)
        begin(run.sessions, stop, (*run.keep, *(command.keep if command else ())))
        if command and not stop.stopped:
            command.start()
        _print_notes(run)
        if run.waits and sys.stderr.isatty():
            print(screen.filled(f"tcpscope: {_waiting(request, command)}", sys.stderr), file=sys.stderr)
        elif not page and not run.done:
            sink.rows([])  # the titles, so that a waiting reader sees that all is well
        batches = run.batches(stop, request.max_events)
        for batch in whole(batches) if page else batches:
            if stop.stopped:
                clear_interrupt()
            if not page:
                run.not_taken(sink.rows(batch.rows))
            elif batch.kind == "total" or (batch.kind == "snapshot" and not (run.over and page.is_fresh)):
                page.draw(batch)  # but not what little is left at the end, over a whole interval
            stream.flush()
            if run.notes:
                _print_notes(run)
        if stop.stopped:
            clear_interrupt()
        if not page:
            sink.rows([])  # the titles, if no row came
            stream.flush()
        _print_notes(run)
        if run.accounts or request.stats or request.strict:
            finish(request, run.account(), sink, stream, run.more)
        if run.reached:
            raise ReachedError(run.reached)


def _show_live(tool: Tool, request: Request, stream: BinaryIO) -> None:
    """On a live screen. The notes and the account are printed when it has gone."""
    from tcpscope import live  # most runs need no such screen

    live.check(tool, request)
    if request.interval is None:
        request.interval = 1.0
    with Stop(request.duration) as stop, tool.open(request) as run:
        begin(run.sessions, stop, run.keep)
        live.show(tool, request, run, stop)
        _print_notes(run)
        if run.accounts or request.strict:
            finish(request, run.account(), open_sink("table", run.columns, stream), stream, run.more)
        if run.reached:
            raise ReachedError(run.reached)


def descriptor(stream: BinaryIO) -> int | None:
    """The file descriptor of a stream; None if it is in memory."""
    try:
        return stream.fileno()
    except io.UnsupportedOperation:
        return None


def begin(sessions: Sequence[Session], stop: Stop, keep: Sequence[str] = ()) -> None:
    """Call it when everything is attached: it drops privileges, announces readiness, and starts the duration."""
    drop_privileges(sessions, keep)
    announce_ready()
    stop.begin()


def finish(request: Request, stats: Stats, sink: Sink, stream: BinaryIO, more: str = "") -> None:
    """Print the account on stderr if something was lost or the request asks for it.

    With --stats it is in the output too, if the format has a place for it.

    `more` is the option that helps against loss if it is larger.
    """
    if request.stats:
        sink.record("stats", stats.record())
    stream.flush()
    if request.verbose or request.stats or request.strict or not stats.lossless:
        line = f"tcpscope: {stats.line()}"
        print(line if stats.lossless or not screen.has_colours(sys.stderr) else screen.red(line), file=sys.stderr)
    if request.strict and lost_by(stream):
        raise LossError("rows were not written", "the reader of standard output must go on reading")
    if request.strict and stats.unknown:
        raise LossError("what was lost is not known", stats.unknown)
    if request.strict and not stats.lossless:
        raise LossError("events were lost", f"{f'a larger {more} or ' if more else ''}a narrower filter helps")


def clear_interrupt() -> None:
    """Clear the terminal's line, where it has echoed ^C: the next line begins in the first column."""
    for stream in (sys.stderr, sys.stdout):
        if screen.understands_escapes(stream):
            print("\r\x1b[K", end="", file=stream, flush=True)
            return


def _waiting(request: Request, command: Command | None = None) -> str:
    """What stands on a terminal while a run prints nothing."""
    end = "when the command has ended" if command else "at Ctrl-C"
    when = end if request.duration is None else f"after {request.duration:g} s or {end}"
    return f"counting; prints {when}; with -i 5 every 5 s"


def _print_notes(run: Run) -> None:
    for note in run.notes:
        print(screen.filled(f"tcpscope: {note}", sys.stderr), file=sys.stderr)
    run.notes.clear()


_INDENT = 19  # of a second line of what --explain says


def explain(filter: Filter, sessions: Sequence[Session], buffer_bytes: int = 0) -> Iterator[str]:
    """How this run works on this kernel: its hooks, the better ways that were refused and why, and who filters.

    `buffer_bytes` is kernel memory that is in no map: the buffers of perf event arrays.
    """
    for session in sessions:
        for loaded in (session.loaded, *([session.owners.loaded] if session.owners else [])):
            yield from _explain_object(loaded)
        for option, value in filter.describe():
            where = "the kernel" if filters(session.spec) else "user space"
            yield f"  filter {f'{option} {value}'.strip()}: decided in {where}"
    if buffer_bytes:
        yield f"  {'perf buffers':<14} {buffer_bytes / 1e6:.1f} MB of the kernel's, for all processors"


def _explain_object(loaded: Loaded) -> Iterator[str]:
    yield f"probe {loaded.spec.name}"
    yield f"  {'memory':<14} {loaded.kernel_bytes / 1e6:.1f} MB of the kernel's, for tables and buffer"
    for hook in loaded.hooks.values():
        yield f"  {hook.name:<14} {hook.program.section if hook.program else 'not attached'}"
        for name, why in hook.refused.items():
            yield f"  {'':<14} not {loaded.spec.section(name)}: {why}"
            if name in loaded.verifier:
                yield from (f"  {'':<16} {line}" for line in loaded.verifier[name].split(" | "))
        if hook.program is None and hook.without:
            yield f"  {'':<14} not known on this kernel: {hook.without}"


def _replaces(run: Run, stream: BinaryIO) -> bool:
    """Whether a snapshot replaces the previous one on the terminal."""
    return bool(run.repeats) and screen.understands_escapes(stream)


def _table(tool: Tool, run: Run, request: Request, stream: BinaryIO) -> screen.Sink:
    """A table for the terminal `stream`. Where a snapshot replaces the previous one, the time stands above it, once."""
    named = request.columns is not None
    columns = [column for column in run.columns if named or not _replaces(run, stream) or column.kind != "time"]
    return screen.Sink(
        columns,
        stream,
        request.header,
        run.important or tool.important,
        wide=named or request.wide,
        alarming=tool.alarming,
    )


def _that_fit(lines: Sequence[str], size: os.terminal_size) -> Iterator[str]:
    """The first lines, as many as fit. With --wide a line may be longer than the terminal."""
    room = size.lines - 1
    for line in lines:
        room -= screen.height_of(line, size.columns)
        if room < 0:
            return
        yield line


class _Page:
    """A terminal on which each snapshot replaces the previous one."""

    def __init__(self, run: Run, request: Request, table: screen.Sink, stream: BinaryIO) -> None:
        self._table = table
        self._noun, self._clock = run.repeats, Clock(request.time)
        self._request, self._stream = request, stream
        self._drawn_s = 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether it was drawn less than half an interval ago."""
        return time.monotonic() - self._drawn_s < (self._request.interval or 1.0) / 2

    def draw(self, batch: Batch) -> None:
        """Draw the table, cut to the size of the terminal."""
        self._drawn_s = time.monotonic()
        size = screen.size_of(self._stream)
        first = "the first " if len(batch.rows) == self._request.max_events else ""
        plural = "" if len(batch.rows) == 1 else "es" if self._noun.endswith("s") else "s"
        when = "" if self._clock.mode == "none" else f"{self._clock.read(monotonic_ns())}  "
        above = screen.cut(f"{when}{first}{len(batch.rows)} {self._noun}{plural}", size.columns)
        text = "\n".join(_that_fit([above, *self._table.page(batch.rows)], size))
        self._stream.write(f"\x1b[H\x1b[J{text}\n".encode())
