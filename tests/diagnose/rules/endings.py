"""For the tests of rules about how connections end: evidence that nobody gathered, and findings of both hosts."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from tcpscope.diagnose import Finding, Rule
from tcpscope.diagnose.tallies import Groups, Tally
from tests.record import Script, Seen
from tests.tools.queue.refusals import DIAGNOSE

NETNS, HERE, THERE = 4026531840, "192.0.2.1", "192.0.2.2"

_Reset = namedtuple("_Reset", "netns pid comm laddr lport raddr rport direction state cause unanswered")
_Attempt = namedtuple("_Attempt", "netns pid comm laddr raddr rport outcome errno")
_RESET = _Reset(NETNS, 7, "web", HERE, 50000, THERE, 8080, "RECEIVED", "ESTABLISHED", None, True)
_ATTEMPT = _Attempt(NETNS, 7, "web", HERE, THERE, 8080, "ESTABLISHED", "none")


def groups(*found: tuple[Any, int], seconds: float = 10.0) -> Groups:
    """Groups with these counts. What each counts happened in this time."""
    made: Groups = object.__new__(Groups)
    made.tallies = {}
    for group, count in found:
        tally = made.tallies.setdefault(group, Tally())
        tally.add(100.0, count - 1)
        tally.add(100.0 + seconds, 1)
    return made


def resets(number: int, *, lport: int = 50000, step: int = 1, **values: Any) -> list[tuple[Any, int]]:
    """So many, each of another local port; with `rport` and `step` 0 of one local port."""
    return [(_RESET._replace(lport=lport + n * step, **values), 1) for n in range(number)]


def attempts(number: int, **values: Any) -> tuple[Any, int]:
    return (_ATTEMPT._replace(**values), number)


def check(rule: Rule, name: str, seen: Any) -> list[Finding]:
    rule.name = name
    return list(rule.check(seen))


def findings(seen: Seen, script: Script) -> list[dict[str, Any]]:
    """What was found about both hosts, of whatever rule."""
    hosts = {host.inode for host in script.hosts}
    found: list[dict[str, Any]] = seen.run(DIAGNOSE).summary["findings"]
    return [finding for finding in found if finding["facts"]["netns"] in hosts]
