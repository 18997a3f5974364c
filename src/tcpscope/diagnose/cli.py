"""`tcpscope diagnose`."""

from __future__ import annotations

import sys
import textwrap
import time
from typing import Any, BinaryIO

import click
import msgspec

from tcpscope.cli import COMMON, DURATION, FILTERS, FILTERS_TITLE, FORMAT, OUTPUT_TITLE, Command, changed, filter_of
from tcpscope.diagnose import Finding, Source, account, all_rules, ordered
from tcpscope.diagnose.connecting import Connecting
from tcpscope.kernel import pidns
from tcpscope.output import cut, open_sink, printable, printable_json, screen
from tcpscope.request import Request
from tcpscope.show import begin, clear_interrupt, descriptor, finish
from tcpscope.stop import Stop
from tcpscope.writing import Output

_POLL_SECONDS = 0.2
_DEFAULT_SECONDS = 30.0
_WIDEST = 100


def _run(**values: Any) -> None:
    request = Request(filter=filter_of(values), **{k: v for k, v in values.items() if v is not None})
    request.duration = values["duration"] or _DEFAULT_SECONDS
    stream = sys.stdout.buffer
    rules = all_rules()
    with Stop(request.duration, descriptor(stream)) as stop:
        Output.stop = stop
        sources: dict[type[Any], Source] = {}
        try:
            kinds: list[type[Any]] = [Connecting, *(rule.source for rule in rules)]
            for kind in dict.fromkeys(kinds):
                sources[kind] = kind(request)
            begin([session for source in sources.values() for session in source.run.sessions], stop)
            started = time.monotonic()
            _watch(list(sources.values()), stop, request)
            watched = time.monotonic() - started
            findings = ordered(found for rule in rules for found in rule.check(sources[rule.source]))
            if request.output == "json":
                stream.write(printable_json(msgspec.json.Encoder().encode_lines(findings)))
                summary = _summary(findings, [rule.name for rule in rules], list(sources.values()), watched)
                open_sink(request.output, (), stream).record("summary", summary)
            else:
                _print(stream, findings, list(sources.values()), watched)
            stats = account(sources.values())
        finally:
            for source in sources.values():
                source.run.close()
        finish(request, stats, open_sink(request.output, (), stream), stream)


def _watch(sources: list[Source], stop: Stop, request: Request) -> None:
    """Until the time is over or a stop is asked for, with a live line on a terminal."""
    live = screen.understands_escapes(sys.stderr)
    print(f"tcpscope: watching for {request.duration:g} s; Ctrl-C ends it sooner", file=sys.stderr)
    started = time.monotonic()
    while not stop:
        for source in sources:
            source.poll()
        if live:
            text = f"{time.monotonic() - started:4.0f} s  " + "; ".join(source.live() for source in sources)
            line = cut(printable(text), screen.size_of(sys.stderr).columns - 1)
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        stop.wait(_POLL_SECONDS)
    clear_interrupt()
    for source in sources:
        source.end()


def _summary(findings: list[Finding], rules: list[str], sources: list[Source], watched: float) -> dict[str, Any]:
    """The last record: what was watched, and what could not be judged. Without findings it is the only one."""
    counts = {name: n for source in sources for name, n in source.counts().items()}
    about = {"findings": len(findings), "watched_s": round(watched, 3), "rules": rules}
    return about | counts | {"notes": _notes(sources)}


def _notes(sources: list[Source]) -> list[str]:
    blind = [spot for source in sources for spot in source.blind_spots()]
    return [pidns.NOTE, *blind] if pidns.inner() else blind


def _print(stream: BinaryIO, findings: list[Finding], sources: list[Source], watched: float) -> None:
    write = stream.write
    width = min(_WIDEST, screen.width_of(stream) or _WIDEST)
    for number, finding in enumerate(findings, 1):
        text = "\n".join([*map(printable, _text(number, finding, width)), "", ""])
        if finding.severity == "critical" and screen.has_colours(stream):
            text = text.replace("[critical]", screen.red("[critical]"), 1)
        write(text.encode())
    last = []
    if not findings:
        listeners = any(source.counts().get("listeners") for source in sources)
        last.append(_NOTHING_FOUND if listeners else _NO_LISTENER)
    last.append(f"Watched for {watched:.{int(watched < 10)}f} s: {'; '.join(source.live() for source in sources)}.")
    last += [f"Note: {note}." for note in _notes(sources)]
    for line in last:
        write(f"{screen.filled(line, stream)}\n".encode())


_NOTHING_FOUND = "No full accept queue or SYN queue and no refused handshake found. Nothing else is checked yet."
_NO_LISTENER = "There is no listener that matches, so no queue was checked. Nothing else is checked yet."


def _text(number: int, finding: Finding, width: int) -> list[str]:
    lines = textwrap.wrap(f"{number}. [{finding.severity}] {finding.title}", width, subsequent_indent="   ")
    for line in finding.observed:
        lines += textwrap.wrap(line, width, initial_indent="   - ", subsequent_indent="     ")
    lines += textwrap.wrap(finding.why, width, initial_indent="   Why: ", subsequent_indent="        ")
    for remedy in finding.remedies:
        values = ""
        if remedy.name is not None:
            proposed = f", proposed {remedy.proposed}" if remedy.proposed is not None else ""
            values = f" [{remedy.name}: now {remedy.present}{proposed}]"
        text = remedy.what + values
        lines += textwrap.wrap(text, width, initial_indent="   Helps: ", subsequent_indent="          ")
        if remedy.command:
            lines.append(f"          # {remedy.command}")
    return lines


_NO_PEERS = "a listener has no remote end, and one overflow refuses many peers"
_PEERS = [option for option in FILTERS if option.name in ("rport", "raddr")]
_COMMON = [
    changed(FORMAT, type=click.Choice(["table", "json"])),
    changed(
        DURATION, help=f"Watch for this time (seconds, or 5m, 1h), or until Ctrl-C.  [default: {_DEFAULT_SECONDS:g}]"
    ),
    *(option for option in COMMON if option not in (FORMAT, DURATION)),
]
diagnose = Command(
    "diagnose",
    {FILTERS_TITLE: [option for option in FILTERS if option not in _PEERS], OUTPUT_TITLE: _COMMON},
    {flag: _NO_PEERS for option in _PEERS for flag in option.opts},
    examples={
        "diagnose -d 10": "what is wrong, after ten seconds",
        "diagnose -L 443 -o json": "with one port, for a program",
    },
    callback=_run,
    help="Watch this machine's connections for a while, then say what is wrong, why, and what helps.\n\n"
    "So far it finds full accept queues, full SYN queues and other refused handshakes. A finding names the listener, "
    "its owner, its limit and where the limit comes from, and proposes a change. diagnose itself changes nothing.\n\n"
    "On kernels before 6.11 whose functions cannot be hooked, refusals and SYN cookies are sampled.",
    short_help="Watch this machine's connections, then say what is wrong, why, and what helps.",
)
