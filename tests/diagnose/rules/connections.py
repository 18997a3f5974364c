"""What tests of rules about connections share. `connection()` and `track()` make some that were never there."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from tcpscope.diagnose import Rule
from tcpscope.diagnose.sockets import Track, columns
from tests.record import Script, Seen
from tests.tools.queue.refusals import DIAGNOSE

NOBODY = 0x7FFFFFFF
"""A PID that no process ever has: what rules read of one in /proc is nothing."""

_ENDS = {
    "netns": 1,
    "pid": NOBODY,
    "comm": "app",
    "laddr": "192.0.2.1",
    "lport": 40000,
    "raddr": "192.0.2.2",
    "rport": 80,
}
_STATE = {"state": "ESTABLISHED", "role": "ACTIVE", "timer": "NONE", "has_file": True, "mss": 1448, "rto_us": 200_000}


def connection(**columns_: Any) -> Any:
    """A row: an established connection of `app`, in which nothing waits but what is given."""
    unknown = set(columns_) - set(columns()) - set(_ENDS)
    assert not unknown, unknown
    return SimpleNamespace(**dict.fromkeys(columns(), 0) | _ENDS | _STATE | columns_)


def track(rule: Rule, rows: Sequence[Any], every_s: float = 1.0) -> Track:
    """The connection whose looks, one each second, found these rows."""
    made = Track(rows[0], rows[0], 100.0, 100.0)
    for number, row in enumerate(rows):
        copy = SimpleNamespace(**vars(row))  # a look has rows of its own
        if not number:
            made.first = made.last = copy
        made._look(copy, 100.0 + number * every_s, rule.marks)
    return made


def findings(seen: Seen, script: Script) -> list[dict[str, Any]]:
    """All that `diagnose` found about the two hosts, of whatever rule."""
    inodes = {host.inode for host in script.hosts}
    return [each for each in seen.run(DIAGNOSE).summary["findings"] if each["facts"]["netns"] in inodes]


def faults(seen: Seen, script: Script) -> list[dict[str, Any]]:
    """Those above info. A machine with too much to do has packets overtake one another, and that is said."""
    return [found for found in findings(seen, script) if found["severity"] != "info"]
