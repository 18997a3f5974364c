"""What the tests of rules about connecting share: findings of a recording, and evidence that is made up."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tcpscope.diagnose import Finding, Rule
from tcpscope.diagnose.tallies import Groups, Tally
from tcpscope.filters import Filter
from tests.record import Host, Seen
from tests.tools.queue.refusals import DIAGNOSE

NETNS, HERE, THERE, OTHER = 4026532000, "192.0.2.1", "192.0.2.2", "192.0.2.3"


def found(seen: Seen, *hosts: Host) -> list[dict[str, Any]]:
    """All findings about these hosts."""
    inodes = {host.inode for host in hosts}
    return [each for each in seen.run(DIAGNOSE).summary["findings"] if each["facts"]["netns"] in inodes]


def groups(given: Mapping[tuple[tuple[str, Any], ...], Tally]) -> Groups:
    """Evidence with these groups: `of(column=value, ...)` -> `times(...)`."""
    made = Groups.__new__(Groups)
    made.tallies = {}
    names = [name for name, _ in next(iter(given), ())]
    group = namedtuple("Group", names)
    for columns, tally in given.items():
        assert [name for name, _ in columns] == names
        made.tallies[group(*(value for _, value in columns))] = tally
    return made


def of(**columns: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(columns.items())


def times(*counts: int, first_s: int = 100) -> Tally:
    """So many in each second."""
    tally = Tally()
    for second, count in enumerate(counts):
        if count:
            tally.add(first_s + second, count)
    return tally


def attempt(outcome: str, errno: str = "none", **columns: Any) -> tuple[tuple[str, Any], ...]:
    given = {"netns": NETNS, "pid": 7, "comm": "client", "laddr": HERE, "raddr": THERE, "rport": 80}
    return of(**given | {"outcome": outcome, "errno": errno, "syn_retrans": 0, "syn_sent": True} | columns)


def sockets(*rows: Any, looked_s: float = 110.0) -> Any:
    tracks = [SimpleNamespace(last=row, first_s=looked_s - 1, last_s=looked_s) for row in rows]
    return SimpleNamespace(now=tracks, served={})


def check(rule: Rule, filter: Filter = Filter(), **evidence: Any) -> list[Finding]:  # noqa: B008 (it is frozen)
    seen: Any = SimpleNamespace(request=SimpleNamespace(filter=filter), **evidence)
    return list(rule.check(seen))
