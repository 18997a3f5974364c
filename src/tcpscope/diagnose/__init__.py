"""Watch, then say what is wrong, why, and what helps. It never changes the system.

A rule is one module in `rules/` with a variable `rule`. It names the source of its observations (`QueueHistory`, ...).
The engine opens each source once, polls it while it watches, and asks the rules at the end.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import msgspec

from tcpscope.diagnose import rules
from tcpscope.run import Run
from tcpscope.session import Stats

SEVERITIES = ("critical", "warning", "info")


class Remedy(msgspec.Struct, frozen=True):
    """One thing that helps: `what` to do, the `command` if there is one, and the value it changes."""

    what: str
    command: str | None = None
    name: str | None = None
    present: str | int | None = None
    proposed: str | int | None = None


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong.

    rule      name of the rule that found it
    severity  critical (connections fail), warning (they are slow, or may fail soon), info
    title     one line: what, and whose
    observed  what was seen, a line each; every number was counted or read
    why       the mechanism, in two sentences or so
    remedies  what helps, the best first
    facts     the numbers again, for programs
    """

    rule: str
    severity: str
    title: str
    observed: list[str]
    why: str
    remedies: list[Remedy]
    facts: dict[str, Any]


class Source(Protocol):
    """A run, and what was learnt from its batches. The engine opens it with the request's filter, polls it about five
    times a second, and ends it."""

    run: Run

    def poll(self) -> None:
        """Take what is new."""

    def end(self) -> None:
        """Stop watching and take the last of it."""

    def live(self) -> str:
        """What has been seen so far, in a few words."""

    def counts(self) -> dict[str, int]:
        """The same numbers, by name."""

    def blind_spots(self) -> list[str]:
        """What it cannot see on this kernel, and what it does instead."""


class Rule:
    """Looks at what its source has seen. `check` yields findings."""

    name = ""
    source: type[Any]

    def check(self, seen: Any) -> Iterator[Finding]:
        raise NotImplementedError


def all_rules() -> list[Rule]:
    """The rules of `rules/`: the directory is the list."""
    found = []
    for module in sorted(m.name for m in pkgutil.iter_modules(rules.__path__)):
        rule: Rule = importlib.import_module(f"{rules.__name__}.{module}").rule
        rule.name = module
        found.append(rule)
    return found


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Most severe first, then the one with the most refusals."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), -(f.facts.get("count") or 0), f.title))


def account(sources: Iterable[Source]) -> Stats:
    """The loss contract over all probes."""
    return sum((source.run.account() for source in sources), Stats())
