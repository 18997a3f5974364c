"""The engine: gathers the evidence, asks the rules each second, and tells what is certain and what has ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tcpscope.diagnose import SEVERITIES, Finding, causes, ordered
from tcpscope.diagnose.evidence import Evidence

CHECK_SECONDS = 1.0
SETTLE_SECONDS = 2.0
"""A finding is told when it has been found for this time: its cause may become certain a moment later."""

_SHARE = 4  # rules take at most this part of one processor: what they look at may be gone a moment later

WINDOW_SECONDS = 60.0
"""With --watch a rule looks at the last minute."""

QUIET_SECONDS = 15.0
"""With --watch a finding has ended when no rule has found it, or nothing more has happened, for this time."""


@dataclass
class Known:
    """A finding that was found, and as how severe it was told; None: it was not.

    explained        it was told that another finding is its cause
    began_s, seen_s  when it was found first and last, in seconds of the monotonic clock
    """

    finding: Finding
    began_s: float
    seen_s: float
    told: str | None = None
    explained: bool = False

    @property
    def is_worse(self) -> bool:
        """Whether it is more severe now than it was told."""
        return self.told is not None and SEVERITIES.index(self.finding.severity) < SEVERITIES.index(self.told)

    @property
    def last_s(self) -> float:
        """When it was last seen: when a rule found it, or when what it counts happened."""
        last = self.finding.last_s
        return self.seen_s if last is None else min(last, self.seen_s)


@dataclass(frozen=True)
class News:
    """A finding has become certain or has ended, is more severe than it was told, or another one is its cause."""

    what: Literal["began", "ended", "worse", "explained"]
    known: Known


class Watch:
    """One watch, from its first check to its end. `windowed`: the rules look at the last minute only."""

    def __init__(self, evidence: Evidence, windowed: bool = False) -> None:
        self._evidence, self._windowed = evidence, windowed
        self.known: dict[tuple[object, ...], Known] = {}
        self._next_s = 0.0

    def poll(self) -> Iterator[News]:
        """Take what is new, five times a second; each second, ask the rules."""
        self._evidence.poll()
        if time.monotonic() >= self._next_s:
            spent = time.thread_time()
            yield from self.check()
            self._next_s = time.monotonic() + max(CHECK_SECONDS, _SHARE * (time.thread_time() - spent))

    def check(self, settle_s: float = SETTLE_SECONDS) -> Iterator[News]:
        """Ask the rules now."""
        now = time.monotonic()
        if self._windowed:
            self._evidence.forget(now - WINDOW_SECONDS)
        found = self._found()
        current = {finding.key: finding for finding in self._causes(found)}
        for key, finding in current.items():
            self.known.setdefault(key, Known(finding, now, now))
        for finding in found:  # what was told goes on, though another one may explain it by now
            known = self.known.get(finding.key)
            if known and (known.told or finding.key in current):
                known.finding, known.seen_s = finding, now
        for key, known in list(self.known.items()):
            if key not in current and not known.told:
                del self.known[key]  # explained by another one since, or not so after all
            elif not known.told and now - known.began_s >= settle_s:
                known.told = known.finding.severity
                yield News("began", known)
            elif known.told and not known.explained and key not in current and known.seen_s == now:
                known.explained = True
                yield News("explained", known)
            elif known.is_worse:
                known.told = known.finding.severity
                yield News("worse", known)
            elif self._windowed and known.told and now - known.last_s >= QUIET_SECONDS:
                del self.known[key]
                yield News("ended", known)

    def end(self) -> Iterator[News]:
        """Stop the evidence, and tell the rest."""
        self._evidence.end()
        yield from self.check(settle_s=0.0)

    def findings(self) -> list[Finding]:
        """All that were told and have not ended, with their last numbers, in order."""
        return ordered(self._causes(known.finding for known in self.known.values() if known.told))

    def quiet_s(self, finding: Finding) -> float | None:
        """For how long nothing more of it has happened; None: it goes on, or that is not certain."""
        known = self.known.get(finding.key)
        quiet_s = time.monotonic() - known.last_s if known else 0.0
        return quiet_s if quiet_s >= QUIET_SECONDS else None

    def _found(self) -> list[Finding]:
        now = time.monotonic()
        found = [finding for rule in self._evidence.rules for finding in rule.check(self._evidence)]
        if self._windowed:
            found = [each for each in found if each.last_s is None or now - each.last_s < QUIET_SECONDS]
        return found

    def _causes(self, found: Iterable[Finding]) -> list[Finding]:
        return causes(found, self._evidence.rules)
