"""Watch, then say what is wrong, why, and what helps. It never changes the system.

A rule is one module in `rules/` with a variable `rule`. It names the evidence that it needs (`evidence.py`). The engine
(`watching.py`) gathers each piece of evidence once, asks the rules each second, and tells a finding when it is certain.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from tcpscope.diagnose import rules

if TYPE_CHECKING:
    from tcpscope.diagnose.evidence import Evidence
    from tcpscope.diagnose.sockets import Mark

SEVERITIES = ("critical", "warning", "info")


class Remedy(msgspec.Struct, frozen=True):
    """One thing that helps: `what` to do, the `command` if there is one, the value it changes, and its `risk`."""

    what: str
    command: str | None = None
    name: str | None = None
    present: str | int | None = None
    proposed: str | int | None = None
    risk: str | None = None


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong.

    rule      name of the rule that found it
    severity  critical (connections fail or stall), warning (they are slow, or may fail soon), info
    title     one line: what, and whose
    observed  what was seen, a line each; every number was counted or read
    why       the mechanism, in two sentences or so
    remedies  what helps, the best first
    facts     the numbers again, for programs. `count` orders findings of one severity
    who       the process that can act, as `processes.Process.name` says it; None: none is known
    look      command lines, without `tcpscope`, that show more
    about     what it is about, from `peer()`, `listener()` and so on: the same thing found twice has the same `about`,
              and one finding explains another only if they share an element
    first_s, last_s  when it was seen first and last, in seconds of the monotonic clock; None: not known, and it goes on
    subject   what tells it from the rule's other findings, if `about` may grow while it lasts
    explains  the rules whose findings it explains; None: those that its rule names
    """

    rule: str
    severity: str
    title: str
    observed: list[str]
    why: str
    remedies: list[Remedy]
    facts: dict[str, Any]
    who: str | None = None
    look: tuple[str, ...] = ()
    about: frozenset[tuple[Any, ...]] = frozenset()
    first_s: float | None = None
    last_s: float | None = None
    subject: tuple[Any, ...] | None = None
    explains: tuple[str, ...] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Tells whether a later finding is the same one, with newer numbers."""
        return (self.rule, self.subject or self.about or self.title)


def peer(netns: int, raddr: str) -> tuple[Any, ...]:
    """A remote address, for `Finding.about`."""
    return ("peer", netns, raddr)


def service(netns: int, raddr: str, rport: int | None) -> tuple[Any, ...]:
    """A remote address and port."""
    return ("service", netns, raddr, rport)


def endpoint(netns: int, address: str, port: int | None) -> tuple[Any, ...]:
    """An address and port as both ends name it, whatever their namespaces are: for what is seen at both ends."""
    return ("endpoint", netns if ip_address(address).is_loopback else None, address, port)


def connection(netns: int, laddr: str, lport: int, raddr: str, rport: int) -> tuple[Any, ...]:
    """A connection, for what is seen at both of its ends."""
    ends = frozenset({(laddr, lport), (raddr, rport)})
    return ("connection", netns if ip_address(laddr).is_loopback else None, ends)


def listener(netns: int, lport: int) -> tuple[Any, ...]:
    """The listeners of a local port."""
    return ("listener", netns, lport)


def process(pid: int) -> tuple[Any, ...]:
    """A process."""
    return ("process", pid)


def halted(pid: int) -> tuple[Any, ...]:
    """A process, for what it leaves undone if it is stopped, and only then."""
    return ("halted", pid)


class Rule:
    """Looks at the evidence. `check` yields what is certain by now, each time it is called, with all numbers anew.

    needs     names of evidence; the rule is not asked where this kernel has not all of it
    marks     what it wants to know of each connection in each look: diagnose/sockets.py. The names are the rule's own
    explains  rules whose findings about the same thing are only its symptoms. They are not told
    unseen    what it cannot see on this kernel, a line each
    """

    name = ""
    needs: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[Mapping[str, Mark]] = {}
    explains: ClassVar[tuple[str, ...]] = ()

    def check(self, seen: Evidence) -> Iterator[Finding]:
        raise NotImplementedError

    def unseen(self, seen: Evidence) -> Iterator[str]:
        yield from ()


def all_rules() -> list[Rule]:
    """The rules of `rules/`: the directory is the list."""
    found = []
    for module in sorted(m.name for m in pkgutil.iter_modules(rules.__path__)):
        rule: Rule = importlib.import_module(f"{rules.__name__}.{module}").rule
        rule.name = module
        found.append(rule)
    return found


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Most severe first, then those with the largest count: of connections that failed or stalled."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), -(f.facts.get("count") or 0), f.title))


def causes(findings: Iterable[Finding], rules: Iterable[Rule]) -> list[Finding]:
    """The findings that no other one explains. A finding explains those of the rules that its own rule names, or it
    itself does, if both are about the same thing."""
    found = list(findings)
    by_rule = {rule.name: rule.explains for rule in rules}
    explained = {
        (rule, thing)
        for each in found
        for rule in (by_rule[each.rule] if each.explains is None else each.explains)
        for thing in each.about
    }
    return [each for each in found if not any((each.rule, thing) in explained for thing in each.about)]
