"""Findings, and what was watched, as text for a reader."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, BinaryIO

from tcpscope.diagnose import Finding
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.wording import namespace
from tcpscope.output import screen

_WIDEST = 100
_FAILED_BY_ITSELF = frozenset({"ESTABLISHED", "GAVE_UP", "KILLED"})


def width_of(stream: BinaryIO) -> int:
    return min(_WIDEST, screen.width_of(stream) or _WIDEST)


def span(seconds: float) -> str:
    """`3.2 s`, `45 s`, `12 min`."""
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.{int(seconds < 10)}f} s"


def finding(number: int, finding: Finding, after_s: float, began_s: float, width: int) -> list[str]:
    """The lines of a finding that was certain so long after the beginning of the watch, which was at `began_s`."""
    lines = wrapped(f"{number}. [{finding.severity}] {finding.title}", width, subsequent_indent="   ")
    for line in finding.observed:
        lines += wrapped(line, width, initial_indent="   - ", subsequent_indent="     ")
    lines += wrapped(_times(finding, after_s, began_s), width, initial_indent="   - ", subsequent_indent="     ")
    lines += _titled("Who", finding.who, width) if finding.who else []
    where = namespace(finding.facts.get("netns"))
    lines += _titled("Where", where, width) if where else []
    lines += _titled("Why", finding.why, width)
    for remedy in finding.remedies:
        values = ""
        if remedy.name is not None:
            proposed = f", proposed {remedy.proposed}" if remedy.proposed is not None else ""
            values = f" [{remedy.name}: now {remedy.present}{proposed}]"
        lines += _titled("Helps", remedy.what + values, width)
        if remedy.command:
            lines.append(f"          # {remedy.command}")
        if remedy.risk:
            lines += _titled("Risk", remedy.risk, width, 7)
    for command in finding.look:
        lines.append(f"   Look:  tcpscope {command}")
    return lines


def _times(finding: Finding, after_s: float, began_s: float) -> str:
    first_s = None if finding.first_s is None else finding.first_s - began_s
    certain = span(max(after_s, first_s or 0.0, 0.0))
    if first_s is None:
        return f"certain {certain} after the beginning of the watch"
    if first_s < 0:
        return f"began {span(-first_s)} before the watch; certain {certain} after its beginning"
    return f"first seen {span(first_s)} after the beginning of the watch, certain after {certain}"


def wrapped(text: str, width: int, initial_indent: str = "", subsequent_indent: str = "") -> list[str]:
    """Lines of this width at most; a name with a hyphen is not broken."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=initial_indent,
        subsequent_indent=subsequent_indent,
        break_on_hyphens=False,
    )


def _titled(title: str, text: str, width: int, indent: int = 3) -> list[str]:
    begin = f"{' ' * indent}{title}:".ljust(indent + 7)
    return wrapped(text, width, initial_indent=begin, subsequent_indent=" " * len(begin))


def watched(evidence: Evidence) -> str:
    """What was seen, in a few words: for the live line and the last line."""
    seen = counts(evidence)

    def words() -> Iterator[str]:
        if seen["connects"] is not None:
            given_up = f", {seen['connects_given_up']} given up" if seen["connects_given_up"] else ""
            yield f"{_number(seen['connects'], 'connect')}, {seen['connects_failed']} failed{given_up}"
        if seen["connections"] is not None:
            yield _number(seen["connections"], "connection")
        if seen["listeners"] is not None:
            yield f"{_number(seen['listeners'], 'listener')}, {_number(seen['refusals'], 'refusal')}"
        for name, noun in (("retransmissions", "retransmission"), ("resets", "RST"), ("drops", "discarded packet")):
            if seen[name]:
                yield _number(seen[name], noun)

    return "; ".join(words())


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def counts(evidence: Evidence) -> dict[str, Any]:
    """The same numbers, by name, since the watch began; None: not watched."""
    found: dict[str, Any] = dict.fromkeys(
        (
            "connects",
            "connects_failed",
            "connects_given_up",
            "connections",
            "listeners",
            "refusals",
            "retransmissions",
            "resets",
            "drops",
        )
    )
    if attempts := getattr(evidence, "attempts", None):
        ever = attempts.ever.values()
        found["connects"] = sum(each.count for each in ever)
        found["connects_failed"] = sum(each.count for each in ever if each.outcome not in _FAILED_BY_ITSELF)
        found["connects_given_up"] = sum(each.count for each in ever if each.outcome == "GAVE_UP")
    if sockets := getattr(evidence, "sockets", None):
        found["connections"] = sockets.connections
    if queues := getattr(evidence, "queues", None):
        found |= queues.counts()
    if retrans := getattr(evidence, "retrans", None):
        sent = (each for each in retrans.ever.values() if each.kind != "SPURIOUS" and each.errno == "none")
        found["retransmissions"] = sum(each.sum for each in sent)
    if resets := getattr(evidence, "resets", None):
        found["resets"] = sum(each.count for each in resets.ever.values() if each.direction in ("SENT", "RECEIVED"))
    if drops := getattr(evidence, "drops", None):
        found["drops"] = sum(each.count for each in drops.ever.values())
    return found


def nothing_found(evidence: Evidence) -> str:
    return f"Nothing found. {len(evidence.rules)} kinds of faults were looked for."
