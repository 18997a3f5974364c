"""`tcpscope diagnose`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import click
import msgspec

from tcpscope.cli import COMMON, DURATION, FILTERS, FILTERS_TITLE, FORMAT, OUTPUT_TITLE, Command, changed, filter_of
from tcpscope.diagnose import Finding, all_rules, text
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.watching import News, Watch
from tcpscope.errors import ReachedError
from tcpscope.kernel import pidns
from tcpscope.output import cut, open_sink, printable, printable_json, screen
from tcpscope.request import Request
from tcpscope.show import begin, clear_interrupt, descriptor, finish
from tcpscope.stop import Stop
from tcpscope.writing import Output

_POLL_SECONDS = 0.2
_LIVE_SECONDS = 1.0
_DEFAULT_SECONDS = 30.0


def _run(**values: Any) -> None:
    request = Request(filter=filter_of(values), **{k: v for k, v in values.items() if v is not None and k in _KNOWN})
    request.options = {name: values[name] for name in ("watch", "exit_code")}
    goes_on = values["watch"]
    request.duration = values["duration"] or (None if goes_on else _DEFAULT_SECONDS)
    stream = sys.stdout.buffer
    with Stop(request.duration, descriptor(stream)) as stop:
        Output.stop = stop
        evidence = Evidence(request, all_rules())
        teller = (_Records if request.output == "json" else _Text)(stream, evidence)
        try:
            begin([session for run in evidence.runs for session in run.sessions], stop)
            watch = Watch(evidence, goes_on)
            _watch(watch, evidence, teller, stop, request)
            findings = watch.findings()
            teller.end(findings, watch.quiet_s)
            stats = evidence.account()
        finally:
            evidence.close()
        finish(request, stats, open_sink(request.output, (), stream), stream)
    worst = [finding for finding in findings if finding.severity != "info"]
    if values["exit_code"] and worst:
        raise ReachedError(f"{len(worst)} finding{'s' * (len(worst) != 1)}; the first: {worst[0].title}")


_KNOWN = ("output", "duration", "stats", "strict", "verbose", "debug")


def _watch(watch: Watch, evidence: Evidence, teller: _Text | _Records, stop: Stop, request: Request) -> None:
    """Until the time is over or a stop is asked for, with a live line on a terminal."""
    live = screen.understands_escapes(sys.stderr)
    how_long = "" if request.duration is None else f" for {request.duration:g} s"
    sooner = "" if request.duration is None else " sooner"
    print(f"tcpscope: watching{how_long}; Ctrl-C ends it{sooner}", file=sys.stderr)
    started = shown = time.monotonic()
    while not stop:
        for news in watch.poll():
            if live:
                clear_interrupt()
            teller.tell(news)
        if live and time.monotonic() >= shown:
            shown = time.monotonic() + _LIVE_SECONDS
            words = f"{time.monotonic() - started:4.0f} s  {text.watched(evidence)}"
            line = cut(printable(words), screen.size_of(sys.stderr).columns - 1)
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        stop.wait(_POLL_SECONDS)
    clear_interrupt()
    for news in watch.end():
        teller.tell(news)


@dataclass
class _Shown:
    """A finding that goes on, as it was written last, and its number."""

    number: int
    finding: Finding
    after_s: float


class _Text:
    """Findings for a reader: each when it is certain, and the last line.

    A fault that has ended is forgotten: with --watch there may be more of them than fit into memory. If it comes back,
    it has another number.
    """

    def __init__(self, stream: BinaryIO, evidence: Evidence) -> None:
        self._stream, self._evidence = stream, evidence
        self._told = 0
        self._shown: dict[tuple[Any, ...], _Shown] = {}

    def tell(self, news: News) -> None:
        finding = news.known.finding
        after_s = news.known.began_s - self._evidence.began_s
        if finding.key not in self._shown:
            self._told += 1
            self._shown[finding.key] = _Shown(self._told, finding, after_s)
        shown = self._shown[finding.key]
        number = shown.number
        if news.what == "ended":
            del self._shown[finding.key]
            first_s = min(finding.first_s or news.known.began_s, news.known.began_s)
            lasted_s = max(0.0, news.known.last_s - first_s)
            self._write_wrapped(f"{number}. has ended, after {text.span(lasted_s)}: {finding.title}", "")
            return
        if news.what == "explained":
            self._write_wrapped(f"{number}. is explained by another finding: {finding.title}", "")
            return
        shown.finding, shown.after_s = finding, after_s
        if news.what == "worse":
            self._write_wrapped(f"{number}. is [{finding.severity}] now: {finding.title}", "", alarming=True)
            return
        self._write_whole(shown)

    def end(self, findings: list[Finding], quiet_s: Callable[[Finding], float | None]) -> None:
        order = []
        for finding in findings:
            shown = self._shown[finding.key]
            before, shown.finding = shown.finding, finding
            order.append(str(shown.number))
            if before.why != finding.why:  # it is another case of the fault, as is known now
                self._write_whole(shown)
            elif before.observed != finding.observed:
                self._write_wrapped(f"{shown.number}. at the end: {'; '.join(finding.observed[:2])}")
            if (past_s := quiet_s(finding)) is not None:
                quiet = text.span(past_s)
                self._write_wrapped(f"{shown.number}. is over, it seems: nothing more of it in the last {quiet}")
        last = [text.nothing_found(self._evidence)] if not self._told else []
        if len(order) > 1:
            last.append(f"The most severe first: {', '.join(order)}.")
        last.append(f"Watched for {text.span(self._evidence.watched_s)}: {text.watched(self._evidence)}.")
        last += [f"Note: {note}." for note in _notes(self._evidence)]
        self._write([line for each in last for line in screen.filled(each, self._stream).split("\n")])

    def _write_whole(self, shown: _Shown) -> None:
        width = text.width_of(self._stream)
        lines = text.finding(shown.number, shown.finding, shown.after_s, self._evidence.began_s, width)
        self._write([*lines, ""], shown.finding.severity == "critical")

    def _write_wrapped(self, *lines: str, alarming: bool = False) -> None:
        width = text.width_of(self._stream)
        self._write([each for line in lines for each in text.wrapped(line, width) or [""]], alarming)

    def _write(self, lines: list[str], alarming: bool = False) -> None:
        whole = "\n".join(map(printable, lines)) + "\n"
        if alarming and screen.has_colours(self._stream):
            whole = whole.replace("[critical]", screen.red("[critical]"), 1)
        self._stream.write(whole.encode())
        self._stream.flush()


class _Records:
    """Findings for a program: a record when one begins or ends, and a summary with all of them at the end."""

    def __init__(self, stream: BinaryIO, evidence: Evidence) -> None:
        self._stream, self._evidence = stream, evidence

    def tell(self, news: News) -> None:
        known = news.known
        at_s = known.last_s if news.what == "ended" else known.began_s
        self._write({news.what: self._values(known.finding) | {"at_s": self._since(at_s)}})

    def end(self, findings: list[Finding], quiet_s: Callable[[Finding], float | None]) -> None:
        evidence, account = self._evidence, self._evidence.account()
        summary = {
            "watched_s": round(evidence.watched_s, 3),
            "filter": " ".join(filter(None, chain.from_iterable(evidence.request.filter.describe()))),
            "findings": [self._values(finding) | {"quiet_s": _rounded(quiet_s(finding))} for finding in findings],
            "rules": [rule.name for rule in evidence.rules],
            "not_checked": [rule.name for rule in evidence.left_out],
            **text.counts(evidence),
            **{name: getattr(account, name) for name in ("lost", "table_full", "missed")},
            "notes": _notes(evidence),
        }
        self._write({"summary": summary})

    def _values(self, finding: Finding) -> dict[str, Any]:
        values: dict[str, Any] = msgspec.to_builtins(finding, builtin_types=(frozenset,))
        times = {name: self._since(getattr(finding, name)) for name in ("first_s", "last_s")}
        return {name: value for name, value in values.items() if name not in _ENGINE} | times

    def _since(self, at_s: float | None) -> float | None:
        """Seconds after the watch began; before it they are negative."""
        return None if at_s is None else round(at_s - self._evidence.began_s, 1)

    def _write(self, record: dict[str, Any]) -> None:
        self._stream.write(printable_json(msgspec.json.encode(record) + b"\n"))
        self._stream.flush()


_ENGINE = ("about", "subject", "explains")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _notes(evidence: Evidence) -> list[str]:
    blind = list(dict.fromkeys(evidence.blind_spots()))
    return [pidns.NOTE, *blind] if pidns.inner() else blind


_OWN = [
    click.Option(
        ["--watch"],
        is_flag=True,
        help="Go on until Ctrl-C, and say when a finding ends. Rules look at the last minute.",
    ),
    click.Option(["--exit-code"], is_flag=True, help="End with status 6 if there is a critical finding or a warning."),
]
_COMMON = [
    changed(FORMAT, type=click.Choice(["table", "json"])),
    changed(
        DURATION, help=f"Watch for this time (seconds, or 5m, 1h), or until Ctrl-C.  [default: {_DEFAULT_SECONDS:g}]"
    ),
    *(option for option in COMMON if option not in (FORMAT, DURATION)),
]
diagnose = Command(
    "diagnose",
    {"Options": _OWN, FILTERS_TITLE: FILTERS, OUTPUT_TITLE: _COMMON},
    examples={
        "diagnose": "what is wrong, in half a minute",
        "diagnose --watch": "until Ctrl-C; says when a fault begins and when it ends",
        "diagnose -p 4711": "with the connections of one process",
        "diagnose -L 443 -o json": "with one port, for a program",
    },
    callback=_run,
    help="Watch this machine's connections for a while, and say what is wrong, why, and what helps.\n\n"
    "A finding is printed when it is certain. It names the fault, the process that can act, what was counted, and a "
    "command that helps, where there is one. diagnose itself changes nothing.\n\n"
    "On kernels before 6.11 whose functions cannot be hooked, refusals and SYN cookies are sampled.",
    short_help="Watch this machine's connections, and say what is wrong, why, and what helps.",
)
